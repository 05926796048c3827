"""Splitward: split inference for medical devices. Importing this package is cheap and never loads torch.

It switches ONNX Runtime's telemetry off, whatever the environment says: in the process that sees pixels, that would
make an id of the device and report to Microsoft. The library heeds the variable as it is imported and never after, so
it is set here, which everything of ours imports first.
"""

import os
import sys
import warnings

__version__ = "0.1.0"

if "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
    warnings.warn(
        "onnxruntime was imported before splitward, so its telemetry is on in this process. "
        "Import splitward first, or start with ORT_DISABLE_TELEMETRY=1.",
        RuntimeWarning,
        stacklevel=2,
    )
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
