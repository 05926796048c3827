"""MQTT topics `splitward/v1/{site}/{device}/{kind}`, one function for each kind."""

from __future__ import annotations

from splitward.errors import WireError
from splitward.wire.names import NAME

ROOT = "splitward/v1"
KINDS = ("activation", "result", "status", "command", "bundle", "outcome", "train", "step")


def activation(site: str, device: str) -> str:
    """Device to cloud: released tensors."""
    return f"{ROOT}/{site}/{device}/activation"


def result(site: str, device: str) -> str:
    """Cloud to device: results and refusals."""
    return f"{ROOT}/{site}/{device}/result"


def status(site: str, device: str) -> str:
    """Device to cloud, retained: what the device is and does; its last will says offline."""
    return f"{ROOT}/{site}/{device}/status"


def command(site: str, device: str) -> str:
    """Cloud to device: operator's commands."""
    return f"{ROOT}/{site}/{device}/command"


def bundle(site: str, device: str) -> str:
    """Cloud to device, retained: announces the bundle that the device should run."""
    return f"{ROOT}/{site}/{device}/bundle"


def outcome(site: str, device: str) -> str:
    """Device to cloud: what became of a command or of an announced bundle."""
    return f"{ROOT}/{site}/{device}/outcome"


def train(site: str, device: str) -> str:
    """Device to cloud: what a client of a training asks."""
    return f"{ROOT}/{site}/{device}/train"


def step(site: str, device: str) -> str:
    """Cloud to device: what a training answers."""
    return f"{ROOT}/{site}/{device}/step"


def every_train() -> str:
    """Filter for what every client of a training asks."""
    return f"{ROOT}/+/+/train"


def every_activation(group: str) -> str:
    """Filter of the shared subscription by which the workers of `group` divide all activations."""
    return f"$share/{group}/{ROOT}/+/+/activation"


def every_status() -> str:
    """Filter for the status of every device."""
    return f"{ROOT}/+/+/status"


def every_outcome() -> str:
    """Filter for the outcomes of every device's orders."""
    return f"{ROOT}/+/+/outcome"


def parse(topic: str) -> tuple[str, str, str]:
    """Site, device and kind of a `topic`.

    Raises
    ------
    WireError
        The topic is not one of ours (`bad_topic`).
    """
    parts = topic.split("/")
    if len(parts) == 5 and "/".join(parts[:2]) == ROOT and parts[4] in KINDS:
        _, _, site, device, kind = parts
        if NAME.fullmatch(site) and NAME.fullmatch(device):
            return site, device, kind
    raise WireError("bad_topic", f"topic {topic!r} is not {ROOT}/SITE/DEVICE/KIND.")
