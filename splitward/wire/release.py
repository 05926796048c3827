"""The last step before the network: from the bounded activation to the released tensor (method.md, section 4).

`released = quantise(bounded + sigma * noise)`. The graph bounds; this adds the noise, outside the graph,
where it can be keyed. The noise is a function of the device's secret and of the activation itself, so the same
frame sent again carries the same noise and averaging repeats gains an attacker nothing.

Our choice: the key covers the activation rounded to the int8 grid of its bound, not its floats. Two runtimes,
or one runtime with another number of threads, differ in the last bit of a float, and must not draw fresh noise.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from splitward.wire.tensor import quantise

SECRET_BYTES = 32
NOISE_REACH = 3.0
"""Standard deviations of the noise that the released range covers beyond the bound."""


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
    """

    shape: tuple[int, ...]
    dtype: Literal["float32", "int8"]
    bound: float = 1.0
    sigma: float = 0.0

    @property
    def grid(self) -> float:
        """Step of the grid on which the clean activation is keyed."""
        return self.bound / 127

    @property
    def scale(self) -> float:
        """Step of the released int8 values."""
        return float(np.float32((self.bound + NOISE_REACH * self.sigma) / 127)) if self.dtype == "int8" else 1.0


def release(activation: NDArray[np.float32], law: ReleaseLaw, secret: bytes) -> NDArray[np.generic]:
    """Released tensor of one frame: float32 as it is, or sealed int8.

    Parameters
    ----------
    activation : ndarray, float32, `law.shape`
    secret : bytes
        The device's own `SECRET_BYTES`; never leaves the device.
    """
    if law.dtype == "float32":
        return activation
    clean = quantise(activation, law.grid)
    noisy = clean * law.grid
    if law.sigma:
        noisy = noisy + law.sigma * keyed_noise(secret, clean)
    return quantise(noisy, law.scale)


def keyed_noise(secret: bytes, clean: NDArray[np.int8]) -> NDArray[np.float64]:
    """Standard normal noise, shaped as `clean`, that only the holder of `secret` can predict.

    SHAKE-256 stretches HMAC-SHA256(secret, clean) into uniforms, Box and Muller turn them into normals: a
    cryptographic stream, and the same on every version of numpy.
    """
    count = clean.size + clean.size % 2
    key = hmac.digest(secret, clean.tobytes(), "sha256")
    words = np.frombuffer(hashlib.shake_256(key).digest(8 * count), dtype="<u8")
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[: count // 2]))
    angle = 2.0 * np.pi * uniform[count // 2 :]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return normal[: clean.size].reshape(clean.shape)
