"""Certificates renewed and revoked at the same time, on both databases, and the list of those that are revoked."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud import enrolment, tables
from cloud.authority import RENEWAL, Authority
from cloud.config import FleetConfig, StoreConfig
from cloud.enrolment import MAX_A_DAY, Enrolment
from cloud.problem import Problem
from cloud.store import Store

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request, tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/cloud.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    store = Store(StoreConfig(url))
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def desk(store, tmp_path) -> Enrolment:
    return Enrolment(store, Authority(tmp_path / "fleet"), FleetConfig())


def request_for(device: str, key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


async def enrol(desk: Enrolment, device: str) -> tuple[str, str, bytes]:
    """What `device`, now enrolled, renews its certificate with."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = request_for(device, key)
    token = (await desk.create_token("ward", device, 1, "test"))["token"]
    certificate = await desk.enrol(token, "ward", device, csr)
    return certificate, csr, key.sign(RENEWAL + csr.encode(), ec.ECDSA(hashes.SHA256()))


async def revoked_serials(desk: Enrolment) -> set[int]:
    return {one.serial_number for one in x509.load_pem_x509_crl(await desk.revocation_list())}


async def test_no_renewal_slips_past_a_revocation(desk, store):
    for number in range(10):
        device = f"pi-{number}"
        proof = await enrol(desk, device)
        work = [desk.renew(*proof) for _ in range(4)]
        work.insert(2, desk.revoke(device, "stolen", "test"))
        answers = await asyncio.gather(*work, return_exceptions=True)
        assert isinstance(answers[2], int)
        assert all(isinstance(one, (str, int)) or one.reason == "revoked" for one in answers), answers
    known = tables.certificates
    assert await store.read(known.select().where(known.c.revoked_at_ns.is_(None))) == []
    assert len(await revoked_serials(desk)) == len(await store.read(known.select()))


async def refused(work) -> str:
    with pytest.raises(Problem) as caught:
        await work
    return caught.value.reason


async def test_an_answer_that_was_lost_is_given_again_to_the_same_key(desk, store):
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    token = (await desk.create_token("ward", None, 1, "test"))["token"]
    ask = partial(desk.enrol, token, "ward", "pi-1")
    together = await asyncio.gather(*(ask(request_for("pi-1", key)) for _ in range(3)))
    for pem in together:
        assert x509.load_pem_x509_certificate(pem.encode()).public_key() == key.public_key()
    assert len(await store.read(tables.certificates.select())) == 3, "each can be revoked"
    assert await refused(ask(request_for("pi-1", other))) == "bad_token"
    assert await refused(desk.enrol(token, "ward", "pi-2", request_for("pi-2", key))) == "bad_token"
    assert await refused(desk.enrol(token, "else", "pi-1", request_for("pi-1", key))) == "bad_token"
    for _ in range(MAX_A_DAY - 3):
        await ask(request_for("pi-1", key))
    assert await refused(ask(request_for("pi-1", key))) == "too_often"


async def test_a_used_token_is_none_after_its_end_or_a_revocation(desk, store):
    key = ec.generate_private_key(ec.SECP256R1())
    tokens = [(await desk.create_token("ward", None, 1, "test"))["token"] for _ in range(2)]
    ask = partial(desk.enrol, site="ward", device="pi-1", csr=request_for("pi-1", key))
    await ask(tokens[0])
    await desk.revoke("pi-1", "lost", "test")
    assert await refused(ask(tokens[0])) == "bad_token"
    await ask(tokens[1])
    assert await refused(ask(tokens[0])) == "bad_token", "it is the other token's device now"
    await ask(tokens[1])
    async with store.write() as connection:
        await connection.execute(tables.enrolment_tokens.update().values(expires_at_ns=time.time_ns()))
    assert await refused(ask(tokens[1])) == "bad_token"


async def test_a_device_gets_a_few_certificates_a_day(desk, store):
    proof = await enrol(desk, "pi-1")
    for _ in range(MAX_A_DAY - 1):
        await desk.renew(*proof)
    with pytest.raises(Problem, match="within a day") as refused:
        await desk.renew(*proof)
    assert (refused.value.status_code, refused.value.reason) == (429, "too_often")
    assert len(await store.read(tables.certificates.select())) == MAX_A_DAY
    yesterday = tables.certificates.update().values(issued_at_ns=time.time_ns() - enrolment.DAY_NS)
    async with store.write() as connection:
        await connection.execute(yesterday)
    await desk.renew(*proof)


async def test_a_list_is_kept_for_a_while_and_told_of_a_revocation_at_once(desk, monkeypatch):
    await enrol(desk, "pi-1")
    first = await desk.revocation_list()
    assert await desk.revocation_list() is first
    await desk.revoke("pi-1", "lost", "test")
    assert len(await revoked_serials(desk)) == 1
    second = await desk.revocation_list()
    monkeypatch.setattr(enrolment, "LIST_S", 0.0)
    assert await desk.revocation_list() is not second


async def test_a_list_is_made_beside_the_event_loop(store, tmp_path, monkeypatch):
    authority, threads = Authority(tmp_path / "fleet"), []
    make = authority.revocation_list

    def noted(revoked) -> bytes:
        threads.append(threading.get_ident())
        return make(revoked)

    monkeypatch.setattr(authority, "revocation_list", noted)
    rows = [
        {"serial": f"{number + 1:x}", "site": "ward", "device": "pi-1", "issued_at_ns": 1}
        | {"expires_at_ns": 2**62, "revoked_at_ns": 1}
        for number in range(3)
    ]
    async with store.write() as connection:
        await connection.execute(tables.certificates.insert(), rows)
    desk = Enrolment(store, authority, FleetConfig())
    found = await asyncio.gather(*(revoked_serials(desk) for _ in range(4)))
    assert found == [{1, 2, 3}] * 4
    assert len(threads) == 1  # those that ask together share one
    assert threads[0] != threading.get_ident()
