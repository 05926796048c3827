"""How a tensor becomes the values of a message: float32, int8, or int8 within -7..7 for 4 bits.

One scale serves the whole message. What a sealed client releases lies on an int8 grid already, so that int8 costs it
nothing but the last bit of a float.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitward.training.remote.plan import Precision
from splitward.wire.tensor import dequantise

_REACH = {"int8": 127, "int4": 7}
_LEAST = float(np.finfo(np.float32).tiny)


class Stored(NamedTuple):
    """Values of a message with their scale; `nibbles` where two go to a byte."""

    values: NDArray[np.generic]
    scale: float = 1.0
    nibbles: bool = False

    def real(self) -> Tensor:
        """float32 values, in memory of their own: where they lie in a message, torch adds in another order."""
        return torch.from_numpy(np.array(dequantise(self.values, self.scale), np.float32))


def store(tensor: Tensor, precision: Precision, scale: float | None = None) -> Stored:
    """The tensor in a precision.

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


class Feedback:
    """Error feedback: what rounding kept from the batch's mean is added to the next batch.

    Rounding errors belong to frames that come again an epoch later at best, so the error of each frame cannot be made
    up for. What they have in common, which would add up over the steps, can (our choice).

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
        wanted = tensor + self.left
        stored = store(wanted, precision)
        self.left = (wanted - stored.real()).mean(0)
        return stored
