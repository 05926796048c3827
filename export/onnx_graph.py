"""ONNX graphs: float32 from torch, static int8 by ONNX Runtime's quantiser."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.quiet import quiet

INPUT = "frame"
OUTPUT = "activation"
OPSET = 18


def to_onnx(graph: torch.nn.Module, shape: tuple[int, ...]) -> bytes:
    """Float32 ONNX of `graph` for one input [1, *shape] and one output, both named and of fixed size."""
    with quiet():
        program = torch.onnx.export(
            graph,
            (torch.zeros(1, *shape),),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program.")
    data: bytes = program.model_proto.SerializeToString()
    return data


def quantise_onnx(model: bytes, calibration: Sequence[NDArray[np.float32]]) -> bytes:
    """Static int8 of `model`, calibrated on inputs [1, ...]; input and output stay float32."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # its base has no types
        def __init__(self) -> None:
            self._frames = iter(calibration)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            frame = next(self._frames, None)
            return None if frame is None else {INPUT: frame}

    with quiet(), tempfile.TemporaryDirectory() as scratch:
        source, prepared, target = (
            Path(scratch) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx")
        )
        source.write_bytes(model)
        quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return target.read_bytes()
