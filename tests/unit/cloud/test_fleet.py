"""Tokens, enrolment, bundles, roll-outs and the audit trail, through the API on a real database."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import update

from cloud import audit, ledger, orders, rollout, tables
from cloud.authority import RENEWAL
from cloud.config import ApiConfig, StoreConfig
from cloud.errors import TransportError
from cloud.logs import JsonFormatter, TextFormatter
from cloud.orders import Orders
from cloud.rollout import Rollouts
from cloud.store import Store
from splitward.wire import topics
from splitward.wire.control import Outcome, Refusal, Status, encode_control
from splitward.wire.message import encode
from splitward.wire.orders import Announcement, Command, decode_order

pytestmark = pytest.mark.anyio


def request_for(
    device: str, key: ec.EllipticCurvePrivateKey | None = None
) -> tuple[ec.EllipticCurvePrivateKey, str]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return key, request.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def settings(tiny_bundle, monkeypatch) -> dict[str, str]:
    """Of a fleet whose roll-outs go on when a test says so."""
    monkeypatch.setattr(rollout, "PERIOD_S", 3600.0)
    return {"trusted_key": str(tiny_bundle.trusted_key), "broker_host": "broker.example"}


@pytest.fixture
async def fleet(run_cloud, settings):
    async with run_cloud(fleet=settings) as cloud:
        yield cloud


@pytest.fixture(params=["sqlite", "postgresql"])
async def either_fleet(request, run_cloud, settings):
    """A fleet on each kind of database."""
    more = {"url": request.getfixturevalue("postgres_url")} if request.param == "postgresql" else {}
    async with run_cloud(fleet=settings, **more) as cloud:
        yield cloud


async def enrol(cloud, device: str, csr: str, **changes):
    made = (await cloud.http.post("/v1/enrolment-tokens", json={"site": "ward"})).json()
    body = {"token": made["token"], "site": "ward", "device": device, "csr": csr} | changes
    return body, await cloud.http.post("/v1/enrolments", json=body)


async def test_a_device_enrols_once_with_a_token(fleet, tiny_bundle):
    key, csr = request_for("pi-1")
    body, answer = await enrol(fleet, "pi-1", csr)
    assert answer.status_code == 201
    given = answer.json()
    certificate = x509.load_pem_x509_certificate(given["certificate"].encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(given["authority"].encode()))
    assert certificate.public_key() == key.public_key()
    assert given["broker"] == {"host": "broker.example", "port": 8883}
    assert given["trusted_key"] == tiny_bundle.trusted_key.read_text()
    again = await fleet.http.post("/v1/enrolments", json=body)  # the answer was lost
    repeated = x509.load_pem_x509_certificate(again.json()["certificate"].encode())
    assert repeated.public_key() == key.public_key()
    again = await fleet.http.post("/v1/enrolments", json=body | {"csr": request_for("pi-1")[1]})
    assert (again.status_code, again.json()["reason"]) == (403, "bad_token")
    assert again.headers["content-type"] == "application/problem+json"
    _, taken = await enrol(fleet, "pi-1", csr)
    assert (taken.status_code, taken.json()["reason"]) == (409, "taken")


async def test_a_refused_enrolment_leaves_its_token_good(fleet):
    _, csr = request_for("pi-1")
    body, answer = await enrol(fleet, "pi-2", csr)
    assert (answer.status_code, answer.json()["reason"]) == (422, "bad_csr")
    _, right = request_for("pi-2")
    assert (await fleet.http.post("/v1/enrolments", json=body | {"csr": right})).status_code == 201
    body, answer = await enrol(fleet, "pi-3", request_for("pi-3")[1], site="other")
    assert answer.status_code == 403


async def test_a_certificate_is_renewed_by_its_holder_until_it_is_revoked(fleet):
    key, csr = request_for("pi-1")
    certificate = (await enrol(fleet, "pi-1", csr))[1].json()["certificate"]
    _, new = request_for("pi-1")
    signature = base64.b64encode(key.sign(RENEWAL + new.encode(), ec.ECDSA(hashes.SHA256()))).decode()
    body = {"certificate": certificate, "csr": new, "signature": signature}
    assert (await fleet.http.post("/v1/enrolments/renew", json=body)).status_code == 200
    stranger = ec.generate_private_key(ec.SECP256R1()).sign(RENEWAL + new.encode(), ec.ECDSA(hashes.SHA256()))
    forged = body | {"signature": base64.b64encode(stranger).decode()}
    assert (await fleet.http.post("/v1/enrolments/renew", json=forged)).status_code == 403
    revoked = await fleet.http.post("/v1/devices/pi-1/revoke", json={"reason": "lost"})
    assert revoked.json() == {"revoked": 2}
    assert (await fleet.http.post("/v1/enrolments/renew", json=body)).status_code == 403
    asked_at_s = time.time()
    crl = x509.load_pem_x509_crl((await fleet.http.get("/v1/revocations.crl")).content)
    assert fleet.metric("splitward_revocations_fetched_timestamp_seconds") >= asked_at_s
    assert len(crl) == 2
    assert crl.is_signature_valid(fleet.parts.authority.certificate.public_key())


@pytest.mark.parametrize(
    ("body", "code"), [(b"", 200), (b'{"reason": "lost"}', 200), (b'{"why": "lost"}', 422)]
)
async def test_a_reason_need_not_be_given(fleet, tiny_bundle, body, code):
    """docs/cloud.md and docs/runbook.md write these requests without a body."""
    await enrol(fleet, "pi-1", request_for("pi-1")[1])
    name = await start_rollout(fleet, tiny_bundle, devices=1)
    for path in ("/v1/devices/pi-1/revoke", f"/v1/rollouts/{name}/halt"):
        about = fleet.app.openapi()["paths"][path.replace("pi-1", "{device}").replace(name, "{rollout}")][
            "post"
        ]
        assert not about["requestBody"].get("required", False)
        kind = {"Content-Type": "application/json"} if body else {}
        answer = await fleet.http.post(path, content=body, headers=kind)
        assert answer.status_code == code, (path, answer.text)


async def test_tokens_have_scopes_and_can_be_revoked(run_cloud):
    async with run_cloud(api=ApiConfig()) as cloud:
        access = cloud.parts.access
        reader = {"Authorization": f"Bearer {await access.create('reader', ('read',), 'test')}"}
        operator = {"Authorization": f"Bearer {await access.create('operator', ('operate',), 'test')}"}
        assert (await cloud.http.get("/v1/results")).status_code == 401
        assert (await cloud.http.get("/metrics")).status_code == 401
        assert (
            await cloud.http.get("/v1/results", headers={"Authorization": "Bearer swt_x"})
        ).status_code == 401
        assert (await cloud.http.get("/v1/results", headers=reader)).status_code == 200
        wanted = {"name": "next", "scopes": ["read"]}
        assert (await cloud.http.post("/v1/tokens", json=wanted, headers=reader)).status_code == 403
        made = await cloud.http.post("/v1/tokens", json=wanted, headers=operator)
        assert made.status_code == 201
        rows = await cloud.parts.store.read(tables.tokens.select())
        assert made.json()["token"] not in str(rows)
        assert (await cloud.http.delete("/v1/tokens/reader", headers=operator)).status_code == 200
        assert (await cloud.http.get("/v1/results", headers=reader)).status_code == 401


async def test_every_route_but_a_devices_own_needs_a_token_off_loopback(run_cloud):
    open_to_all = {"/", "/healthz", "/readyz", "/v1/enrolments", "/v1/enrolments/renew", "/v1/revocations.crl"}
    async with run_cloud(api=ApiConfig(host="0.0.0.0")) as cloud:  # noqa: S104  # nothing listens: it asks the app
        asked = 0
        for path, methods in cloud.app.openapi()["paths"].items():
            for method in methods:
                if path in open_to_all or path.endswith("/file"):
                    continue
                address = path.replace("{site}", "ward").replace("{device}", "pi-1").replace("{name}", "x")
                address = address.replace("{model}", "0" * 32).replace("{rollout}", "0" * 32)
                answer = await cloud.http.request(method, address)
                assert answer.status_code == 401, (method, path)
                asked += 1
        assert asked > 15
        assert (await cloud.http.get("/openapi.json")).status_code == 401


async def test_too_many_requests_are_refused(run_cloud):
    async with run_cloud(api=ApiConfig(require_token=False, requests_per_s=0.001, burst=3)) as cloud:
        codes = [(await cloud.http.get("/v1/results")).status_code for _ in range(4)]
    assert codes == [200, 200, 200, 429]


async def test_a_body_is_bounded_and_every_answer_has_an_id(run_cloud):
    async with run_cloud(api=ApiConfig(require_token=False, max_body_bytes=2000)) as cloud:
        answer = await cloud.http.post("/v1/enrolment-tokens", content=b"x" * 3000)
        named = await cloud.http.get("/v1/results", headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.json()["reason"]) == (413, "oversize")
    assert answer.headers["x-request-id"]
    assert named.headers["x-request-id"] == "mine"


async def test_methods_that_a_stranger_makes_up_are_counted_as_one(run_cloud):
    async with run_cloud(api=ApiConfig()) as cloud:
        for method in ("PROPFIND", *(f"X{number}" for number in range(20))):
            await cloud.http.request(method, "/v1/results", headers={"Host": "evil.example"})
        await cloud.http.get("/v1/results")
        (family,) = (one for one in cloud.parts.metrics.registry.collect() if one.name == "splitward_requests")
    counted = {one.labels["method"]: one.value for one in family.samples if one.name.endswith("_total")}
    assert counted == {"other": 21, "GET": 1}


async def test_what_is_logged_within_a_request_tells_its_id(run_cloud, monkeypatch):
    lines = []

    def fail() -> bytes:
        record = logging.LogRecord("cloud", logging.WARNING, "", 0, "within", (), None)
        lines.extend(formatter().format(record) for formatter in (JsonFormatter, TextFormatter))
        return b""

    async with run_cloud() as cloud:
        monkeypatch.setattr(cloud.parts.metrics, "expose", fail)
        await cloud.http.get("/metrics", headers={"X-Request-ID": "mine"})
    assert json.loads(lines[0])["request_id"] == "mine"
    assert lines[1].endswith("within [mine]")
    assert "mine" not in TextFormatter().format(logging.LogRecord("cloud", 30, "", 0, "outside", (), None))


async def test_a_bundle_is_verified_kept_and_served_by_ticket(fleet, tiny_bundle):
    data = tiny_bundle.path.read_bytes()
    refused = await fleet.http.post("/v1/bundles", content=data[:-9])
    assert (refused.status_code, refused.json()["reason"]) == (422, "unreadable")
    about = (await fleet.http.post("/v1/bundles", content=data)).json()
    assert (about["sha256"], about["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
    model = about["model"]
    ticket = fleet.parts.authority.ticket(model, "pi-1", int(time.time()) + 60)
    url = f"/v1/bundles/{model}/file"
    whole = await fleet.http.get(url, params={"ticket": ticket})
    assert whole.content == data
    assert whole.headers["etag"] == f'"{about["sha256"]}"'
    part = await fleet.http.get(
        url, params={"ticket": ticket}, headers={"Range": "bytes=10-19", "If-Range": whole.headers["etag"]}
    )
    assert (part.status_code, part.content) == (206, data[10:20])
    old = fleet.parts.authority.ticket(model, "pi-1", int(time.time()) - 1)
    for wrong in (old, ticket[:-1] + "x", "", "1.2.3", ticket.replace("pi-1", "pi-2")):
        assert (await fleet.http.get(url, params={"ticket": wrong})).status_code == 403


async def test_what_a_killed_upload_left_is_removed_and_one_that_goes_on_is_not(fleet, tiny_bundle):
    folder = fleet.parts.registry.path("0").parent
    folder.mkdir()
    left, going_on = folder / "a.partial", folder / "b.partial"
    for path in (left, going_on):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 3700,) * 2)
    assert (await fleet.http.post("/v1/bundles", content=tiny_bundle.path.read_bytes())).status_code == 201
    assert not left.exists()
    assert sorted(path.suffix for path in folder.iterdir()) == [".bundle", ".partial"]


async def make_fleet(cloud, devices: int) -> None:
    for number in range(devices):
        status = encode_control(Status("online", model="0" * 32))
        await cloud.transport.send(topics.status("ward", f"pi-{number}"), status)
    await cloud.parts.pipeline._ledger.write()


async def start_rollout(cloud, bundle, devices: int, **plan) -> str:
    await make_fleet(cloud, devices)
    model = (await cloud.http.post("/v1/bundles", content=bundle.path.read_bytes())).json()["model"]
    answer = await cloud.http.post("/v1/rollouts", json={"model": model, "canary_share": 0.25} | plan)
    assert answer.status_code == 201
    await steps(cloud)
    return answer.json()["id"]


async def steps(cloud, count: int = 3) -> None:
    """By default as many as bring one change of the roll-outs to every device of a small fleet."""
    for _ in range(count):
        await cloud.parts.rollouts.step()


async def latest(cloud) -> dict:
    return (await cloud.http.get("/v1/rollouts")).json()["rollouts"][0]


async def halt(cloud, name: str) -> None:
    assert (await cloud.http.post(f"/v1/rollouts/{name}/halt", json={})).status_code == 200


def sent(cloud, kind: str) -> list[Announcement | Command]:
    """What was sent to devices on topics of `kind`, in order; what withdraws is left out."""
    key = cloud.parts.authority.order_key.public_key()
    found = []
    for topic, payload, retain in cloud.transport.orders:
        site, device, its_kind = topics.parse(topic)
        if its_kind == kind and payload:
            assert retain == (kind == "bundle")
            found.append(decode_order(payload, key, site=site, device=device))
    return found


def announced(cloud) -> dict[str, Announcement]:
    """The last announcement to each device."""
    return {one.device: one for one in sent(cloud, "bundle")}


def retained(cloud) -> set[str]:
    """Devices for which the broker keeps an announcement."""
    last = {topic: payload for topic, payload, retain in cloud.transport.orders if retain}
    return {topics.parse(topic)[1] for topic, payload in last.items() if payload}


async def tell(cloud, order, state: str) -> None:
    outcome = encode_control(Outcome(order.id, "bundle", state))
    await cloud.transport.send(topics.outcome("ward", order.device), outcome)
    await cloud.parts.orders.write_outcomes()


async def answer(cloud, order, state: str) -> None:
    await tell(cloud, order, state)
    await steps(cloud)


async def move_back(cloud, seconds: float) -> None:
    """As if all that a roll-out's rows tell of had been so much earlier."""
    by_ns = int(seconds * 1e9)
    async with cloud.parts.store.write() as connection:
        for table, names in (
            (tables.orders, ("sent_at_ns", "published_at_ns")),
            (tables.rollouts, ("driven_at_ns", "changed_at_ns")),
        ):
            await connection.execute(update(table).values({name: table.c[name] - by_ns for name in names}))


