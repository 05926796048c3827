"""The cloud's transport on real brokers: nothing acknowledged early, nothing lost at a reconnect."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509

from cloud.authority import Authority
from cloud.config import BrokerConfig, TlsConfig
from cloud.errors import TransportError
from cloud.transport import Delivery, SteadyTransport, open_transport
from splitward.wire import topics

pytestmark = pytest.mark.anyio
TOPIC = topics.activation("ward", "pi-1")
REPLIES = topics.result("ward", "pi-1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["mosquitto", "embedded_broker"])
def broker(request):
    return request.getfixturevalue(request.param)


@asynccontextmanager
async def transport_to(broker, **changes) -> AsyncIterator[tuple[SteadyTransport, asyncio.Queue[Delivery]]]:
    """Connected transport, and the queue of what it delivers."""
    expiry_s = 3600 if broker.kind == "mosquitto" else 0
    config = BrokerConfig(host=broker.host, port=broker.port, session_expiry_s=expiry_s, **changes)
    transport = open_transport(config)
    inbox: asyncio.Queue[Delivery] = asyncio.Queue()
    await transport.start(lambda some: [inbox.put_nowait(one) for one in some])
    await until(lambda: transport.connected)
    try:
        yield transport, inbox
    finally:
        await transport.stop()


@asynccontextmanager
async def device_at(broker) -> AsyncIterator[tuple[paho.Client, asyncio.Queue[bytes]]]:
    """A device's connection, subscribed to its results."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "pi-1", protocol=paho.MQTTv5)
    replies, subscribed, soon = (
        asyncio.Queue(),
        asyncio.Event(),
        asyncio.get_running_loop().call_soon_threadsafe,
    )
    client.on_message = lambda _client, _data, message: soon(replies.put_nowait, message.payload)
    client.on_subscribe = lambda *_: soon(subscribed.set)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe(REPLIES, qos=1)
    await asyncio.wait_for(subscribed.wait(), 5)
    try:
        yield client, replies
    finally:
        client.disconnect()
        client.loop_stop()


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


async def send_until_delivered(device, inbox, payload: bytes) -> Delivery:
    """Publish until a subscription is there to take it, as a device does with its spool."""
    async with asyncio.timeout(15):
        while True:
            device.publish(TOPIC, payload, qos=1)
            try:
                return await asyncio.wait_for(inbox.get(), 0.5)
            except TimeoutError:
                continue


# The embedded broker (rumqttd) panics when a session with a shared subscription is resumed or left: it serves
# the demo, where neither happens before its end.
async def test_what_is_unacknowledged_comes_again_after_a_reconnect(mosquitto):
    async with device_at(mosquitto) as (device, _):
        async with transport_to(mosquitto) as (transport, inbox):
            transport.acknowledge(await send_until_delivered(device, inbox, b"done"))
            device.publish(TOPIC, b"open", qos=1)
            assert (await asyncio.wait_for(inbox.get(), 5)).payload == b"open"
        async with transport_to(mosquitto) as (transport, inbox):
            again = await asyncio.wait_for(inbox.get(), 5)
            assert again.payload == b"open"
            transport.acknowledge(again)


async def test_replies_beyond_the_brokers_receive_maximum_all_arrive(broker):
    async with device_at(broker) as (_, replies), transport_to(broker) as (transport, _inbox):
        for number in range(300):
            transport.publish(REPLIES, b"%d" % number)
        received = [await asyncio.wait_for(replies.get(), 5) for _ in range(300)]
    assert {int(payload) for payload in received} == set(range(300))


async def test_it_goes_on_after_the_broker_restarts(broker):
    async with transport_to(broker) as (transport, inbox):
        async with device_at(broker) as (device, _):
            held = await send_until_delivered(device, inbox, b"before")
        broker.stop()
        await until(lambda: not transport.connected)
        with pytest.raises(TransportError, match="was not sent"):
            transport.publish(REPLIES, b"lost")
        broker.start()
        await until(lambda: transport.connected)
        transport.acknowledge(held)  # of a connection that is gone: must not disturb this one
        async with device_at(broker) as (device, replies):
            transport.acknowledge(await send_until_delivered(device, inbox, b"after"))
            transport.publish(REPLIES, b"reply")
            assert await asyncio.wait_for(replies.get(), 5) == b"reply"


