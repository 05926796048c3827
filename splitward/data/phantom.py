"""Synthetic images that resemble mammograms: for demos and tests, never evidence of diagnostic value.

A breast outline against the chest wall, a bright parenchyma of low-frequency noise (mammographic texture falls
with about the third power of the spatial frequency: Burgess et al., Medical Physics 28:419, 2001) and,
in half of the images, one soft-edged mass. Everything beyond that spectrum is our choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitward.data.dataset import Dataset, split_images

TASKS = ("mass",)
DEFAULT_SIZE = 64
COUNT = 1200
_PER_PATIENT = 2
_POWER = 1.5  # of the amplitude; the power spectrum falls with twice that

Field = NDArray[np.float32]


def load(task: str, size: int | None, seed: int, count: int = COUNT) -> Dataset:
    """Make `count` phantoms, two per patient (left and right), split by patient."""
    side = size or DEFAULT_SIZE
    images, labels = draw_phantoms(count, side, seed)
    train, validation, test = split_images(images, labels, np.arange(count) // _PER_PATIENT, seed)
    return Dataset(
        name="synthetic-phantom",
        task=task,
        classes=("normal", "mass"),
        train=train,
        validation=validation,
        test=test,
        synthetic=True,
        licence="made by this program; no rights reserved",
        source=f"{count} synthetic phantoms at {side} x {side}, seed {seed}; no patient was ever imaged",
    )


def draw_phantoms(count: int, side: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw phantoms.

    Returns
    -------
    images : ndarray of uint8, [count, 1, side, side]
    labels : ndarray of int64, [count]
        0 normal, 1 with a mass.
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.meshgrid(*[np.linspace(0, 1, side, dtype=np.float32)] * 2, indexing="ij")
    labels = generator.permutation(np.arange(count) % 2)
    height, depth = _uniform(generator, 0.38, 0.48, count), _uniform(generator, 0.55, 0.85, count)
    # 1 at the middle of the chest wall, 0 on the skin.
    inside = 1 - ((rows - 0.5) / height) ** 2 - (columns / depth) ** 2
    tissue = 0.3 + 0.25 * np.clip(inside, 0, 1) + 0.13 * _texture(generator, count, side)
    radius = _uniform(generator, 0.07, 0.12, count)
    distance = np.hypot(
        rows - 0.5 - height * _uniform(generator, -0.45, 0.45, count),
        columns - depth * _uniform(generator, 0.25, 0.6, count),
    )
    mass = 0.3 / (1 + np.exp(np.minimum((distance - radius) / (0.15 * radius), 50)))
    tissue = tissue + labels[:, None, None] * mass
    skin = np.clip(inside / 0.06, 0, 1)
    shown = np.clip(tissue, 0, 1) * skin + generator.normal(0, 0.01, inside.shape)
    mirrored = np.arange(count) % _PER_PATIENT == 1
    shown[mirrored] = shown[mirrored, :, ::-1]
    return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)[:, None], labels


def _uniform(generator: np.random.Generator, low: float, high: float, count: int) -> Field:
    return generator.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _texture(generator: np.random.Generator, count: int, side: int) -> Field:
    """Noise whose amplitude falls with the frequency, zero mean and unit variance in each image."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1 / side) ** -_POWER, 0)
    spectrum = np.fft.rfft2(generator.normal(size=(count, side, side))) * amplitude
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return np.asarray(noise / np.maximum(noise.std((1, 2), keepdims=True), 1e-9), np.float32)