async def age_orders(cloud, seconds: float, *names: str) -> None:
    async with cloud.parts.store.write() as connection:
        change = {name: tables.orders.c[name] - int(seconds * 1e9) for name in names}
        await connection.execute(update(tables.orders).values(change))


async def test_a_rollout_goes_to_the_canaries_first_and_then_to_all(either_fleet, tiny_bundle):
    fleet = either_fleet
    rollout = await start_rollout(fleet, tiny_bundle, devices=4)
    canaries = announced(fleet)
    assert list(canaries) == ["pi-0"]
    assert canaries["pi-0"].url.startswith("http://127.0.0.1:8080/v1/bundles/")
    fetched = await fleet.http.get(canaries["pi-0"].url)
    assert hashlib.sha256(fetched.content).hexdigest() == canaries["pi-0"].sha256
    await steps(fleet)
    assert len(sent(fleet, "bundle")) == 1
    await answer(fleet, canaries["pi-0"], "done")
    orders = announced(fleet)
    assert sorted(orders) == ["pi-0", "pi-1", "pi-2", "pi-3"]
    for device in ("pi-1", "pi-2", "pi-3"):
        await answer(fleet, orders[device], "done")
    about = await latest(fleet)
    assert (about["id"], about["state"], about["orders"]) == (rollout, "done", {"done": 4})


