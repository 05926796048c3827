"""What sites, devices, models, files and variants may be called, and how far numbers go."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""A name is part of a topic and of a certificate."""
MAX_INTEGER = (1 << 63) - 1
"""Greatest number that a message may carry: what stores keep is signed."""
Id = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""Of a model or an order; a device names files by it."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""Of a file, which a device is fetched under."""
Backend = Literal["onnx", "tflite"]
Precision = Literal["float32", "int8"]
