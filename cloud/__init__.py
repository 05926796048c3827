"""The cloud service: consumes activations, answers with results, keeps them, and shows them."""

import splitward  # noqa: F401  # before onnxruntime, whose telemetry it switches off