async def test_a_failing_canary_halts_the_rollout(either_fleet, tiny_bundle):
    fleet = either_fleet
    await start_rollout(fleet, tiny_bundle, devices=4, canary_share=0.5)
    orders = announced(fleet)
    await answer(fleet, orders["pi-0"], "done")
    await answer(fleet, orders["pi-1"], "rolled_back")
    about = await latest(fleet)
    assert (about["state"], about["reason"]) == ("halted", "1 of 2 answered orders failed")
    assert about["orders"] == {"done": 1, "rolled_back": 1}
    assert sorted(announced(fleet)) == ["pi-0", "pi-1"]
    (order,) = sent(fleet, "command")
    assert (order.device, order.name) == ("pi-0", "rollback")
    assert order.serial > orders["pi-0"].serial
    withdrawn = [one[0] for one in fleet.transport.orders if one[1] == b"" and one[2]]
    assert sorted(withdrawn) == [topics.bundle("ward", "pi-0"), topics.bundle("ward", "pi-1")]


async def test_an_order_without_an_answer_counts_as_failed(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=1)
    await age_orders(fleet, 3601, "sent_at_ns")
    await steps(fleet)
    assert (await latest(fleet))["state"] == "halted"


async def test_another_devices_outcome_changes_nothing(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=0.5)
    order = announced(fleet)["pi-0"]
    await fleet.transport.send(
        topics.outcome("ward", "pi-1"), encode_control(Outcome(order.id, "bundle", "failed"))
    )
    await fleet.parts.orders.write_outcomes()
    assert (await latest(fleet))["orders"] == {"sent": 1}


