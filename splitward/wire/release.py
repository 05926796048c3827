"""The last step before the network: from the bounded activation to the released tensor (docs/method.md, section 4).

`released = quantise(round(bounded) + sigma * noise)`. The graph bounds; this rounds to the law's grid and adds the
noise, outside the graph, where it can be keyed. The noise is a function of the device's secret, of the law, and of the
activation itself, so the same frame sent again carries the same noise and averaging repeats gains an attacker nothing.
Under another law it is other noise: the same noise at two sigmas would cancel out, and give the activation away.

Our choice: the key covers the activation rounded to the law's grid, not its floats. Two runtimes,
or one runtime with another number of threads, differ in the last bit of a float, and must not draw fresh noise.
"""

from __future__ import annotations

import math
import struct
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from splitward.wire.law import NOISE_REACH as NOISE_REACH
from splitward.wire.law import SECRET_BYTES as SECRET_BYTES
from splitward.wire.law import STEPS
from splitward.wire.law import ReleaseLaw as ReleaseLaw


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
    grid = law.grid
    clean = _steps(activation.ravel().tolist(), grid)
    noisy = [step * grid for step in clean]
    if law.sigma:
        noise = _noise(secret, struct.pack(f"{len(clean)}b", *clean), law)
        noisy = [real + law.sigma * one for real, one in zip(noisy, noise, strict=True)]
    return np.array(_steps(noisy, law.scale), np.int8).reshape(activation.shape)


def keyed_noise(secret: bytes, clean: NDArray[np.int8], law: ReleaseLaw) -> NDArray[np.float64]:
    """Standard normal noise, shaped as `clean`, that only the holder of `secret` can predict.

    BLAKE2b (RFC 7693) keyed by the secret, with the law's bound and sigma as its personalisation and its steps in the
    salt, makes of `clean` the key of its `normals`.
    """
    return np.array(_noise(secret, clean.tobytes(), law)).reshape(clean.shape)


def normals(key: bytes, count: int) -> list[float]:
    """Standard normal numbers that only the holder of `key` can predict.

    BLAKE2b keyed by `key` stretches a counter into uniforms, and Box and Muller turn them into normals: a cryptographic
    stream, and the same on every version of numpy, whose own logarithm depends on the processor.
    """
    half = (count + 1) // 2
    blocks = (2 * half + 7) // 8
    stream = b"".join([blake2b(number.to_bytes(8, "little"), key=key).digest() for number in range(blocks)])
    uniform = [((word >> 11) + 0.5) * 2.0**-53 for word in struct.unpack(f"<{8 * blocks}Q", stream)]
    near, far = [], []
    for first, second in zip(uniform[:half], uniform[half : 2 * half], strict=True):
        radius, angle = math.sqrt(-2.0 * math.log(first)), 2.0 * math.pi * second
        near.append(radius * math.cos(angle))
        far.append(radius * math.sin(angle))
    return (near + far)[:count]


def _steps(real: list[float], scale: float) -> list[int]:
    """As `quantise`: a device comes here with cold caches, where numpy takes longer for a frame's few values."""
    steps = []
    for one in real:
        step = round(one / scale)
        steps.append(step if -127 <= step <= 127 else 127 if step > 0 else -127)
    return steps


def _noise(secret: bytes, clean: bytes, law: ReleaseLaw) -> list[float]:
    person, salt = struct.pack("<2d", law.bound, law.sigma), bytes((STEPS - law.steps,))
    return normals(blake2b(clean, key=secret, salt=salt, person=person).digest(), len(clean))
