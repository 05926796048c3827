"""What the emulated device is made of: a bundle trained on real images, an arm64 root, images of the card.

Each is made once for a session of tests. Without root, Debian's mirror or the emulators the tests skip and say so.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.exporter import export_run
from firmware_sim.arm64 import machine, user
from splitward.data import Dataset, open_dataset
from splitward.data.dataset import Split
from splitward.errors import DataError, SplitwardError
from splitward.image.build import ImageSettings, build_image
from splitward.image.cli import DEFAULT_CACHE
from splitward.image.debian import find_mirror
from splitward.image.keys import create_update_key
from splitward.image.root import build_base
from splitward.method.split import SplitNetwork
from splitward.training.loop import train
from splitward.training.settings import RunSettings, split_settings
from splitward.wire.bundle import create_signing_key, public_key_path
from splitward.wire.server import server_card_path

TRAINING_IMAGES = 20_000
"""Enough for an accuracy over 0.9, which is all that these tests need."""


@dataclass(frozen=True)
class Model:
    """A bundle of a network trained on MNIST, its server half, and test images that it has not seen."""

    bundle: Path
    key: Path
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    network: SplitNetwork

    @property
    def trusted_key(self) -> Path:
        return public_key_path(self.key)

    @property
    def card(self) -> Path:
        return server_card_path(self.bundle)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One epoch on part of MNIST."""
    try:
        dataset = open_dataset("mnist")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("model")
    whole = dataset.train
    few = Split(*(rows[:TRAINING_IMAGES] for rows in (whole.images, whole.labels, whole.patients)))
    small: Dataset = replace(dataset, train=few)
    settings = RunSettings("mnist", None, None, split_settings(small, "sealed"), epochs=1)
    run = train(small, settings, folder / "run", progress=False)
    key = create_signing_key(folder / "signing.key")
    export_run(run, small, folder / "mnist.bundle", key)
    images, labels = dataset.test.images[:1000, 0], dataset.test.labels[:1000]
    return Model(
        folder / "mnist.bundle", folder / "signing.key", images.astype(np.uint8), labels, run.load_network()
    )


@pytest.fixture(scope="session")
def mirror() -> str:
    """A Debian mirror."""
    try:
        return find_mirror()
    except SplitwardError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def emulated_root(tmp_path_factory: pytest.TempPathFactory, mirror: str) -> Path:
    """Debian's Python with the device's wheels and the agent, to run under qemu-user."""
    missing = user.missing_tools()
    if missing is not None:
        pytest.skip(f"arm64 programs cannot be emulated: {missing}")
    root = tmp_path_factory.mktemp("emulated") / "root"
    build_base(root, cache(), mirror, with_test=True, with_agent=True)
    return root


@dataclass(frozen=True)
class Images:
    """Images of the card, builds 1 and 2, and the update to build 2 beside it."""

    settings: ImageSettings
    first: Path
    second: Path

    @property
    def updates(self) -> Path:
        return self.second.parent


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, mirror: str, model: Model) -> Images:
    """Both images for `virt`."""
    missing = machine.missing_tools() or (None if os.geteuid() == 0 else "root, which owns the image's files")
    for program, package in (("mksquashfs", "squashfs-tools"), ("rauc", "rauc"), ("zstd", "zstd")):
        if missing is None and shutil.which(program) is None:
            missing = f"{program}: apt install {package}"
    if missing is not None:
        pytest.skip(f"images cannot be built or started: {missing}")
    folder = tmp_path_factory.mktemp("images")
    key, certificate = create_update_key(folder / "keys")
    (folder / "site.toml").write_text("# replaced on the card\n")
    settings = ImageSettings(
        board="virt",
        site=folder / "site.toml",
        bundle=model.bundle,
        signing_key=model.key,
        out=folder / "1" / "edge.img.zst",
        cache=cache(),
        update_certificate=certificate,
        build=1,
        mirror=mirror,
    )
    first = build_image(settings, print)
    newer = replace(settings, out=folder / "2" / "edge.img.zst", update_key=key, build=2)
    second = build_image(newer, print)
    return Images(settings, first, second)


def cache() -> Path:
    """Where packages and wheels are kept between runs."""
    return DEFAULT_CACHE.expanduser()
