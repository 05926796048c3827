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
