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
import math
import struct

import numpy as np
from numpy.typing import NDArray

from splitward.wire.law import NOISE_REACH as NOISE_REACH
from splitward.wire.law import SECRET_BYTES as SECRET_BYTES
from splitward.wire.law import ReleaseLaw as ReleaseLaw
from splitward.wire.tensor import quantise


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
    cryptographic stream, and the same on every version of numpy, whose own logarithm depends on the processor. A
    released tensor is so small that the C library's functions, one value at a time, are also the quicker way.
    """
    count = clean.size + clean.size % 2
    key = hmac.digest(secret, clean.tobytes(), "sha256")
    words = struct.unpack(f"<{count}Q", hashlib.shake_256(key).digest(8 * count))
    uniform = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    radius = [math.sqrt(-2.0 * math.log(one)) for one in uniform[: count // 2]]
    angle = [2.0 * math.pi * one for one in uniform[count // 2 :]]
    normal = [
        *(length * math.cos(one) for length, one in zip(radius, angle, strict=True)),
        *(length * math.sin(one) for length, one in zip(radius, angle, strict=True)),
    ]
    return np.array(normal[: clean.size]).reshape(clean.shape)
