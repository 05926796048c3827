"""The device agent, and the releaser that sees its pixels."""

import splitward  # noqa: F401  # before onnxruntime, whose telemetry it switches off
