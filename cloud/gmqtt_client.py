"""The connection by gmqtt, with a new gmqtt client each time.

gmqtt's own reconnecting would send the acknowledgement of an old delivery on the new connection, where the broker
may have given its identifier to another message. With a client each, a late acknowledgement ends at a closed
socket and the broker redelivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Sequence
from typing import Any

import gmqtt
from gmqtt.mqtt.handler import MQTTError
from gmqtt.storage import PersistentStorage

from cloud.config import BrokerConfig
from cloud.errors import TransportError
from cloud.transport import Delivery, Held, OnMessages

log = logging.getLogger(__name__)


class _Waiting(Delivery):
    """A delivery whose gmqtt coroutine waits to return, upon which gmqtt sends the PUBACK."""

    __slots__ = ("done", "released")

    def __init__(self, topic: str, payload: bytes, connection: GmqttConnection) -> None:
        super().__init__(topic, payload, connection)
        self.done = asyncio.Event()
        self.released = asyncio.Event()


class _Client(gmqtt.Client):  # type: ignore[misc]  # gmqtt ships no types
    """gmqtt's client without its own reconnecting."""

    async def reconnect(self, delay: bool = False) -> None:
        """Called by gmqtt when the connection is lost; `SteadyTransport` makes a new one."""


class GmqttConnection:
    """One connection and the deliveries that came by it."""

    def __init__(self, config: BrokerConfig, tls: ssl.SSLContext | None, on_messages: OnMessages) -> None:
        self.lost = asyncio.Event()
        self._opened = asyncio.Event()
        self._config = config
        self._tls = tls
        self._on_messages = on_messages
        self._held = Held(config)
        self._waiting: set[_Waiting] = set()
        self._latest: _Waiting | None = None
        self._outbox: asyncio.Queue[tuple[str, bytes, bool]] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self._sent = PersistentStorage()
        self._unsubscribed = asyncio.Event()
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
        self._client.on_unsubscribe = lambda *_: self._unsubscribed.set()

    async def open(self) -> None:
        """Connect; raises OSError, TimeoutError or TransportError."""
        try:
            await self._client.connect(self._config.host, self._config.port, ssl=self._tls or False)
        except MQTTError as error:
            raise TransportError(f"{self._config.host}:{self._config.port}: {error}.") from error
        self._sender = asyncio.create_task(self._send())

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe with QoS 1."""
        self._client.subscribe([gmqtt.Subscription(name, qos=1) for name in filters])
        self._opened.set()

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        """Send with QoS 1, or keep until the broker takes more."""
        if self._outbox.qsize() > 16 * self._config.max_in_flight:
            self._note_loss(None, None)  # it takes no replies: a new connection may
        self._outbox.put_nowait((topic, payload, retain))

    def acknowledge(self, delivery: Delivery) -> None:
        """Let the coroutine that holds `delivery` return."""
        assert isinstance(delivery, _Waiting)  # noqa: S101  # made by this connection
        delivery.done.set()

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing more comes by this filter."""
        self._client.unsubscribe(name)
        await self._unsubscribed.wait()

    async def close(self, *, end_session: bool) -> None:
        """Send what is kept, disconnect, and let go of what is held: its acknowledgements go nowhere."""
        if self._sender is not None:
            if not self.lost.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._outbox.join(), 5)
            self._sender.cancel()
        self._opened.set()
        self.lost.set()
        try:
            await self._client.disconnect(**({"session_expiry_interval": 0} if end_session else {}))
        except OSError as error:  # the socket is gone, however it ended
            log.debug("while disconnecting: %s", error)
        self._sent.clear()
        for delivery in self._waiting:
            delivery.done.set()

    async def _send(self) -> None:
        while True:
            topic, payload, retain = await self._outbox.get()
            while not self.lost.is_set():
                try:
                    self._client.publish(topic, payload, qos=1, retain=retain)
                except OverflowError:  # noqa: PERF203  # the broker's receive maximum is used up
                    await self._sent.wait_empty()
                else:
                    break
            self._outbox.task_done()

    async def _receive(
        self, _client: Any, topic: str | bytes, payload: bytes, _qos: int, _properties: Any
    ) -> int:
        """Called by gmqtt; it acknowledges with the reason code that this returns, and not before."""
        if isinstance(topic, bytes):  # gmqtt's way with a topic that is not UTF-8
            topic = topic.decode(errors="replace")
        delivery = _Waiting(topic, payload, self)
        self._waiting.add(delivery)
        counted = self._held.add(delivery)
        self._read_on_if_room()
        earlier, self._latest = self._latest, delivery
        try:
            await self._opened.wait()  # a kept session delivers before there is a way to reply
            if counted:
                self._on_messages([delivery])
                await delivery.done.wait()
            if earlier is not None:  # acknowledgements follow the order of arrival (MQTT-4.6.0-2)
                await earlier.released.wait()
        finally:
            delivery.released.set()
            self._waiting.discard(delivery)
            if counted:
                self._held.remove(delivery)
            self._read_on_if_room()
        return 0

    def _read_on_if_room(self) -> None:
        """Rest the socket while too much is in hand; gmqtt has no public way to stop reading."""
        socket = self._client._connection._transport
        if self._held.full:
            socket.pause_reading()
        elif not socket.is_closing():
            socket.resume_reading()

    def _note_loss(self, _client: Any, _packet: Any, _error: Any = None) -> None:
        self.lost.set()
        self._sent.clear()  # wakes whoever waits to publish
