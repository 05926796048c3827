"""What sites, devices and variants may be called, and how far numbers go."""

from __future__ import annotations

import re
from typing import Literal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""A name is part of a topic and of a certificate."""
MAX_INTEGER = (1 << 63) - 1
"""Greatest number that a message may carry: what stores keep is signed."""
Backend = Literal["onnx", "tflite"]
Precision = Literal["float32", "int8"]
