"""The law by which a bundle's activation is released. Without numpy, so that who only reads it stays small."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Annotated, Literal

import msgspec

SECRET_BYTES = 32
"""Length of the device's secret, which keys the noise."""
STEPS = 127
"""Steps of int8 on each side of 0."""
NOISE_REACH = 3.0
"""Standard deviations of the noise that the released range covers beyond the bound."""
_FLOAT32 = struct.Struct("<f")


class ReleaseLaw(msgspec.Struct, frozen=True):
    """How a bundle's activation is released; part of the signed manifest.

    Attributes
    ----------
    shape : tuple of int
        Shape of the activation, without a batch axis.
    dtype : "float32" or "int8"
        float32 releases the activation as it is (`none`, `psgl`); int8 seals it.
    bound : float
        The graph keeps every value within [-bound, bound] (int8 only).
    sigma : float
        Standard deviation of the noise, in the activation's units.
    steps : int
        Of the clean activation's grid, from 0 to the bound: 1 to 127. Few steps make one value of many that lie near
        each other, which then carry the same noise, and which no number of captures that round alike tells apart.
    """

    shape: tuple[int, ...]
    dtype: Literal["float32", "int8"]
    bound: float = 1.0
    sigma: float = 0.0
    steps: Annotated[int, msgspec.Meta(ge=1, le=STEPS)] = STEPS

    @property
    def grid(self) -> float:
        """Step of the grid on which the clean activation is keyed."""
        return self.bound / self.steps

    @property
    def scale(self) -> float:
        """Step of the released int8 values."""
        if self.dtype != "int8":
            return 1.0
        return _to_float32((self.bound + NOISE_REACH * self.sigma) / 127)


@lru_cache(16)
def _to_float32(real: float) -> float:
    """The nearest float32; a device asks for the same one at each frame."""
    return float(_FLOAT32.unpack(_FLOAT32.pack(real))[0])
