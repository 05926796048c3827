"""The seam to the broker: deliveries come in, replies go out, and an acknowledgement follows the commit.

`SteadyTransport` keeps one connection after another, each with the deliveries that came by it. `cloud.mqtt5_client` has
the service's own connection; the benchmarks put another client's in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from cloud.config import BrokerConfig, TlsConfig
from cloud.errors import TransportError
from splitward.errors import ConfigError
from splitward.wire import topics

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0


class Delivery:
    """One message from the broker; it is redelivered until `Transport.acknowledge` is called with it."""

    __slots__ = ("acknowledged", "connection", "payload", "topic")

    def __init__(self, topic: str, payload: bytes, connection: Connection | None = None) -> None:
        self.topic = topic
        self.payload = payload
        self.connection = connection
        self.acknowledged = False


OnMessages = Callable[[Sequence[Delivery]], None]


class Transport(Protocol):
    """What the pipeline needs of a broker. Delivery is at least once."""

    @property
    def connected(self) -> bool:
        """Whether messages can flow now."""

    async def start(self, on_messages: OnMessages) -> None:
        """Connect in the background, and again whenever the connection is lost."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send with QoS 1, later if the broker is busy; `TransportError` while there is no connection."""

    def acknowledge(self, delivery: Delivery) -> None:
        """Tell the broker that `delivery` is done; in vain when its connection is gone."""

    async def unsubscribe(self) -> None:
        """Ask the broker for no more activations; the connection stays, for replies."""

    async def stop(self) -> None:
        """Disconnect, and end the session if `unsubscribe` came before: peers get what is left."""


class Connection(Protocol):
    """One connection to the broker. A packet identifier means something on its own connection only, so an
    acknowledgement goes by the connection that brought the delivery, or nowhere."""

    lost: asyncio.Event

    async def open(self) -> None:
        """Connect; raises OSError, TimeoutError, ConfigError or TransportError."""

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe with QoS 1; `TransportError` when the broker refuses."""

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        """Send with QoS 1, or keep until the broker takes more."""

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge it, in the order of arrival (MQTT-4.6.0-2)."""

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing more comes by this filter."""

    async def close(self, *, end_session: bool) -> None:
        """Send what is kept, disconnect, and let go of what is held."""


class Held:
    """How much a connection holds unacknowledged, in all and by topic: what bounds the service's memory."""

    def __init__(self, config: BrokerConfig) -> None:
        # A broker should never exceed the receive maximum, but mosquitto does after it resumes a session.
        self._max_messages = 2 * config.max_in_flight
        self._max_bytes = config.max_held_bytes
        self._max_by_topic = config.max_in_flight_per_device
        self._by_topic: Counter[str] = Counter()
        self._messages = 0
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether the socket should rest."""
        return self._messages >= self._max_messages or self._bytes >= self._max_bytes

    def add(self, delivery: Delivery) -> bool:
        """Count `delivery`; False, and it is not counted, when its device has its fill in hand already."""
        if self._by_topic[delivery.topic] >= self._max_by_topic:
            return False
        self._by_topic[delivery.topic] += 1
        self._messages += 1
        self._bytes += len(delivery.payload)
        return True

    def remove(self, delivery: Delivery) -> None:
        """It was acknowledged."""
        self._messages -= 1
        self._bytes -= len(delivery.payload)
        if self._by_topic[delivery.topic] == 1:
            del self._by_topic[delivery.topic]
        else:
            self._by_topic[delivery.topic] -= 1


class SteadyTransport:
    """Keeps a connection, made by `connect` anew whenever the last one is lost."""

    def __init__(self, config: BrokerConfig, connect: Callable[[OnMessages], Connection]) -> None:
        self._endpoint = f"{config.host}:{config.port}"
        self._group = config.group
        self._connect = connect
        self._connection: Connection | None = None
        self._taking = True
        self._runner: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether messages can flow now."""
        return self._connection is not None and not self._connection.lost.is_set()

    async def start(self, on_messages: OnMessages) -> None:
        """Connect in the background, and again whenever the connection is lost."""
        self._runner = asyncio.create_task(self._run(on_messages))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send with QoS 1, later if the broker is busy."""
        connection = self._connection
        if connection is None or connection.lost.is_set():
            raise TransportError(f"{self._endpoint}: no connection, so {topic} was not sent.")
        connection.publish(topic, payload, retain)

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge by the connection that brought it."""
        delivery.acknowledged = True
        if delivery.connection is not None:
            delivery.connection.acknowledge(delivery)

    async def unsubscribe(self) -> None:
        """Ask the broker for no more activations; peers of the group get them."""
        self._taking = False
        if self._connection is not None:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._connection.unsubscribe(topics.every_activation(self._group))
            except (TimeoutError, TransportError) as error:
                log.warning("%s: unsubscribing: %s", self._endpoint, error or "no answer")

    async def stop(self) -> None:
        """Disconnect, and end the session after `unsubscribe`."""
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner

    async def _run(self, on_messages: OnMessages) -> None:
        """Keep connected until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            connection = self._connect(on_messages)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await connection.open()
                self._connection = connection  # a kept session delivers before it subscribes again
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await connection.subscribe(self._filters())
                log.info("connected to the broker at %s", self._endpoint)
                backoff_s = FIRST_BACKOFF_S
                await connection.lost.wait()
                log.warning("lost the connection to the broker at %s", self._endpoint)
            except (OSError, TimeoutError, TransportError, ConfigError) as error:
                log.warning("broker at %s: %s; trying again", self._endpoint, error or "no answer")
            finally:
                self._connection = None
                await connection.close(end_session=not self._taking)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads workers, no secret
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _filters(self) -> list[str]:
        activations = [topics.every_activation(self._group)] if self._taking else []
        return [*activations, topics.every_status(), topics.every_outcome()]


def open_transport(config: BrokerConfig) -> SteadyTransport:
    """Transport to the configured broker; `ConfigError` when its TLS files cannot be used."""
    from cloud.mqtt5_client import Mqtt5Connection

    if config.tls:
        tls_context(config.tls)
    return SteadyTransport(config, lambda on_messages: Mqtt5Connection(config, on_messages))


def tls_context(config: TlsConfig) -> ssl.SSLContext:
    """Context of TLS 1.2 or newer, with the worker's certificate if it has one; `ConfigError` if unreadable."""
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.cert is not None:
            context.load_cert_chain(config.cert, config.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"broker.tls: {error}. Give readable PEM files.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
