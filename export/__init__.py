"""A trained run becomes a signed bundle for devices and a server half for the cloud."""

import splitward  # noqa: F401  # before onnxruntime, whose telemetry it switches off
