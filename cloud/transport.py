"""The seam to the broker: deliveries come in, replies go out, and an acknowledgement follows the commit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import gmqtt
from gmqtt.mqtt.handler import MQTTError
from gmqtt.storage import PersistentStorage

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

    __slots__ = ("acknowledged", "payload", "released", "topic")

    def __init__(self, topic: str, payload: bytes) -> None:
        self.topic = topic
        self.payload = payload
        self.acknowledged = asyncio.Event()
        self.released = asyncio.Event()


OnMessage = Callable[[Delivery], Awaitable[None]]


class Transport(Protocol):
    """What the pipeline needs of a broker. Delivery is at least once."""

    @property
    def connected(self) -> bool:
        """Whether messages can flow now."""

    async def start(self, on_message: OnMessage) -> None:
        """Connect in the background, and again whenever the connection is lost."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send with QoS 1; `TransportError` while there is no connection."""

    def acknowledge(self, delivery: Delivery) -> None:
        """Tell the broker that `delivery` is done."""

    async def unsubscribe(self) -> None:
        """Ask the broker for no more activations; the connection stays, for replies."""

    async def stop(self) -> None:
        """Disconnect. What is unacknowledged stays with the broker."""


class GmqttTransport:
    """MQTT 5 by gmqtt, with a new gmqtt client for each connection.

    A packet identifier means something on its own connection only. gmqtt's reconnecting would send the
    acknowledgement of an old delivery on the new connection, where the broker may have given its identifier to
    another message. With a client each, a late acknowledgement ends at a closed socket and the broker
    redelivers.
    """

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._endpoint = f"{config.host}:{config.port}"
        self._tls = _tls_context(config.tls) if config.tls else False
        self._connection: _Connection | None = None
        self._taking = True
        self._runner: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether messages can flow now."""
        return self._connection is not None

    async def start(self, on_message: OnMessage) -> None:
        """Connect in the background, and again whenever the connection is lost."""
        self._runner = asyncio.create_task(self._run(on_message))

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send with QoS 1, waiting while the broker's receive maximum is used up."""
        if self._connection is None:
            raise TransportError(f"{self._endpoint}: no connection, so {topic} was not sent.")
        await self._connection.publish(topic, payload)

    def acknowledge(self, delivery: Delivery) -> None:
        """Let the coroutine that holds `delivery` return, upon which gmqtt sends the PUBACK."""
        delivery.acknowledged.set()

    async def unsubscribe(self) -> None:
        """Ask the broker for no more activations; peers of the group get them."""
        self._taking = False
        if self._connection is not None:
            self._connection.unsubscribe(topics.every_activation(self._config.group))

    async def stop(self) -> None:
        """Disconnect. What is unacknowledged stays with the broker."""
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner

    async def _run(self, on_message: OnMessage) -> None:
        """Keep connected until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            connection = _Connection(self._config, self._tls, on_message)
            try:
                await connection.open()
                connection.subscribe(self._filters())
                self._connection = connection
                connection.opened.set()
                log.info("connected to the broker at %s", self._endpoint)
                backoff_s = FIRST_BACKOFF_S
                await connection.lost.wait()
                log.warning("lost the connection to the broker at %s", self._endpoint)
            except (OSError, TimeoutError, MQTTError) as error:
                log.warning("broker at %s: %s; trying again", self._endpoint, error or "no answer")
            finally:
                self._connection = None
                await connection.close()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads workers, no secret
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _filters(self) -> list[str]:
        activations = [topics.every_activation(self._config.group)] if self._taking else []
        return [*activations, topics.every_status()]


class _Client(gmqtt.Client):  # type: ignore[misc]  # gmqtt ships no types
    """gmqtt's client without its own reconnecting, for the reason that `GmqttTransport` gives."""

    async def reconnect(self, delay: bool = False) -> None:
        """Called by gmqtt when the connection is lost; `GmqttTransport` makes a new one."""


class _Connection:
    """One connection and the deliveries that came by it."""

    def __init__(self, config: BrokerConfig, tls: ssl.SSLContext | bool, on_message: OnMessage) -> None:
        self.opened = asyncio.Event()
        self.lost = asyncio.Event()
        self._config = config
        self._tls = tls
        self._on_message = on_message
        self._held: set[Delivery] = set()
        self._latest: Delivery | None = None
        self._sent = PersistentStorage()
        self._client = _Client(
            config.client_id,
            clean_session=config.session_expiry_s == 0,
            optimistic_acknowledgement=False,
            persistent_storage=self._sent,
            session_expiry_interval=config.session_expiry_s,
            receive_maximum=config.max_in_flight,
            maximum_packet_size=config.max_packet_bytes,
        )
        if config.username is not None:
            self._client.set_auth_credentials(config.username, config.password)
        self._client.on_message = self._receive
        self._client.on_disconnect = self._note_loss

    async def open(self) -> None:
        """Connect; raises OSError, TimeoutError or MQTTError."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._client.connect(self._config.host, self._config.port, ssl=self._tls)

    def subscribe(self, filters: list[str]) -> None:
        self._client.subscribe([gmqtt.Subscription(name, qos=1) for name in filters])

    def unsubscribe(self, name: str) -> None:
        self._client.unsubscribe(name)

    async def publish(self, topic: str, payload: bytes) -> None:
        while not self.lost.is_set():
            try:
                self._client.publish(topic, payload, qos=1)
            except OverflowError:  # noqa: PERF203  # the broker's receive maximum is used up
                await self._sent.wait_empty()
            else:
                return
        raise TransportError(f"{self._config.host}:{self._config.port}: connection lost, {topic} was not sent.")

    async def close(self) -> None:
        """Close the socket, then let go of what is held: its acknowledgements go nowhere."""
        self.opened.set()
        self.lost.set()
        try:
            await self._client.disconnect()
        except OSError as error:  # the socket is gone, however it ended
            log.debug("while disconnecting: %s", error)
        self._sent.clear()
        for delivery in self._held:
            delivery.acknowledged.set()

    async def _receive(
        self, _client: Any, topic: str | bytes, payload: bytes, _qos: int, _properties: Any
    ) -> int:
        """Called by gmqtt; it acknowledges with the reason code that this returns, and not before."""
        if isinstance(topic, bytes):  # gmqtt's way with a topic that is not UTF-8
            topic = topic.decode(errors="replace")
        delivery = Delivery(topic, payload)
        self._held.add(delivery)
        self._read_on_if_room()
        earlier, self._latest = self._latest, delivery
        try:
            await self.opened.wait()  # a kept session delivers before there is a way to reply
            await self._on_message(delivery)
            await delivery.acknowledged.wait()
            if earlier is not None:  # acknowledgements follow the order of arrival (MQTT-4.6.0-2)
                await earlier.released.wait()
        finally:
            delivery.released.set()
            self._held.discard(delivery)
            self._read_on_if_room()
        return 0

    def _read_on_if_room(self) -> None:
        """Stop reading the socket at twice the receive maximum.

        A broker should never exceed the maximum, but mosquitto does after it resumes a session. gmqtt has no
        public way to stop reading.
        """
        socket = self._client._connection._transport
        if len(self._held) >= 2 * self._config.max_in_flight:
            socket.pause_reading()
        elif not socket.is_closing():
            socket.resume_reading()

    def _note_loss(self, _client: Any, _packet: Any, _error: Any = None) -> None:
        self.lost.set()
        self._sent.clear()  # wakes whoever waits to publish


def _tls_context(config: TlsConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.cert is not None:
            context.load_cert_chain(config.cert, config.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"broker.tls: {error}. Give readable PEM files.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
