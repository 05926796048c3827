"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "splitward", "torch", "numpy", "onnx", "onnxruntime", "litert-torch", "ai-edge-quantizer", "ai-edge-litert",
    "paho-mqtt", "mqtt5", "fastapi", "sqlalchemy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Version of Python and of each installed package that shapes results."""
    installed = {name for name in PACKAGES if list(metadata.distributions(name=name))}
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in PACKAGES if name in installed
    }
