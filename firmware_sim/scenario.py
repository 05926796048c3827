"""Scenarios: what happens to a fleet, and when. From a TOML file, or drawn from a seed; the same seed, the same day."""

from __future__ import annotations

import random
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge.config import Count, Seconds, Span
from firmware_sim.fleet import Variant
from firmware_sim.proxy import Toxics

Kind = Literal[
    "kill_agent",
    "kill_releaser",
    "hang_releaser",
    "kill_broker",
    "kill_cloud",
    "disk_full",
    "slow_disk",
    "clock_jump",
    "cut",
    "half_open",
    "latency",
    "loss",
    "bandwidth",
    "kill_database",
]
AIMED: frozenset[Kind] = frozenset(
    {"kill_agent", "kill_releaser", "hang_releaser", "disk_full", "slow_disk", "clock_jump"}
)
"""What befalls one device; the rest befalls the network or the cloud."""
TOXIC: frozenset[Kind] = frozenset({"half_open", "latency", "loss", "bandwidth"})


class Event(Struct, frozen=True, kw_only=True):
    """One blow.

    Attributes
    ----------
    at_s : float
        Seconds since the start.
    at_request : int
        Of hospitals: not before the coordinator has taken so many requests, however fast the machine is.
    kind : str
        See `Kind`.
    device : int
        Number of the device, from 0, of a kind in `AIMED`.
    lasts_s : float
        How long it lasts: how long a broker or a cloud worker is away, a disk is full or slow, or a link is bad.
    value : float
        Hours of a clock's jump, forwards or back; milliseconds of latency, or that a disk takes for a flush; part
        that is lost; bytes a second.
    """

    at_s: Span
    kind: Kind
    at_request: int = 0
    device: int = 0
    lasts_s: Span = 0.0
    value: float = 0.0


class Counts(Struct, frozen=True, kw_only=True):
    """How many blows of each kind to draw."""

    kill_agent: int = 0
    kill_releaser: int = 0
    hang_releaser: int = 0
    kill_broker: int = 0
    kill_cloud: int = 0
    disk_full: int = 0
    slow_disk: int = 0
    clock_jump: int = 0
    cut: int = 0
    half_open: int = 0
    latency: int = 0
    loss: int = 0
    bandwidth: int = 0
    kill_database: int = 0


class Scenario(Struct, frozen=True, kw_only=True):
    """`scenario.toml`.

    Attributes
    ----------
    seed : int
        Draws the events of `counts`, and the links' jitter.
    devices, frames : int
        Frames in all, dealt out among the devices.
    duration_s : float
        The events fall within it. Then everything is healed.
    heal_s : float
        Longest time from then until every frame is answered.
    rate_hz : float
        Frames a second of each device.
    variants : tuple of str
        Backend and precision, given to the devices in turn.
    disk_bytes : int
        Size of each device's disk where one is to be full.
    memory_bytes : int
        Address space of each agent's process, as a small board would limit it; 0 for no limit.
    tls : bool
        Mutual TLS between devices, broker and cloud, as in a hospital: every cut is a new handshake.
    store : "sqlite" or "postgresql"
        Of the cloud. SQLite dies with the cloud's process; PostgreSQL can be killed alone.
    events : tuple of Event
        Beside the drawn ones.
    """

    name: str = "chaos"
    seed: int = 0
    devices: Annotated[int, Meta(ge=1, le=200)] = 5
    frames: Count = 500
    duration_s: Seconds = 60.0
    heal_s: Seconds = 300.0
    rate_hz: Span = 5.0
    variants: tuple[Variant, ...] = ("onnx-float32", "tflite-float32")
    disk_bytes: Annotated[int, Meta(ge=1 << 20)] = 6 << 20
    memory_bytes: Annotated[int, Meta(ge=0)] = 0
    tls: bool = True
    store: Literal["sqlite", "postgresql"] = "sqlite"
    counts: Counts = Counts()
    events: tuple[Event, ...] = ()


def plan(scenario: Scenario) -> list[Event]:
    """Every event of a scenario in the order of time."""
    draw = random.Random(scenario.seed)  # noqa: S311  # no secret
    drawn = [
        _draw(draw, kind, scenario)  # type: ignore[arg-type]  # the fields are the kinds
        for kind in Counts.__struct_fields__
        for _ in range(getattr(scenario.counts, kind))
    ]
    return sorted([*scenario.events, *drawn], key=lambda event: event.at_s)


def toxics_of(event: Event) -> Toxics:
    """How bad an event of the network makes a link; of the kinds in `TOXIC`."""
    bad = {
        "half_open": Toxics(half_open=True),
        "latency": Toxics(latency_ms=event.value, jitter_ms=event.value / 2),
        "loss": Toxics(loss=event.value),
        "bandwidth": Toxics(bytes_per_s=event.value),
    }
    return bad[event.kind]


def _draw(draw: random.Random, kind: Kind, scenario: Scenario) -> Event:
    # The first tenth is for getting started; what lasts ends within the duration.
    lasts_s = min(draw.uniform(*_LASTS_S.get(kind, (0.0, 0.0))), scenario.duration_s / 10)
    at_s = draw.uniform(scenario.duration_s / 10, scenario.duration_s - lasts_s)
    value = draw.uniform(*_VALUES.get(kind, (0.0, 0.0)))
    if kind == "clock_jump":
        value *= draw.choice((-1, 1))
    return Event(at_s=at_s, kind=kind, device=draw.randrange(scenario.devices), lasts_s=lasts_s, value=value)


_LASTS_S: dict[Kind, tuple[float, float]] = {
    "kill_broker": (0.5, 8.0),
    "kill_cloud": (0.5, 8.0),
    "kill_database": (0.5, 8.0),
    "disk_full": (10.0, 40.0),
    "slow_disk": (10.0, 40.0),
    "half_open": (5.0, 60.0),
    "latency": (5.0, 30.0),
    "loss": (5.0, 30.0),
    "bandwidth": (5.0, 30.0),
}
_VALUES: dict[Kind, tuple[float, float]] = {
    "slow_disk": (50.0, 1000.0),
    "clock_jump": (1.0, 30.0),
    "latency": (50.0, 800.0),
    "loss": (0.02, 0.3),
    "bandwidth": (500.0, 5000.0),
}
