"""What of the device's Python packages no device loads. The container's build runs this file as it is."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

DROPPED = (
    # GPU acceleration over WebGPU, conversion and training tools, tests, headers, type stubs.
    "ai_edge_litert/libLiteRtWebGpuAccelerator.so",
    *("ai_edge_litert/tools/*", "ai_edge_litert/aot/*", "ai_edge_litert/vendors/*"),
    "onnxruntime/capi/libonnxruntime.so*",  # for C programs; the Python module holds its own
    *("onnxruntime/transformers/*", "onnxruntime/quantization/*", "onnxruntime/tools/*"),
    *("onnxruntime/datasets/*", "onnxruntime/backend/*", "numpy/f2py/*", "numpy/distutils/*"),
    *("numpy/_core/include/*", "cv2/data/*", "cv2/gapi/*", "cv2/utils/*.pyi", "tqdm/*", "tqdm-*/*"),
    *("pydicom/data/test_files/*", "pydicom/data/charset_files/*", "pydicom/data/palettes/*"),
    *("pynetdicom/apps/*", "pynetdicom/benchmarks/*"),
    *("*/tests/*", "*/testing/tests/*", "*.pyi", "*.pxd", "*.a", "*/ThirdPartyNotices.txt"),
)


def is_dropped(name: str) -> bool:
    """Whether the file `name`, relative to the packages' folder, is of no use on a device."""
    return any(fnmatch.fnmatch(name, one) for one in DROPPED)


def prune(folder: Path) -> None:
    """Remove what is of no use from the packages in `folder`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif is_dropped(path.relative_to(folder).as_posix()):
            path.unlink()


if __name__ == "__main__":
    prune(Path(sys.argv[1]))