async def test_after_a_halt_nothing_more_is_announced(either_fleet, tiny_bundle, monkeypatch):
    for module in (orders, rollout):
        monkeypatch.setattr(module, "BATCH", 2)
    fleet = either_fleet
    name = await start_rollout(fleet, tiny_bundle, devices=9, canary_share=1.0)
    assert len(announced(fleet)) == 6
    await halt(fleet, name)
    told = len(sent(fleet, "bundle"))
    await steps(fleet, 6)
    assert len(sent(fleet, "bundle")) == told
    assert retained(fleet) == set()
    said = len(fleet.transport.orders)
    await steps(fleet)
    assert len(fleet.transport.orders) == said


@pytest.mark.parametrize(("look", "state"), [("_tally", "sent"), ("_tally", "done"), ("due", "sent")])
async def test_a_halt_between_a_look_and_its_consequence_stands(fleet, tiny_bundle, monkeypatch, look, state):
    """Whether the look would have moved the roll-out on, made orders, or sent them."""
    name = await start_rollout(fleet, tiny_bundle, devices=4, canary_share=0.5)
    for order in announced(fleet).values():
        await tell(fleet, order, state) if state == "done" else await age_orders(fleet, 61, "published_at_ns")
    told = len(sent(fleet, "bundle"))
    looker = fleet.parts.orders if look == "due" else fleet.parts.rollouts
    true_look = getattr(looker, look)

    async def slow_look(*of_what):
        seen = await true_look(*of_what)
        if of_what[-1] != "command":
            await halt(fleet, name)
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(looker, look, slow_look)
        await fleet.parts.rollouts.step()
    await steps(fleet)
    assert (await latest(fleet))["state"] == "halted"
    assert len(sent(fleet, "bundle")) == told
    actions = [one.action for one in await audit.entries(fleet.parts.store)]
    assert actions[-2:] == ["rollout.create", "rollout.halted"]


