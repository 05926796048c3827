"""The report's pictures: originals above what each attack makes of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from splitward import page

Images = NDArray[np.uint8]
"""[n, C, H, W]."""

STYLE = """
.gallery th { width: 15rem; } .gallery td { padding: .2rem 0; text-align: left; white-space: normal; }
.gallery small { display: block; opacity: .8; }
.strip { width: 100%; image-rendering: pixelated; display: block; border-radius: .2rem; background: none; }
.originals th, .originals td { position: sticky; top: 0; background: Canvas; }
@media (max-width: 45rem) { .gallery th, .gallery td { display: block; width: auto; border: 0; } }
"""


def draw_gallery(results: dict[str, Any], shown: dict[str, Images]) -> str:
    """Originals, which stay in sight, above floors and attacks; the worst first, those on training last."""
    rows = [("originals", "originals", "", "original")]
    rows += [(name.replace("_", " "), "", "floor", name) for name in results["floors"]]
    measured = sorted(
        (row for row in results["attacks"] if "ssim" in row),
        key=lambda row: (row["phase"] == "training", -row["ssim"]["mean"]),
    )
    rows += [
        (
            f"{row['name']}: {row['title']}",
            "",
            f"SSIM {row['ssim']['mean']:.3f}, MSE {row['mse']['mean']:.4f}",
            row["name"],
        )
        for row in measured
    ]
    rows += [
        (f"ceiling: {row['name']}", "", "undefended cut", f"undefended/{row['name']}")
        for row in results["ceiling"]
    ]
    count = len(shown["original"])
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{page.text(title)}<small>{page.text(note)}</small></th>'
        f"<td>{page.picture(strip_png(shown[key], count), f'{title}: {note}', 'strip')}</td></tr>"
        for title, kind, note, key in rows
        if key in shown
    )
    return f'<table class="gallery"><tbody>{body}</tbody></table>'


def strip_png(images: Images, count: int) -> bytes:
    """PNG of up to `count` images [n, C, H, W] side by side; where there are fewer, the rest is transparent."""
    _, channels, height, width = images.shape
    gap = max(1, width // 14)
    strip = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for index, image in enumerate(images[:count]):
        left = index * (width + gap)
        strip[:, left : left + width, :3] = image.transpose(1, 2, 0) if channels == 3 else image[0][..., None]
        strip[:, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "png", optimize=True)
    return buffer.getvalue()
