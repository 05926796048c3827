"""Tokens, enrolment, bundles, roll-outs and the audit trail, through the API on a real database."""

from __future__ import annotations

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

from cloud import audit, tables
from cloud.authority import RENEWAL
from cloud.config import ApiConfig
from cloud.logs import JsonFormatter, TextFormatter
from splitward.wire import topics
from splitward.wire.control import Outcome, Status, encode_control
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
async def fleet(run_cloud, tiny_bundle):
    settings = {"trusted_key": str(tiny_bundle.trusted_key), "broker_host": "broker.example"}
    async with run_cloud(fleet=settings) as cloud:
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
    again = await fleet.http.post("/v1/enrolments", json=body)
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


async def test_tokens_have_scopes_and_can_be_revoked(run_cloud):
    async with run_cloud(api=ApiConfig(require_token=True)) as cloud:
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
    async with run_cloud(api=ApiConfig(requests_per_s=0.001, burst=3)) as cloud:
        codes = [(await cloud.http.get("/v1/results")).status_code for _ in range(4)]
    assert codes == [200, 200, 200, 429]


async def test_a_body_is_bounded_and_every_answer_has_an_id(run_cloud):
    async with run_cloud(api=ApiConfig(max_body_bytes=2000)) as cloud:
        answer = await cloud.http.post("/v1/enrolment-tokens", content=b"x" * 3000)
        named = await cloud.http.get("/v1/results", headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.json()["reason"]) == (413, "oversize")
    assert answer.headers["x-request-id"]
    assert named.headers["x-request-id"] == "mine"


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


async def start_rollout(cloud, bundle, devices: int, **plan) -> str:
    for number in range(devices):
        status = encode_control(Status("online", model="0" * 32))
        await cloud.transport.send(topics.status("ward", f"pi-{number}"), status)
    await cloud.parts.pipeline._ledger.write()
    model = (await cloud.http.post("/v1/bundles", content=bundle.path.read_bytes())).json()["model"]
    answer = await cloud.http.post("/v1/rollouts", json={"model": model, "canary_share": 0.25} | plan)
    assert answer.status_code == 201
    await cloud.parts.rollouts.step()
    return answer.json()["id"]


def announced(cloud) -> dict[str, Announcement]:
    key = cloud.parts.authority.order_key.public_key()
    found = {}
    for topic, payload, retain in cloud.transport.orders:
        site, device, kind = topics.parse(topic)
        if kind == "bundle" and payload:
            assert retain
            found[device] = decode_order(payload, key, site=site, device=device)
    return found


async def answer(cloud, order, state: str) -> None:
    outcome = encode_control(Outcome(order.id, "bundle", state, model=order.model))
    await cloud.transport.send(topics.outcome("ward", order.device), outcome)
    await cloud.parts.rollouts.write_outcomes()
    await cloud.parts.rollouts.step()


async def test_a_rollout_goes_to_the_canaries_first_and_then_to_all(fleet, tiny_bundle):
    rollout = await start_rollout(fleet, tiny_bundle, devices=4)
    canaries = announced(fleet)
    assert list(canaries) == ["pi-0"]
    assert canaries["pi-0"].url.startswith("http://127.0.0.1:8080/v1/bundles/")
    fetched = await fleet.http.get(canaries["pi-0"].url)
    assert hashlib.sha256(fetched.content).hexdigest() == canaries["pi-0"].sha256
    await fleet.parts.rollouts.step()
    assert len(announced(fleet)) == 1
    await answer(fleet, canaries["pi-0"], "done")
    await fleet.parts.rollouts.step()
    orders = announced(fleet)
    assert sorted(orders) == ["pi-0", "pi-1", "pi-2", "pi-3"]
    for device in ("pi-1", "pi-2", "pi-3"):
        await answer(fleet, orders[device], "done")
    (about,) = (await fleet.http.get("/v1/rollouts")).json()["rollouts"]
    assert (about["id"], about["state"], about["orders"]) == (rollout, "done", {"done": 4})


async def test_a_failing_canary_halts_the_rollout(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=4, canary_share=0.5)
    orders = announced(fleet)
    await answer(fleet, orders["pi-0"], "done")
    await answer(fleet, orders["pi-1"], "rolled_back")
    (about,) = (await fleet.http.get("/v1/rollouts")).json()["rollouts"]
    assert (about["state"], about["reason"]) == ("halted", "1 of 2 answered orders failed")
    assert sorted(announced(fleet)) == ["pi-0", "pi-1"]
    key = fleet.parts.authority.order_key.public_key()
    sent = [one for one in fleet.transport.orders if one[0] == topics.command("ward", "pi-0")]
    order = decode_order(sent[0][1], key, site="ward", device="pi-0")
    assert isinstance(order, Command)
    assert order.name == "rollback"
    assert order.serial > orders["pi-0"].serial
    withdrawn = [one[0] for one in fleet.transport.orders if one[1] == b"" and one[2]]
    assert sorted(withdrawn) == [topics.bundle("ward", "pi-0"), topics.bundle("ward", "pi-1")]


async def test_an_order_without_an_answer_counts_as_failed(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=1)
    async with fleet.parts.store.write() as connection:
        await connection.execute(update(tables.orders).values(sent_at_ns=0))
    await fleet.parts.rollouts.step()
    (about,) = (await fleet.http.get("/v1/rollouts")).json()["rollouts"]
    assert about["state"] == "halted"


async def test_another_devices_outcome_changes_nothing(fleet, tiny_bundle):
    await start_rollout(fleet, tiny_bundle, devices=2, canary_share=0.5)
    order = announced(fleet)["pi-0"]
    await fleet.transport.send(
        topics.outcome("ward", "pi-1"), encode_control(Outcome(order.id, "bundle", "failed"))
    )
    await fleet.parts.rollouts.write_outcomes()
    (about,) = (await fleet.http.get("/v1/rollouts")).json()["rollouts"]
    assert about["orders"] == {"sent": 1}


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
