"""The largest images that are read fit a device that has 512 MB for its agent, its runtime and the image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splitward.imaging import files
from tests.unit.imaging.test_imaging_dicom import write_dicom  # skips without pydicom

ROOM_MB = 400
"""Of 512, beside the agent and the runtime. The interpreter and its libraries have some 50 of it."""
READER = """
import sys
from pathlib import Path
from splitward.imaging.dicom import iter_dicom
from splitward.imaging.files import read_image
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import InputSpec

path, spec = Path(sys.argv[1]), InputSpec(1, 64, 64)
for pixels in (one.pixels for one in iter_dicom(path)) if path.suffix == ".dcm" else [read_image(path)]:
    to_frame(pixels, spec)
print(*(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""
SIDE = int(files.MAX_PIXELS**0.5)


def peak_mb(path: Path) -> float:
    """Most memory of a process that makes a frame of the file at `path`."""
    done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.parametrize(
    ("name", "sides", "options", "limit_mb"),
    [
        ("photograph.jpg", (6000, 4000), {}, 300),
        ("progressive.jpg", (SIDE, SIDE), {"progressive": True, "subsampling": 0}, ROOM_MB),
        ("flat.png", (SIDE, SIDE), {}, ROOM_MB),
        ("high.png", (files.MAX_PIXELS // files.MAX_SIDE, files.MAX_SIDE), {}, ROOM_MB),
    ],
)
def test_the_largest_colour_image_fits(tmp_path, name, sides, options, limit_mb):
    Image.new("RGB", sides).save(tmp_path / name, **options)
    assert peak_mb(tmp_path / name) < limit_mb


def test_the_largest_four_channels_fit(tmp_path):
    side = int((files.MAX_PIXELS * 3 // 4) ** 0.5)
    Image.new("CMYK", (side, side)).save(tmp_path / "a.jpg", progressive=True)
    assert peak_mb(tmp_path / "a.jpg") < ROOM_MB


@pytest.mark.parametrize(
    ("shape", "dtype", "attributes"),
    [
        ((6144, 4096), np.uint16, {}),
        ((SIDE, SIDE), np.uint16, {}),
        ((SIDE, SIDE, 3), np.uint8, {}),
        ((2160, 3840, 3), np.uint8, {"PhotometricInterpretation": "YBR_FULL"}),
        ((2048, 4096), np.uint32, {"WindowCenter": 9, "WindowWidth": 99, "VOILUTFunction": "SIGMOID"}),
        ((24, 2048, 2048), np.uint16, {"NumberOfFrames": 24}),
    ],
)
def test_the_largest_dicom_frame_fits(tmp_path, shape, dtype, attributes):
    path = write_dicom(
        tmp_path / "a.dcm", np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape), **attributes
    )
    assert peak_mb(path) < ROOM_MB
