"""Activations of recorded frames by every variant of a bundle; runs as it is on this machine and under emulation.

`python activations.py BUNDLE TRUSTED_KEY FRAMES.npz OUT.npz [BACKEND-PRECISION ...]`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np

from edge.config import RuntimeConfig
from edge.model import ClientModel
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import Backend, Precision, read_bundle, read_trusted_key

SECRET = bytes(32)


def main(bundle_path: str, key_path: str, frames_path: str, out_path: str, *variants: str) -> None:
    """Write one array of activations, float32 [N, ...], for each variant."""
    bundle = read_bundle(Path(bundle_path), read_trusted_key(Path(key_path)))
    with np.load(frames_path) as archive:
        images = archive["images"]
    found = {}
    for variant in variants or sorted(bundle.manifest.client):
        backend, _, precision = variant.partition("-")
        config = RuntimeConfig(backend=cast("Backend", backend), precision=cast("Precision", precision))
        model = ClientModel(bundle, config, SECRET)
        found[variant] = np.stack([model.activation(to_frame(pixels, model.input)) for pixels in images])
        print(f"{variant}: {len(images)} frames, {model.runtime}", flush=True)
    np.savez(out_path, **found)  # type: ignore[arg-type]  # its keywords are arrays


if __name__ == "__main__":
    main(*sys.argv[1:])
