"""The built image in an emulated machine, against a broker with mutual TLS and the cloud on this one."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firmware_sim.arm64.stand import Stand, open_stand
from firmware_sim.arm64.trial import DEVICE, open_machine, serve_folder, sign_again
from splitward.image.disk import partition_offset
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.server import server_card_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
FIRST_ACK_S = 400.0
"""Not a claim of speed: emulation on a busy machine. The figures are those of docs/results/arm64.json."""


@pytest.fixture
def newer(tmp_path: Path, model: Any) -> Path:
    """A bundle that the image does not carry."""
    return sign_again(model.bundle, model.key, tmp_path / "newer.bundle")


@pytest.fixture
def stand(tmp_path: Path, model: Any, newer: Path) -> Iterator[Stand]:
    """Broker with mutual TLS and the cloud, at which one device is to enrol."""
    cards = [model.card, server_card_path(newer)]
    with open_stand(tmp_path / "stand", DEVICE, cards, model.trusted_key) as opened:
        yield opened


def test_it_publishes_a_hundred_frames_through_a_power_cut_amid_a_bundle_update(
    tmp_path: Path, images: Any, stand: Stand, model: Any, newer: Path
) -> None:
    assert stand.listener is not None
    listener, draw = stand.listener, random.Random(6)
    goal_model = read_bundle(newer, read_trusted_key(model.trusted_key)).model.hex()
    stand.upload(newer)
    with open_machine("virt", images.first, stand, model.images[:100], tmp_path, rate_hz=5) as device:
        device.wait(lambda: listener.answered(DEVICE) >= 5, FIRST_ACK_S, "the first result")
        # In the middle of spooling and publishing: more is captured than is answered.
        goal = draw.randint(10, 40)  # the cut comes at most 5 s later: before the last of 20 s of frames
        device.wait(lambda: len(stand.stored()) >= goal, FIRST_ACK_S, f"result {goal}")
        assert listener.model(DEVICE) != goal_model
        stand.roll_out(goal_model)
        time.sleep(draw.uniform(1.5, 4.0))  # an order is sent within a second, and carried out at once
        device.cut_power()
        before = stand.stored()
        device.start()
        device.wait(lambda: listener.model(DEVICE) == goal_model, 2 * FIRST_ACK_S, "the newer bundle")
        device.wait(lambda: len(stand.stored()) >= 100, FIRST_ACK_S, "the last result")
        device.wait(lambda: listener.is_idle(DEVICE), FIRST_ACK_S, "an empty spool")
        serial = device.read_serial()
    after = stand.stored()
    assert before < after
    assert len(after) == 100, "a frame came twice, or one too many"
    assert listener.results(DEVICE) >= after
    assert "growing the data partition" in serial
    assert serial.count("growing the data partition") == 1
    assert "site.toml applied" in serial
    assert serial.count(f"enrolled as {DEVICE}") == 1
    assert "Kernel panic" not in serial


def test_it_updates_itself_and_a_broken_slot_gives_way(
    tmp_path: Path, images: Any, stand: Stand, model: Any
) -> None:
    assert stand.listener is not None
    listener = stand.listener
    with (
        serve_folder(images.updates, stand.folder / "cloud.pem") as port,
        open_machine("uefi", images.first, stand, model.images[:20], tmp_path, update_port=port) as device,
    ):
        device.wait(lambda: "is fetched; installing" in device.read_serial(), FIRST_ACK_S, "the update")
        device.wait(
            lambda: "slot b has checked in and is kept" in device.read_serial(), 2 * FIRST_ACK_S, "slot b"
        )
        device.stop()
        # The card wears out under slot b.
        where = partition_offset(3)
        subprocess.run(
            ["qemu-io", "-c", f"write -P 0 {where} 1M", str(device.card.path)], check=True, capture_output=True
        )
        said = len(device.read_serial())
        listener.forget()
        device.start()
        device.wait(
            lambda: "slot b holds no root" in device.read_serial()[said:], FIRST_ACK_S, "the broken slot's end"
        )
        device.wait(lambda: listener.is_online(DEVICE), FIRST_ACK_S, "slot a")
        assert len(stand.stored()) == 20
