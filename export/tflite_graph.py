"""TFLite graphs: float32 from torch by LiteRT, static int8 by the AI Edge Quantizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.quiet import quiet

SIGNATURE = "serving_default"
INPUT = "args_0"


def to_tflite(graph: torch.nn.Module, shape: tuple[int, ...]) -> bytes:
    """Float32 TFLite of `graph` for one input [1, *shape], in the same channels-first layout."""
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        import litert_torch

        target = Path(scratch) / "graph.tflite"
        litert_torch.convert(graph, (torch.zeros(1, *shape),)).export(str(target))
        return target.read_bytes()


def quantise_tflite(model: bytes, calibration: Sequence[NDArray[np.float32]]) -> bytes:
    """Static int8 of `model`, calibrated on inputs [1, ...]; inputs and outputs stay float32."""
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe, recipe_manager
        from ai_edge_quantizer.utils.qsv_utils import min_max_update

        source = Path(scratch) / "float.tflite"
        source.write_bytes(model)
        quantiser = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
        for boundary in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            quantiser.update_quantization_recipe(".*", boundary, algorithm_key=recipe.AlgorithmName.NO_QUANTIZE)
        # Its own `calibrate` takes a moving average of the ranges, which cuts off what rare frames reach: on
        # MNIST that cost 0.5 points of accuracy.
        observer = calibrator.Calibrator(model, qsv_update_func=min_max_update)
        recipes = recipe_manager.RecipeManager()
        recipes.load_quantization_recipe(quantiser.get_quantization_recipe())
        observer.calibrate({SIGNATURE: [{INPUT: frame} for frame in calibration]}, recipes)
        return bytes(quantiser.quantize(observer.get_model_qsvs()).quantized_model)