async def test_a_halt_without_a_broker_is_carried_out_when_it_is_back(
    run_cloud, settings, tiny_bundle, monkeypatch
):
    monkeypatch.setattr(rollout, "LEASE_S", 0.0)  # the second service need not wait for the end of the first's
    async with run_cloud(fleet=settings) as fleet:
        name = await start_rollout(fleet, tiny_bundle, devices=3, canary_share=1.0)
        orders = announced(fleet)
        await tell(fleet, orders["pi-0"], "done")
        await tell(fleet, orders["pi-1"], "accepted")
        fleet.transport.connected = False
        await halt(fleet, name)
        await steps(fleet)
        fleet.transport.connected = True
    async with run_cloud(fleet=settings) as fleet:  # and after a restart
        await steps(fleet)
        withdrawn = {topics.parse(topic)[1] for topic, payload, _ in fleet.transport.orders if not payload}
        assert withdrawn == {"pi-0", "pi-1", "pi-2"}
        assert [(one.device, one.name) for one in sent(fleet, "command")] == [("pi-0", "rollback")]


async def test_who_takes_the_bundle_after_the_halt_is_ordered_back(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=1.0)
    orders = announced(fleet)
    await tell(fleet, orders["pi-0"], "accepted")
    await answer(fleet, orders["pi-1"], "failed")
    assert (await latest(fleet))["state"] == "halted"
    assert sent(fleet, "command") == []
    await answer(fleet, orders["pi-0"], "done")
    (order,) = sent(fleet, "command")
    assert (order.device, order.name) == ("pi-0", "rollback")
    await tell(fleet, order, "done")
    await age_orders(fleet, 7200, "published_at_ns")
    await steps(fleet)
    assert len(sent(fleet, "command")) == 1


async def test_who_was_told_otherwise_since_is_not_ordered_back(fleet, tiny_bundle):
    """A device goes back to the bundle before the present one: once more would bring the failed one again."""
    first = await start_rollout(fleet, tiny_bundle, devices=3, canary_share=1.0)
    orders = announced(fleet)
    for order in orders.values():
        await tell(fleet, order, "accepted")
    await halt(fleet, first)
    await steps(fleet)
    await fleet.http.post("/v1/devices/ward/pi-0/commands", json={"name": "rollback"})
    second = {"model": orders["pi-1"].model, "canary_share": 0.5}  # pi-0 and pi-1
    assert (await fleet.http.post("/v1/rollouts", json=second)).status_code == 201
    await fleet.parts.rollouts.step()
    for order in orders.values():
        await tell(fleet, order, "done")
    await steps(fleet)
    assert [(one.device, one.name) for one in sent(fleet, "command")] == [
        ("pi-0", "rollback"),
        ("pi-2", "rollback"),
    ]
    assert retained(fleet) == {"pi-0", "pi-1"}


