"""The connection to the broker: MQTT 5 by paho, with a session that outlives it.

It publishes what it is given and posts what happens as events. It decides nothing, and paho never queues:
delivery.py keeps the window, which is smaller than what paho may hold in flight. A broker that refuses MQTT 5 is
spoken to in 3.1.1.
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import threading
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
from splitward.wire.control import MAX_BYTES, Outcome, Refusal, Result, Status, decode_reply, encode_control

STATUS_ROOM = 8
"""Messages of status and outcome that may be in flight beside the window."""
UNSUPPORTED_VERSION = 132
FAREWELL_S = 2.0
LOOP_S = 1.0
"""How often the link's thread looks after keep-alives when nothing comes and nothing goes."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has accepted the device; `resumed` says whether it still knew the session."""

    resumed: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; the link is already trying again."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """PUBACK of message `mid`; `kept` is False when the broker refused it or had nobody to keep it for."""

    mid: int
    kept: bool


@dataclass(frozen=True, slots=True)
class Replied:
    """The cloud has answered a frame."""

    reply: Result | Refusal


@dataclass(frozen=True, slots=True)
class Ordered:
    """The cloud sends an order, which nobody has verified yet."""

    payload: bytes


LinkEvent = Connected | Disconnected | Acknowledged | Replied | Ordered


class Link:
    """One device's connection.

    Parameters
    ----------
    config : EdgeConfig
        `[device]`, `[broker]` and `[link]` are read.
    post : callable
        Takes each `LinkEvent`. Called on the link's thread, so it must neither block nor raise.

    Attributes
    ----------
    trouble : str
        Why there is no connection; empty while there is one.
    """

    def __init__(self, config: EdgeConfig, post: Callable[[LinkEvent], None]) -> None:
        self._config = config
        self._post = post
        names = (config.device.site, config.device.id)
        self._activation, self._result, self._status, self._outcome = (
            topics.activation(*names),
            topics.result(*names),
            topics.status(*names),
            topics.outcome(*names),
        )
        self._orders = [topics.bundle(*names), topics.command(*names)]
        self._tls = None if config.broker.tls is None else tls_context(config.broker.tls)
        self._mqtt5 = config.broker.protocol != "3.1.1"
        self._client = self._make_client()
        self._ending = threading.Event()
        self._greeted = False
        # After the first connection the client stays: it holds what the broker has not acknowledged.
        self._version_is_known = config.broker.protocol != "auto"
        self.trouble = "not connected yet"
        self._thread = threading.Thread(target=self._stay_connected, name="link", daemon=True)

    def start(self) -> None:
        """Connect, and stay connected, on a thread of its own."""
        self._thread.start()

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

    def publish_outcome(self, outcome: Outcome) -> int:
        """Publish what became of an order; the id that its acknowledgement will carry."""
        return self._client.publish(self._outcome, encode_control(outcome), qos=1).mid

    def reload(self) -> None:
        """Take the certificate from its files again, and connect with it."""
        tls = self._config.broker.tls
        if self._tls is not None and tls is not None and tls.cert is not None:
            self._tls.load_cert_chain(tls.cert, tls.key)
            self._client.disconnect()

    def stop(self, status: Status) -> None:
        """Say farewell with `status`, disconnect, and wait for the thread."""
        self._ending.set()
        if self._client.is_connected():
            farewell = self._client.publish(self._status, encode_control(status), qos=1, retain=True)
            try:
                farewell.wait_for_publish(FAREWELL_S)
            except (RuntimeError, ValueError) as error:  # the connection is gone: the last will speaks
                log.info("no farewell: %s", error)
        self._client.disconnect()
        if self._thread.is_alive():
            self._thread.join(2 * FAREWELL_S)  # a handshake may hang a little longer; it harms nobody

    def _stay_connected(self) -> None:
        first_s, longest_s = self._config.link.reconnect_s, self._config.link.reconnect_max_s
        pause_s, deaf = first_s, 0
        while not self._ending.is_set():
            self._greeted = hung_up = False
            try:
                self._connect()
                hung_up = self._serve() == MQTTErrorCode.MQTT_ERR_CONN_LOST
            except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
                self.trouble = f"{type(error).__name__}: {error}"
                log.warning("no connection to %s (%s); trying again", self._where(), error)
            self._version_is_known |= self._greeted
            deaf = deaf + 1 if hung_up and not self._greeted else 0
            if deaf >= 2 and not self._version_is_known:
                # Some brokers hang up on a version that they do not speak: the other one, in turn.
                self._speak(mqtt5=not self._mqtt5)
            pause_s = first_s if self._greeted else min(2.0 * pause_s, longest_s)
            self._ending.wait(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads a fleet; no secret
        if (left := self._client.socket()) is not None:
            left.close()

    def _serve(self) -> MQTTErrorCode:
        """Read and write until the connection ends; why it ended.

        Not by paho's `loop_forever`: on a thread that is not paho's own it has nothing for a publisher to wake it
        by, and a frame then waits until the loop's time is up. `loop` has.
        """
        while (code := self._client.loop(LOOP_S)) == MQTTErrorCode.MQTT_ERR_SUCCESS:
            pass
        return code

    def _connect(self) -> None:
        broker = self._config.broker
        if self._mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
            properties.SessionExpiryInterval = self._config.link.session_expiry_s
            properties.MaximumPacketSize = 2 * MAX_BYTES  # a reply or an order; nothing else is listened to
            self._client.connect(
                broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=properties
            )
        else:
            self._client.connect(broker.host, broker.port, broker.keepalive_s)

    def _speak(self, mqtt5: bool) -> None:
        log.info("speaking MQTT %s to %s", "5" if mqtt5 else "3.1.1", self._where())
        self._mqtt5 = mqtt5
        self._client = self._make_client()

    def _make_client(self) -> Client:
        config, broker, link = self._config, self._config.broker, self._config.link
        # A name holds no dot, so no two devices share an id.
        client_id = f"{config.device.site}.{config.device.id}"
        version = MQTTProtocolVersion.MQTTv5 if self._mqtt5 else MQTTProtocolVersion.MQTTv311
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._mqtt5 else False,
            protocol=version,
            reconnect_on_failure=False,  # done here, with a jitter that paho lacks
        )
        client.max_inflight_messages = client.max_queued_messages = link.window + STATUS_ROOM
        client.will_set(self._status, encode_control(Status("offline")), qos=1, retain=True)
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.on_socket_open = _send_at_once
        # Where nobody asks to hear of it, paho writes on the thread that publishes. Two threads in one TLS connection
        # break it, so this thread alone writes: whatever is queued wakes it.
        client.on_socket_register_write = _leave_to_the_loop
        client.on_connect = self._on_connect
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
        self._greeted = not code.is_failure
        if code.is_failure:
            self.trouble = f"refused: {code}"
            log.error("broker %s refuses this device: %s", self._where(), code)
            if code.value == UNSUPPORTED_VERSION and not self._version_is_known:
                self._speak(mqtt5=False)
            return
        self.trouble = ""
        client.subscribe([(topic, 1) for topic in (self._result, *self._orders)])
        log.info("connected to %s", self._where())
        self._post(Connected(flags.session_present))

    def _on_disconnect(
        self, _client: Client, _userdata: Any, _flags: DisconnectFlags, code: ReasonCode, _properties: Any
    ) -> None:
        if not self._greeted:
            return  # it never was a connection; `_on_connect` or `_stay_connected` has said why
        self.trouble = f"disconnected: {code}"
        log.log(logging.WARNING if code.is_failure else logging.INFO, "disconnected: %s", code)
        self._post(Disconnected())

    def _on_publish(
        self, _client: Client, _userdata: Any, mid: int, code: ReasonCode, _properties: Properties
    ) -> None:
        if code.is_failure:
            log.warning("broker %s does not take a message: %s", self._where(), code)
        self._post(Acknowledged(mid, kept=code.value == 0))

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        if message.topic in self._orders:
            if message.payload:  # an empty one clears what was retained
                self._post(Ordered(bytes(message.payload)))
            return
        try:
            self._post(Replied(decode_reply(bytes(message.payload))))
        except MessageError as error:
            log.warning("%s: %s", message.topic, error)

    def _where(self) -> str:
        return f"{self._config.broker.host}:{self._config.broker.port}"


def _leave_to_the_loop(_client: Client, _userdata: Any, _connection: Any) -> None:
    """Nothing: the loop looks by itself whether there is something to write."""


def _send_at_once(_client: Client, _userdata: Any, connection: Any) -> None:
    """Switch Nagle's algorithm off: with the other end's delayed acknowledgements it costs 40 ms a frame."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tls_context(config: TlsConfig) -> ssl.SSLContext:
    """Context for the broker; `LinkError` when its files cannot be used."""
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
