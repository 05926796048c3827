"""A thin asyncio client of MQTT 5: the packets are mqtt5's, the connection and its bounds are ours.

It reads as many packets as a chunk of the socket holds and hands them on together, and writes replies and
acknowledgements of one turn of the event loop at once. One connection is one object.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import cast

import mqtt5

from cloud.config import BrokerConfig
from cloud.errors import TransportError
from cloud.transport import Delivery, Held, OnMessages, tls_context

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 30
CLOSE_TIMEOUT_S = 5.0
LAST_IDENTIFIER = 65_535
_GRANTED = (
    mqtt5.SubAckReasonCode.GRANTED_QOS_AT_MOST_ONCE,
    mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE,
    mqtt5.SubAckReasonCode.GRANTED_QOS_EXACTLY_ONCE,
)
_PUBACK = b"\x40\x02"  # its two bytes of identifier follow: success needs no more


class _Publish(Delivery):
    """A delivery and the identifier by which it is acknowledged; None for QoS 0."""

    __slots__ = ("counted", "identifier")

    def __init__(self, packet: mqtt5.PublishPacket, connection: Mqtt5Connection) -> None:
        super().__init__(packet.topic, packet.payload, connection)
        self.identifier = packet.packet_id
        self.counted = True


class Mqtt5Connection(asyncio.Protocol):
    """One connection and the deliveries that came by it."""

    def __init__(self, config: BrokerConfig, on_messages: OnMessages) -> None:
        self.lost = asyncio.Event()
        self._config = config
        self._on_messages = on_messages
        self._endpoint = f"{config.host}:{config.port}"
        self._socket: asyncio.Transport | None = None
        self._unread = b""
        self._held = Held(config)
        self._order: deque[_Publish] = deque()
        self._outbox: deque[tuple[str, bytes, bool]] = deque()
        self._max_outbox = 16 * config.max_in_flight
        self._unwritten: list[bytes] = []
        self._window = 0
        """Publishes that the broker takes before it acknowledges one."""
        self._sent: set[int] = set()
        self._identifier = 0
        self._answers: dict[int, asyncio.Future[mqtt5.SubAckPacket | mqtt5.UnsubAckPacket]] = {}
        self._welcome: asyncio.Future[mqtt5.ConnAckPacket] | None = None
        self._settled = asyncio.Event()
        self._settled.set()
        self._heard_at = 0.0
        self._pinger: asyncio.TimerHandle | None = None
        self._paused = self._jammed = False

    # --- what the transport asks -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, with the certificate that lies there now.

        Raises OSError, TimeoutError, ConfigError or TransportError.
        """
        loop, config = asyncio.get_running_loop(), self._config
        self._welcome = loop.create_future()
        tls = tls_context(config.tls) if config.tls else None
        await loop.create_connection(lambda: self, config.host, config.port, ssl=tls)
        password = None if config.password is None else config.password.encode()
        self._write(
            mqtt5.ConnectPacket(
                config.client_id,
                username=config.username,
                password=password,
                clean_start=config.session_expiry_s == 0,
                session_expiry_interval=config.session_expiry_s,
                keep_alive=KEEP_ALIVE_S,
                receive_max=config.max_in_flight,
                max_packet_size=config.max_packet_bytes,
            ).write()
        )
        welcome = await self._welcome
        if welcome.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
            raise TransportError(
                f"{self._endpoint} refuses {config.client_id}: {welcome.reason_code}. "
                "Check the user, the certificate and the broker's log."
            )
        self._window = welcome.receive_max
        self._heard_at = loop.time()
        self._pinger = loop.call_later(KEEP_ALIVE_S / 2, self._keep_alive)

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe with QoS 1; `TransportError` when the broker refuses."""
        wanted = [mqtt5.TopicFilter(name, max_qos=mqtt5.QoS.AT_LEAST_ONCE) for name in filters]
        identifier = self._next_identifier()
        answer = await self._ask(identifier, mqtt5.SubscribePacket(identifier, wanted).write())
        refused = [
            name for name, code in zip(filters, answer.reason_codes, strict=True) if code not in _GRANTED
        ]
        if refused:
            raise TransportError(f"{self._endpoint} refuses the subscription to {', '.join(refused)}.")

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        """Send with QoS 1, or keep until the broker takes more."""
        self._outbox.append((topic, payload, retain))
        self._settled.clear()
        self._drain_outbox()

    def acknowledge(self, delivery: Delivery) -> None:  # noqa: ARG002  # the oldest go first
        """Acknowledge what of the oldest deliveries is done."""
        order, held = self._order, self._held
        while order and order[0].acknowledged:
            done = order.popleft()
            if done.counted:
                held.remove(done)
            if done.identifier is not None:
                self._write(_PUBACK + done.identifier.to_bytes(2, "big"))
        self._read_on_if_room()

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing more comes by this filter."""
        identifier = self._next_identifier()
        await self._ask(identifier, mqtt5.UnsubscribePacket(identifier, [name]).write())

    async def close(self, *, end_session: bool) -> None:
        """Send what is kept, disconnect, and let go of what is held."""
        if self._pinger is not None:
            self._pinger.cancel()
        if self._socket is None:
            return
        if not self.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._settled.wait()
            expiry_s = 0 if end_session else None
            self._write(mqtt5.DisconnectPacket(session_expiry_interval=expiry_s).write())
            self._flush()
        self._socket.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.lost.wait()
        self._socket.abort()
        self._order.clear()

    # --- what asyncio calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._socket = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone: whoever waits for an answer gets an error."""
        error = TransportError(f"{self._endpoint}: connection lost{f': {exc}' if exc else ''}.")
        self.lost.set()
        self._settled.set()
        for waiting in [self._welcome, *self._answers.values()]:
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # nobody may be waiting any more
        self._outbox.clear()
        self._unwritten.clear()

    def data_received(self, data: bytes) -> None:
        """Take every whole packet; publishes go on together."""
        self._heard_at = asyncio.get_running_loop().time()
        unread = self._unread + data if self._unread else data
        view, at, arrived = memoryview(unread), 0, list[Delivery]()
        try:
            while True:
                packet, size = mqtt5.read(view[at:] if at else view)
                at += size
                if type(packet) is mqtt5.PublishPacket:
                    self._take(packet, arrived)
                else:
                    self._handle(packet)
        except IndexError:  # the next packet is not whole yet
            self._unread = bytes(view[at:])
        except ValueError as error:
            self._drop(f"sent what is no MQTT: {error}")
            return
        if len(self._unread) > self._config.max_packet_bytes + 5:
            self._drop("sends a larger packet than it was asked to")
            return
        if arrived:
            self._on_messages(arrived)
            self._read_on_if_room()

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        self._jammed = True

    def resume_writing(self) -> None:
        """It has room again."""
        self._jammed = False
        self._drain_outbox()

    # --- packets ---------------------------------------------------------------------------------------------

    def _take(self, packet: mqtt5.PublishPacket, arrived: list[Delivery]) -> None:
        delivery = _Publish(packet, self)
        self._order.append(delivery)
        if self._held.add(delivery):
            arrived.append(delivery)
        else:
            # A device sends again what gets no result: this only puts off what one device sends too fast.
            delivery.counted, delivery.acknowledged, delivery.payload = False, True, b""
            self.acknowledge(delivery)

    def _handle(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.PubAckPacket):
            self._sent.discard(packet.packet_id)
            self._drain_outbox()
        elif isinstance(packet, mqtt5.ConnAckPacket):
            if self._welcome is not None and not self._welcome.done():
                self._welcome.set_result(packet)
        elif isinstance(packet, (mqtt5.SubAckPacket, mqtt5.UnsubAckPacket)):
            waiting = self._answers.pop(packet.packet_id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(packet)
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._drop(f"disconnects: {packet.reason_code}")

    def _drain_outbox(self) -> None:
        """Send of the outbox what the broker's window and the socket take."""
        while self._outbox and len(self._sent) < self._window and not self._jammed:
            topic, payload, retain = self._outbox.popleft()
            identifier = self._next_identifier()
            self._sent.add(identifier)
            packet = mqtt5.PublishPacket(
                topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=identifier, retain=retain
            )
            self._write(packet.write())
        if not self._outbox and not self._sent:
            self._settled.set()
        if len(self._outbox) > self._max_outbox:
            self._drop("acknowledges no replies")

    def _read_on_if_room(self) -> None:
        """Rest the socket while too much is in hand."""
        if self._socket is None or self._socket.is_closing() or self._held.full == self._paused:
            return
        self._paused = self._held.full
        if self._paused:
            self._socket.pause_reading()
        else:
            self._socket.resume_reading()

    def _next_identifier(self) -> int:
        while True:
            self._identifier = self._identifier % LAST_IDENTIFIER + 1
            if self._identifier not in self._sent and self._identifier not in self._answers:
                return self._identifier

    async def _ask(self, identifier: int, packet: bytes) -> mqtt5.SubAckPacket | mqtt5.UnsubAckPacket:
        self._answers[identifier] = asyncio.get_running_loop().create_future()
        self._write(packet)
        return await self._answers[identifier]

    def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._paused and loop.time() - self._heard_at > 1.5 * KEEP_ALIVE_S:
            self._drop("has been silent for too long")
            return
        self._write(mqtt5.PingReqPacket().write())
        self._pinger = loop.call_later(KEEP_ALIVE_S / 2, self._keep_alive)

    def _write(self, data: bytes) -> None:
        """Write at the end of this turn of the event loop, all of its packets at once."""
        if self.lost.is_set():
            return
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unwritten.append(data)

    def _flush(self) -> None:
        if self._unwritten and self._socket is not None and not self._socket.is_closing():
            self._socket.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def _drop(self, why: str) -> None:
        log.warning("broker at %s %s", self._endpoint, why)
        self.lost.set()
        if self._socket is not None:
            self._socket.abort()