async def test_time_without_a_broker_makes_no_device_late(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=1.0)
    before = announced(fleet)
    fleet.transport.connected = False
    await move_back(fleet, 7200)
    await steps(fleet)
    fleet.transport.connected = True
    await steps(fleet)
    about = await latest(fleet)
    assert (about["state"], about["orders"]) == ("canary", {"sent": 2})
    assert len(sent(fleet, "bundle")) == 4  # once more at once: the broker may have lost the first
    after = announced(fleet)
    assert {(one.id, one.serial) for one in after.values()} == {(one.id, one.serial) for one in before.values()}
    await age_orders(fleet, 3601, "sent_at_ns")
    await steps(fleet)
    assert (await latest(fleet))["state"] == "halted"


async def test_an_order_that_the_broker_did_not_take_is_sent_later(fleet, tiny_bundle, monkeypatch):
    publish, lost = fleet.transport.publish, iter([False, True])

    def publish_or_lose(*arguments, **more):
        if next(lost, False):
            fleet.transport.connected = False
        publish(*arguments, **more)

    monkeypatch.setattr(fleet.transport, "publish", publish_or_lose)
    with pytest.raises(TransportError):
        await start_rollout(fleet, tiny_bundle, devices=2, canary_share=1.0)
    (first,) = sent(fleet, "bundle")
    await steps(fleet)
    assert len(sent(fleet, "bundle")) == 1
    fleet.transport.connected = True
    await steps(fleet)
    assert sorted(announced(fleet)) == ["pi-0", "pi-1"]
    assert announced(fleet)[first.device].id == first.id


async def test_an_order_without_an_answer_is_sent_again_less_and_less_often_while_its_ticket_is_good(
    fleet, tiny_bundle
):
    await start_rollout(fleet, tiny_bundle, devices=1, canary_share=1.0, patience_s=30 * 86_400)
    (first,) = sent(fleet, "bundle")
    for published_s, sent_s, again in (
        (50, 0, 0),
        (61, 0, 1),
        (100, 300, 0),
        (100, 150, 1),
        (13 * 3600, 20 * 86_400, 1),
    ):
        count = len(sent(fleet, "bundle"))
        now_ns = time.time_ns()
        times = {"published_at_ns": now_ns - int(published_s * 1e9), "sent_at_ns": now_ns - int(sent_s * 1e9)}
        if sent_s == 0:
            times["sent_at_ns"] = times["published_at_ns"]
        async with fleet.parts.store.write() as connection:
            await connection.execute(update(tables.orders).values(times))
        await fleet.parts.rollouts.step()
        assert len(sent(fleet, "bundle")) - count == again, (published_s, sent_s)
    last = sent(fleet, "bundle")[-1]
    assert (last.id, last.serial) == (first.id, first.serial)
    expires_s = [int(one.url.partition("ticket=")[2].partition(".")[0]) for one in (first, last)]
    assert expires_s[1] >= expires_s[0]


async def test_two_workers_at_once_order_each_device_once(either_fleet, tiny_bundle, monkeypatch):
    monkeypatch.setattr(rollout, "LEASE_S", 0.0)  # as if the first one had stood still
    for module in (orders, rollout):
        monkeypatch.setattr(module, "BATCH", 3)
    fleet, parts = either_fleet, either_fleet.parts
    await start_rollout(fleet, tiny_bundle, devices=8, canary_share=0.5)
    other_store = Store(StoreConfig(parts.store.url))
    other_orders = Orders(*(other_store, fleet.transport, parts.authority, parts.fleet, "", parts.metrics))
    other = Rollouts(other_store, other_orders, parts.registry, parts.metrics)
    for _ in range(6):
        await asyncio.gather(parts.rollouts.step(), other.step())
    await other_store.close()
    assert (await latest(fleet))["orders"] == {"sent": 4}
    assert len({one.id for one in sent(fleet, "bundle")}) == 4


