"""A training's messages over MQTT: what a side asks or answers until the other has it.

The state machines make a message safe to send again, so the carrier does nothing but that: a client publishes its
request until the answer comes, the cloud answers whatever comes. Who is killed comes back and asks again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client as Mqtt
from paho.mqtt.client import MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from splitward.errors import MessageError, TrainingError, WireError
from splitward.training.remote.client import Client
from splitward.training.remote.server import Replies, Server
from splitward.wire import topics
from splitward.wire.training import decode_training

RETRY_S = 5.0
"""An answer that takes longer is asked for again: the one before may have died with the broker."""
TICK_S = 0.5
MAX_PACKET_BYTES = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and who asks.

    `ca`, `cert` and `key` are PEM files for mutual TLS. Without `ca` nothing is encrypted; `cert` and `key` are a
    `TrainingError` then, and either without the other.
    """

    host: str = "127.0.0.1"
    port: int = 1883
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    username: str | None = None
    password: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise TrainingError("broker: --cert and --key go together. Give both, or neither.")
        if self.cert is not None and self.ca is None:
            raise TrainingError(
                "broker: --cert and --key without --ca would not encrypt anything. Give --ca, too."
            )


def run_client(client: Client, site: str, broker: Broker, stop: threading.Event | None = None) -> None:
    """Let a client train until it has what it came for, or `stop` is set.

    Raises
    ------
    TrainingError, HijackError
        As `Client.take`.
    """
    stop = stop or threading.Event()
    link = _Link(broker, f"{site}.{client.device}.train", topics.step(site, client.device))
    where = topics.train(site, client.device)
    try:
        while client.request is not None and not stop.is_set():
            link.publish(where, client.request)
            client.meanwhile()  # while the answer is on its way
            due_s = time.monotonic() + RETRY_S
            while not stop.is_set() and (link.pending or time.monotonic() < due_s):
                message = link.take(TICK_S)
                if message is not None and client.take(bytes(message.payload)):
                    break
    finally:
        link.close()


def run_server(
    servers: Mapping[bytes, Server], broker: Broker, goes_on: Callable[[], bool] | None = None
) -> None:
    """Answer the clients of `servers` (by training) until all are finished.

    A client that others wait for and that says nothing for the plan's `silence_s` is left out of the round.
    `goes_on`, where given, decides instead whether to go on; it is asked after each message, and twice a second.
    """
    goes_on = goes_on or (lambda: not all(server.finished for server in servers.values()))
    # No site may guess the id: the broker ends a connection when another client comes under its id.
    link = _Link(broker, f"splitward-trainer-{secrets.token_hex(8)}", topics.every_train())
    heard_s: dict[tuple[bytes, str], float] = {}
    sites: dict[str, str] = {}
    try:
        while goes_on():
            message = link.take(TICK_S)
            if message is not None:
                _answer(servers, message, link, heard_s, sites)
            for training, server in servers.items():
                for device in server.awaited():
                    silent_s = time.monotonic() - heard_s.setdefault((training, device), time.monotonic())
                    if silent_s >= server.plan.silence_s:
                        log.warning("%s is silent: the round goes on without it", device)
                        _send(server.drop(device), link, sites)
        link.settle()
    finally:
        link.close()


def _answer(
    servers: Mapping[bytes, Server],
    message: MQTTMessage,
    link: _Link,
    heard_s: dict[tuple[bytes, str], float],
    sites: dict[str, str],
) -> None:
    try:
        site, device, _ = topics.parse(message.topic)
        training = decode_training(bytes(message.payload)).training
    except (WireError, MessageError) as error:
        log.warning("%s: %s", message.topic, error)
        return
    if training not in servers:
        log.warning("%s asks for the training %s, which is not here", device, training.hex())
        return
    heard_s[training, device], sites[device] = time.monotonic(), site
    _send(servers[training].handle(device, bytes(message.payload)), link, sites)


def _send(replies: Replies, link: _Link, sites: Mapping[str, str]) -> None:
    """Publish replies to clients whose sites are known; one that was not heard since the start asks again."""
    for name, reply in replies:
        if name in sites:
            link.publish(topics.step(sites[name], name), reply)


class _Link:
    """One connection that comes back by itself; what arrives waits in a queue."""

    def __init__(self, broker: Broker, client_id: str, topic: str) -> None:
        self._arrived: queue.SimpleQueue[MQTTMessage] = queue.SimpleQueue()
        self._topic = topic
        self._published = self._acknowledged = 0
        self._client = Mqtt(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.reconnect_delay_set(1, 10)
        self._client.on_socket_open = _send_at_once
        if broker.username is not None:
            self._client.username_pw_set(broker.username, broker.password)
        if broker.ca is not None:
            try:
                for path in filter(None, (broker.ca, broker.cert, broker.key)):
                    Path(path).read_bytes()  # ssl does not say which one is missing
                context = ssl.create_default_context(cafile=broker.ca)
                if broker.cert is not None:
                    context.load_cert_chain(broker.cert, broker.key)
            except OSError as error:
                raise TrainingError(f"broker: {error}. --ca, --cert and --key are PEM files.") from error
            self._client.tls_set_context(context)
        self._client.on_connect = self._subscribe
        where = f"broker {broker.host}:{broker.port}"
        self._client.on_connect_fail = lambda *_: log.warning(
            "%s: cannot be reached (%s); trying again", where, sys.exc_info()[1]
        )
        self._client.on_disconnect = lambda _client, _data, _flags, code, _properties: (
            log.warning("%s: the connection has ended (%s); trying again", where, code)
            if code.is_failure
            else None
        )
        self._client.on_publish = self._acknowledge
        self._client.on_message = lambda _client, _data, message: self._arrived.put(message)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        self._client.connect_async(broker.host, broker.port, properties=properties)
        self._client.loop_start()

    def publish(self, topic: str, message: bytes) -> None:
        """Send, or have it sent when the connection is back; the state machines bear what comes twice."""
        self._published += 1
        self._last = self._client.publish(topic, message, qos=1)

    @property
    def pending(self) -> bool:
        """Whether the broker lacks a message: it is kept, and sent again at each connection, until it is there."""
        # Not the message's own `is_published`: of one that was published without a connection it never says so.
        return self._acknowledged < self._published

    def take(self, wait_s: float) -> MQTTMessage | None:
        """The next message; None when none comes in time."""
        try:
            return self._arrived.get(timeout=wait_s)
        except queue.Empty:
            return None

    def settle(self) -> None:
        """Wait a moment until the broker has the last message."""
        try:
            self._last.wait_for_publish(RETRY_S)
        except (AttributeError, RuntimeError, ValueError):  # none was sent, or the connection is gone
            log.info("the last answer may not have arrived; it will be asked for")

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _acknowledge(self, _client: Mqtt, _data: Any, _id: int, _code: Any, _properties: Any) -> None:
        self._acknowledged += 1

    def _subscribe(self, client: Mqtt, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        if code.is_failure:
            log.error("the broker refuses this client: %s", code)
            return
        client.subscribe(self._topic, qos=1)


def _send_at_once(_client: Mqtt, _data: Any, opened: Any) -> None:
    """A step right behind an acknowledgement must not wait for the other end's (Nagle): 40 ms each."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
