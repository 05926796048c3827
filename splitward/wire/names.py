"""What sites, devices and variants may be called."""

from __future__ import annotations

import re
from typing import Literal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""A name is part of a topic and of a certificate."""
Backend = Literal["onnx", "tflite"]
Precision = Literal["float32", "int8"]