async def test_rollouts_begun_at_once_are_one(either_fleet, tiny_bundle):
    fleet = either_fleet
    model = (await fleet.http.post("/v1/bundles", content=tiny_bundle.path.read_bytes())).json()["model"]
    answers = await asyncio.gather(*(fleet.http.post("/v1/rollouts", json={"model": model}) for _ in range(4)))
    assert sorted(one.status_code for one in answers) == [201, 409, 409, 409]


async def test_an_outcome_that_the_store_cannot_hold_holds_up_no_other(either_fleet, tiny_bundle):
    fleet = either_fleet
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=1.0)
    orders = announced(fleet)
    note = fleet.parts.orders.note_outcome
    note("ward", "pi-0", Outcome(orders["pi-0"].id, "bundle", "accepted"))
    note("ward", "evil", Outcome("0\0", "bundle", "failed", "\0"))
    note("ward", "pi-1", Outcome(orders["pi-1"].id, "bundle", "done"))
    await fleet.parts.orders.write_outcomes()
    assert (await latest(fleet))["orders"] == {"accepted": 1, "done": 1}


async def test_a_reason_with_the_character_0_is_refused(fleet):
    answer = await fleet.http.post("/v1/devices/pi-1/revoke", json={"reason": "a\0b"})
    assert (answer.status_code, answer.json()["reason"]) == (422, "invalid")


async def test_an_enrolled_device_speaks_for_its_own_site_only(fleet, tiny_bundle):
    await make_fleet(fleet, 2)
    assert (await enrol(fleet, "zz", request_for("zz")[1]))[1].status_code == 201
    await fleet.parts.pipeline._roster.refresh()
    status = encode_control(Status("online"))
    for site in ("ward", "a-ghost", "b-ghost"):
        await fleet.transport.send(topics.status(site, "zz"), status)
    await fleet.transport.send(topics.outcome("a-ghost", "zz"), encode_control(Outcome("0", "bundle", "done")))
    message = fleet.activation(3, device="zz")
    await fleet.transport.send(topics.activation("a-ghost", "zz"), encode(message))
    assert [type(one) for _, one in fleet.transport.published] == [Refusal]
    assert fleet.transport.published[0][1].reason == "wrong_site"
    await fleet.parts.pipeline._ledger.write()
    letters = await fleet.parts.store.dead_letters()
    assert [one.reason for one in letters] == ["wrong_site"] * 4
    assert not fleet.parts.orders._outcomes
    listed = await fleet.parts.store.devices()
    assert [(one.site, one.device) for one in listed] == [("ward", "pi-0"), ("ward", "pi-1"), ("ward", "zz")]


async def test_a_revoked_device_speaks_for_no_site_until_it_enrols_again(fleet, tiny_bundle):
    """The broker does not end the connection that it has."""
    roster = fleet.parts.pipeline._roster

    async def refusals(sequence: int) -> list[str]:
        fleet.transport.published.clear()
        await roster.refresh()
        for site in ("ward", "a-ghost"):
            message = encode(fleet.activation(sequence, device="zz"))
            await (await fleet.transport.send(topics.activation(site, "zz"), message)).done.wait()
        return [one.reason if isinstance(one, Refusal) else "" for _, one in fleet.transport.published]

    assert (await enrol(fleet, "zz", request_for("zz")[1]))[1].status_code == 201
    assert sorted(await refusals(1)) == ["", "wrong_site"]
    assert (await fleet.http.post("/v1/devices/zz/revoke", json={})).status_code == 200
    assert await refusals(2) == ["revoked", "revoked"]
    roster._form = None  # as a worker that starts now, and finds nobody enrolled
    roster._sites = {}
    assert await refusals(2) == ["revoked", "revoked"]
    assert (await enrol(fleet, "zz", request_for("zz")[1]))[1].status_code == 201
    assert sorted(await refusals(3)) == ["", "wrong_site"]


async def test_a_rollout_leaves_out_where_a_device_is_not_enrolled(either_fleet, tiny_bundle):
    """Such a row may be from before the cloud looked at sites; devices that never enrolled are of the fleet."""
    fleet = either_fleet
    status = encode_control(Status("online"))
    for site in ("a-ghost", "ward"):
        await fleet.transport.send(topics.status(site, "zz"), status)
    await fleet.parts.pipeline._ledger.write()
    assert (await enrol(fleet, "zz", request_for("zz")[1]))[1].status_code == 201
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=1.0)
    assert sorted((one.site, one.device) for one in sent(fleet, "bundle")) == [
        ("ward", "pi-0"),
        ("ward", "pi-1"),
        ("ward", "zz"),
    ]