async def test_it_waits_for_a_broker_that_is_not_there_yet(broker):
    broker.stop()
    transport = open_transport(BrokerConfig(host=broker.host, port=broker.port))
    await transport.start(lambda some: None)
    assert not transport.connected
    broker.start()
    await until(lambda: transport.connected)
    await transport.stop()


async def test_no_more_is_in_flight_than_the_configuration_allows(mosquitto):
    async with (
        device_at(mosquitto) as (device, _),
        transport_to(mosquitto, max_in_flight=4) as (transport, inbox),
    ):
        deliveries = [await send_until_delivered(device, inbox, b"first")]
        for number in range(20):
            device.publish(TOPIC, b"%d" % number, qos=1)
        deliveries += [await asyncio.wait_for(inbox.get(), 5) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.get(), 0.3)
        for delivery in deliveries:
            transport.acknowledge(delivery)
        assert await asyncio.wait_for(inbox.get(), 5)


async def test_acknowledgements_keep_the_order_of_arrival(broker):
    async with device_at(broker) as (device, _), transport_to(broker) as (transport, inbox):
        transport.acknowledge(await send_until_delivered(device, inbox, b"first"))
        while not inbox.empty():
            transport.acknowledge(inbox.get_nowait())
        for number in range(8):
            device.publish(TOPIC, b"%d" % number, qos=1)
        deliveries = [await asyncio.wait_for(inbox.get(), 5) for _ in range(8)]
        for delivery in reversed(deliveries):
            transport.acknowledge(delivery)
        device.publish(TOPIC, b"next", qos=1)
        assert (await asyncio.wait_for(inbox.get(), 5)).payload == b"next"
        assert transport.connected  # the embedded broker disconnects who acknowledges out of order


async def test_after_unsubscribing_nothing_more_comes_and_replies_still_leave(mosquitto):
    async with device_at(mosquitto) as (device, replies), transport_to(mosquitto) as (transport, inbox):
        transport.acknowledge(await send_until_delivered(device, inbox, b"first"))
        while not inbox.empty():
            transport.acknowledge(inbox.get_nowait())
        await transport.unsubscribe()
        transport.publish(REPLIES, b"last")  # mosquitto handles packets in their order
        assert await asyncio.wait_for(replies.get(), 5) == b"last"
        device.publish(TOPIC, b"late", qos=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.get(), 0.3)


def certify(authority: Authority, folder: Path, service: str, *hosts: str) -> int:
    """A new certificate and key of the service in `folder`; its serial number."""
    certificate, key = authority.issue_service(service, hosts, 1)
    (folder / f"{service}.pem").write_bytes(certificate)
    (folder / f"{service}.key").write_bytes(key)
    return x509.load_pem_x509_certificate(certificate).serial_number


async def test_a_renewed_certificate_is_shown_at_the_next_connection(tmp_path, caplog):
    authority, shown = Authority(tmp_path / "fleet"), asyncio.Queue()
    (tmp_path / "authority.pem").write_text(authority.pem)
    certify(authority, tmp_path, "broker", "127.0.0.1")
    first = certify(authority, tmp_path, "cloud")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "authority.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tmp_path / "broker.pem", tmp_path / "broker.key")

    def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        shown.put_nowait(x509.load_der_x509_certificate(certificate).serial_number)
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0, ssl=context)
    files = TlsConfig(*(str(tmp_path / name) for name in ("authority.pem", "cloud.pem", "cloud.key")))
    transport = open_transport(BrokerConfig(port=server.sockets[0].getsockname()[1], tls=files))
    await transport.start(lambda some: None)
    async with asyncio.timeout(15):
        assert await shown.get() == first
        (tmp_path / "cloud.key").write_text("half a k")  # the certificate is being made anew
        await until(lambda: "broker.tls" in caplog.text)
        renewed = certify(authority, tmp_path, "cloud")
        while await shown.get() != renewed:
            pass
    await transport.stop()
    server.close()
