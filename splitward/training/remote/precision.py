"""How a tensor becomes the values of a message: float32, int8, or int8 within -7..7 for 4 bits.

One scale serves a released tensor: what a sealed client releases lies on an int8 grid already, so that int8 costs it
nothing but the last bit of a float. Gradients get a step for each frame. A frame that the network has right has a
gradient a hundred times smaller than one that it has wrong: with one step for both, the small ones, most of them in the
end, are rounded to nothing, and with them what tells the client's guard that they serve the task.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitward.training.remote.plan import Precision
from splitward.wire.tensor import dequantise
from splitward.wire.training import TrainingMessage

_REACH = {"int8": 127, "int4": 7}
_LEAST = float(np.finfo(np.float32).tiny)


class Stored(NamedTuple):
    """Values of a message, and the fields of `TrainingMessage` that say how they are to be read."""

    values: NDArray[np.generic]
    scale: float = 1.0
    nibbles: bool = False
    exponents: NDArray[np.uint8] | None = None

    @staticmethod
    def of(message: TrainingMessage) -> Stored:
        """The values that came in a message."""
        return Stored(message.values, message.scale, message.nibbles, message.exponents)

    def real(self) -> Tensor:
        """float32 values, in memory of their own: where they lie in a message, torch adds in another order."""
        real = np.array(dequantise(self.values, self.scale), np.float32)
        if self.exponents is not None:
            real = np.ldexp(real, -_on_rows(self.exponents.astype(np.int32), real))
        return torch.from_numpy(real)


def store(tensor: Tensor, precision: Precision, scale: float | None = None) -> Stored:
    """The tensor in a precision, with one step for all of it.

    Parameters
    ----------
    scale : float, optional
        Step of int8 values; by default the largest one becomes 127. 4 bits always span the largest one.
    """
    values: NDArray[Any] = tensor.detach().numpy()
    if precision == "float32":
        return Stored(np.ascontiguousarray(values, np.float32))
    reach = _REACH[precision]
    if scale is None or precision == "int4":
        scale = max(float(np.abs(values).max(initial=0.0)) / reach, _LEAST)
    scale = float(np.float32(scale))
    steps = np.rint(np.divide(values, scale, dtype=np.float64))
    return Stored(np.clip(steps, -reach, reach).astype(np.int8), scale, precision == "int4")


def store_rows(tensor: Tensor, precision: Precision) -> Stored:
    """The tensor [B, ...] in a precision, with a step for each row: the largest row's, halved as often as it fits."""
    if precision == "float32":
        return store(tensor, precision)
    values: NDArray[Any] = tensor.detach().numpy()
    largest = np.maximum(np.abs(values).reshape(len(values), -1).max(1).astype(np.float64), _LEAST)
    exponents = np.minimum(np.floor(np.log2(largest.max() / largest)), 126).astype(np.int32)
    scale = float(np.float32(largest.max() / _REACH[precision]))
    whole = store(torch.from_numpy(np.ldexp(values, _on_rows(exponents, values))), precision, scale)
    return whole._replace(exponents=exponents.astype(np.uint8))


def _on_rows(exponents: NDArray[np.int32], values: NDArray[Any]) -> NDArray[np.int32]:
    """As the values are shaped, to be broadcast over what follows the rows."""
    return exponents.reshape(-1, *(1,) * (values.ndim - 1))


class Feedback:
    """Error feedback: what rounding kept from the batch's mean is added to the next batch.

    Rounding errors belong to frames that come again an epoch later at best, so the error of each frame cannot be made
    up for. What they have in common, which would add up over the steps, can (our choice). Each row takes of it in
    proportion to its largest value: the same for all would turn the small ones around.

    Attributes
    ----------
    left : Tensor
        Mean error that is still to be made up for; a scalar 0 before the first batch.
    """

    def __init__(self) -> None:
        self.left = torch.zeros(())

    def store(self, tensor: Tensor, precision: Precision) -> Stored:
        """The tensor [B, ...] in a precision, with what is left of the batches before."""
        if precision == "float32":
            return store(tensor, precision)
        size = tensor.abs().flatten(1).amax(1)
        share = size / size.mean().clamp_min(_LEAST)
        stored = store_rows(tensor + share.view(-1, *(1,) * (tensor.ndim - 1)) * self.left, precision)
        self.left = self.left + (tensor - stored.real()).mean(0)
        return stored