async def test_a_revoked_device_leaves_the_fleet(either_fleet, tiny_bundle):
    fleet = either_fleet
    answer = (await enrol(fleet, "a-old", request_for("a-old")[1]))[1]
    assert answer.status_code == 201, answer.text
    status = encode_control(Status("online"))
    await fleet.transport.send(topics.status("ward", "a-old"), status)
    await start_rollout(fleet, tiny_bundle, devices=3)
    assert list(announced(fleet)) == ["a-old"]
    assert (await fleet.http.post("/v1/devices/a-old/revoke", json={})).status_code == 200
    listed = (await fleet.http.get("/v1/devices")).json()["devices"]
    assert [one["device"] for one in listed] == ["pi-0", "pi-1", "pi-2"]
    await fleet.transport.send(topics.status("ward", "a-old"), status)  # the broker has no new list yet
    await fleet.parts.pipeline._ledger.write()
    await age_orders(fleet, 3601, "sent_at_ns")
    await steps(fleet)
    assert (await latest(fleet))["state"] == "canary"
    assert list(announced(fleet)) == ["a-old", "pi-0"]


async def test_the_frames_that_wait_are_believed_up_to_a_limit(fleet):
    topic = topics.status("ward", "pi-1")
    await fleet.transport.send(topic, encode_control(Status("online", queued=2**63 - 1)))
    assert fleet.metric("splitward_devices_queued") == ledger.MAX_QUEUED
    await fleet.transport.send(topic, b'{"type":"status","state":"online","queued":' + b"9" * 400 + b"}")
    assert (await fleet.http.get("/metrics")).status_code == 200
    assert fleet.metric("splitward_refusals_total", reason="bad_json") == 1


async def test_the_audit_trail_shows_what_was_changed_in_it(fleet):
    for site in ("a", "b", "c"):
        await fleet.http.post("/v1/enrolment-tokens", json={"site": site})
    assert (await fleet.http.get("/v1/audit/check")).json() == {"whole": True, "broken_at": None}
    entries = (await fleet.http.get("/v1/audit")).json()["entries"]
    assert [(one["actor"], one["action"], one["target"]) for one in entries] == [
        ("local", "enrolment.invite", f"{site}/*") for site in ("a", "b", "c")
    ]
    async with fleet.parts.store.write() as connection:
        await connection.execute(update(tables.audit).where(tables.audit.c.number == 2).values(target="x/*"))
    assert await audit.verify(fleet.parts.store) == 2


async def test_an_order_that_a_device_would_refuse_for_its_size_is_not_sent(fleet):
    def asked(text: str) -> dict:
        return {"name": "configure", "arguments": {"settings": text}}

    url, fits = "/v1/devices/ward/pi-1/commands", asked("x" * 48_500)
    assert (await fleet.http.post(url, json=fits)).status_code == 202
    ((_, payload, _),) = fleet.transport.orders
    key = fleet.parts.authority.order_key.public_key()
    assert isinstance(decode_order(payload, key, site="ward", device="pi-1"), Command)
    half = b'{"name": "configure", "arguments": {"settings": "\\ud800"}}'  # of a pair of UTF-16
    for content, reason in ((json.dumps(asked("x" * 49_152)), "oversize"), (half, "bad_arguments")):
        answer = await fleet.http.post(url, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["reason"]) == (422, reason)
    assert "65536" in (await fleet.http.post(url, json=asked("x" * 60_000))).json()["detail"]
    assert len(fleet.transport.orders) == len(await fleet.parts.store.read(tables.orders.select())) == 1


async def test_without_a_broker_an_order_is_503(fleet):
    fleet.transport.connected = False
    answer = await fleet.http.post("/v1/devices/ward/pi-1/commands", json={"name": "restart"})
    assert (answer.status_code, answer.json()["reason"]) == (503, "broker")
    assert answer.headers["retry-after"] == "5"


async def test_labels_give_the_accuracy(cloud):
    for sequence, index in enumerate((1, 1, 2)):
        await cloud.send(cloud.activation(sequence, (0, 5, 0)))
        label = {"device": "pi-1", "boot": (b"b" * 16).hex(), "sequence": sequence, "class_index": index}
        assert (await cloud.http.post("/v1/labels", json=[label])).status_code == 201
    found = (await cloud.http.get("/v1/accuracy")).json()["models"]
    assert [(one["labelled"], one["right"]) for one in found] == [(3, 2)]
