"""The connection to the broker: MQTT 5 by paho, with a session that outlives it.

It publishes what it is given and posts what happens as events. It decides nothing, and paho never queues:
delivery.py keeps the window, which is smaller than what paho may hold in flight.
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge.config import EdgeConfig, TlsConfig
from edge.errors import LinkError
from splitward.errors import MessageError
from splitward.wire import topics
from splitward.wire.control import MAX_BYTES, Refusal, Result, Status, decode_reply, encode_control

STATUS_ROOM = 8
"""Status messages that may be in flight beside the window."""
FAREWELL_S = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has accepted the device; `resumed` says whether it still knew the session."""

    resumed: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; paho is already trying again."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """PUBACK of message `mid`; `kept` is False when the broker refused it or had nobody to keep it for."""

    mid: int
    kept: bool


@dataclass(frozen=True, slots=True)
class Replied:
    """The cloud has answered a frame."""

    reply: Result | Refusal


LinkEvent = Connected | Disconnected | Acknowledged | Replied


class Link:
    """One device's connection.

    Parameters
    ----------
    config : EdgeConfig
        `[device]`, `[broker]` and `[link]` are read.
    post : callable
        Takes each `LinkEvent`. Called on paho's thread, so it must neither block nor raise.
    """

    def __init__(self, config: EdgeConfig, post: Callable[[LinkEvent], None]) -> None:
        self._config = config
        self._post = post
        names = (config.device.site, config.device.id)
        self._activation, self._result, self._status = (
            topics.activation(*names),
            topics.result(*names),
            topics.status(*names),
        )
        self._client = self._make_client()

    def start(self) -> None:
        """Connect, and stay connected, on paho's own thread."""
        broker = self._config.broker
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        properties.SessionExpiryInterval = self._config.link.session_expiry_s
        properties.MaximumPacketSize = 2 * MAX_BYTES  # a result and its topic; nothing else is listened to
        self._client.connect_async(
            broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=properties
        )
        self._client.loop_start()

    def publish(self, message: bytes) -> int:
        """Publish an activation; the id that its acknowledgement will carry.

        Raises
        ------
        LinkError
            paho holds more than the window, which would be a defect.
        """
        sent = self._client.publish(self._activation, message, qos=1)
        if sent.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise LinkError("paho holds more messages than the window. Report this defect.")
        return sent.mid

    def publish_status(self, status: Status) -> None:
        """Publish the retained status."""
        self._client.publish(self._status, encode_control(status), qos=1, retain=True)

    def stop(self, status: Status) -> None:
        """Say farewell with `status`, disconnect, and wait for paho's thread."""
        if self._client.is_connected():
            farewell = self._client.publish(self._status, encode_control(status), qos=1, retain=True)
            try:
                farewell.wait_for_publish(FAREWELL_S)
            except (
                RuntimeError,
                ValueError,
            ) as error:  # the connection went away meanwhile: the last will speaks
                log.info("no farewell: %s", error)
        self._client.disconnect()
        self._client.loop_stop()

    def _make_client(self) -> Client:
        config, broker, link = self._config, self._config.broker, self._config.link
        client = Client(
            CallbackAPIVersion.VERSION2,
            # A name holds no dot, so no two devices share an id.
            client_id=f"{config.device.site}.{config.device.id}",
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        client.max_inflight_messages = client.max_queued_messages = link.window + STATUS_ROOM
        # paho doubles the pause without jitter; a random first pause spreads a fleet that lost its broker.
        first_s = link.reconnect_s * random.uniform(0.5, 1.5)  # noqa: S311  # no secret
        client.reconnect_delay_set(first_s, max(first_s, link.reconnect_max_s))  # type: ignore[arg-type]  # paho multiplies and sleeps: a float will do
        client.will_set(self._status, encode_control(Status("offline")), qos=1, retain=True)
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls is not None:
            client.tls_set_context(_tls_context(broker.tls))
        client.on_socket_open = _send_at_once
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def _on_connect(
        self,
        client: Client,
        _userdata: Any,
        flags: ConnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if code.is_failure:
            log.error("broker %s refuses this device: %s", self._where(), code)
            return
        client.subscribe(self._result, qos=1)
        log.info("connected to %s", self._where())
        self._post(Connected(flags.session_present))

    def _on_connect_fail(self, _client: Client, _userdata: Any) -> None:
        log.warning("no connection to %s; trying again", self._where())

    def _on_disconnect(
        self, _client: Client, _userdata: Any, _flags: DisconnectFlags, code: ReasonCode, _properties: Any
    ) -> None:
        log.log(logging.WARNING if code.is_failure else logging.INFO, "disconnected: %s", code)
        self._post(Disconnected())

    def _on_publish(
        self, _client: Client, _userdata: Any, mid: int, code: ReasonCode, _properties: Properties
    ) -> None:
        if code.is_failure:
            log.warning("broker %s does not take a message: %s", self._where(), code)
        self._post(Acknowledged(mid, kept=code.value == 0))

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        try:
            self._post(Replied(decode_reply(bytes(message.payload))))
        except MessageError as error:
            log.warning("%s: %s", message.topic, error)

    def _where(self) -> str:
        return f"{self._config.broker.host}:{self._config.broker.port}"


def _send_at_once(_client: Client, _userdata: Any, connection: Any) -> None:
    """Switch Nagle's algorithm off: with the other end's delayed acknowledgements it costs 40 ms a frame."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _tls_context(config: TlsConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.cert is not None:
            context.load_cert_chain(config.cert, config.key)
    except OSError as error:  # SSLError is one
        raise LinkError(
            f"broker.tls: {error}. `ca`, `cert` and `key` are PEM files that the agent's user can read."
        ) from error
    return context
