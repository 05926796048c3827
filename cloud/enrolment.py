"""How a device gets its certificate: a one-time token made by an operator, a request signed on the device.

A token that is used becomes one of its device's key: an answer may be lost, and the same device may ask again.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import audit, tables
from cloud.access import digest_secret
from cloud.authority import Authority
from cloud.config import FleetConfig
from cloud.problem import Problem
from cloud.store import Store
from splitward.errors import MessageError

PREFIX = "swe_"
DAY_NS = 86_400 * 10**9
MAX_A_DAY = 5
"""Certificates of a device that may be made within a day. It renews once a year, and tries again four times a day."""
LIST_S = 60.0
"""How long a revocation list is given out, unless this worker revokes."""


class Enrolment:
    """Enrols devices, renews and revokes their certificates."""

    def __init__(self, store: Store, authority: Authority, config: FleetConfig) -> None:
        self._store = store
        self._authority = authority
        self._days = config.certificate_days
        self._list = b""
        self._listed_s = self._revoked_s = -math.inf
        self._listing = asyncio.Lock()

    async def create_token(self, site: str, device: str | None, hours: float, actor: str) -> dict[str, Any]:
        """A token with which one device of `site` (this one, if named) may enrol within `hours`."""
        secret, now_ns = PREFIX + secrets.token_urlsafe(32), time.time_ns()
        row = {
            "id": secrets.token_hex(16),
            "digest": digest_secret(secret),
            "site": site,
            "device": device,
            "created_at_ns": now_ns,
            "expires_at_ns": now_ns + int(hours * 3600e9),
        }
        async with self._store.write() as connection:
            await connection.execute(tables.enrolment_tokens.insert(), row)
            await audit.record(connection, actor, "enrolment.invite", f"{site}/{device or '*'}", id=row["id"])
        return {"token": secret, "id": row["id"], "expires_at_ns": row["expires_at_ns"]}

    async def enrol(self, token: str, site: str, device: str, csr: str) -> str:
        """The device's certificate, PEM; `Problem` 403, 409, 422, or 429 beyond `MAX_A_DAY`.

        Within the token's life the same device may ask again, for the same key, until it is revoked.
        """
        request = self._read(csr, device)
        used, now_ns = tables.enrolment_tokens, time.time_ns()
        bound = _digest_with_key(token, request)
        claim = (
            update(used)
            .where(
                used.c.digest == digest_secret(token),
                used.c.site == site,
                used.c.used_at_ns.is_(None),
                used.c.expires_at_ns > now_ns,
                (used.c.device.is_(None)) | (used.c.device == device),
            )
            .values(used_at_ns=now_ns, used_by=device, digest=bound)
        )
        # One that was revoked meanwhile, and perhaps enrolled anew, has no row of that moment.
        known = tables.enrolled
        again = (
            select(known.c.device)
            .join(used, (used.c.used_by == known.c.device) & (used.c.used_at_ns == known.c.at_ns))
            .where(
                used.c.digest == bound,
                used.c.site == site,
                used.c.used_by == device,
                used.c.expires_at_ns > now_ns,
            )
            .with_for_update(of=known)
        )
        async with self._store.write() as connection:
            if (await connection.execute(claim)).rowcount != 1:
                if (await connection.execute(again)).first() is None:
                    raise Problem(
                        403, "bad_token", "the token is unknown, used, expired, or for another device."
                    )
                return await self._issue(connection, request, site, device, "device.enrol")
            enrolled = (
                self._store.insert(tables.enrolled).on_conflict_do_nothing().returning(tables.enrolled.c.device)
            )
            row = {"device": device, "site": site, "at_ns": now_ns}
            # PostgreSQL counts no rows of an insert.
            if (await connection.execute(enrolled, row)).first() is None:
                raise Problem(409, "taken", f"a device is called {device} already: ids are unique in a fleet.")
            return await self._issue(connection, request, site, device, "device.enrol")

    async def renew(self, certificate: str, csr: str, signature: bytes) -> str:
        """A new certificate for the holder of a valid one; `Problem` 403, 422, or 429 beyond `MAX_A_DAY`."""
        try:
            old = self._authority.check_renewal(certificate, csr, signature)
        except MessageError as error:
            raise Problem(403, error.reason, str(error)) from error
        known, enrolled, now_ns = tables.certificates, tables.enrolled, time.time_ns()
        # `revoke` takes the same row of `enrolled`: it sees the new certificate, or comes first.
        holder = (
            select(known.c.site, known.c.device)
            .join(enrolled, enrolled.c.device == known.c.device)
            .where(
                known.c.serial == f"{old.serial_number:x}",
                known.c.revoked_at_ns.is_(None),
                known.c.expires_at_ns > now_ns,
            )
            .with_for_update(of=enrolled)
        )
        async with self._store.write() as connection:
            found = (await connection.execute(holder)).first()
            if found is None:
                raise Problem(403, "revoked", "the certificate is revoked or expired; enrol the device again.")
            return await self._issue(connection, self._read(csr, found.device), *found, "device.renew")

    async def revoke(self, device: str, reason: str, actor: str) -> int:
        """Revoke every certificate of `device`, which may then enrol anew; how many; `Problem` 404 if none."""
        known = tables.certificates
        change = (
            update(known)
            .where(known.c.device == device, known.c.revoked_at_ns.is_(None))
            .values(revoked_at_ns=time.time_ns(), reason=reason)
        )
        row = select(tables.enrolled).where(tables.enrolled.c.device == device).with_for_update()
        async with self._store.write() as connection:
            await connection.execute(row)
            count = (await connection.execute(change)).rowcount
            if not count:
                raise Problem(404, "unknown", f"{device} has no valid certificate.")
            for table in (tables.enrolled, tables.devices):
                await connection.execute(table.delete().where(table.c.device == device))
            await audit.record(connection, actor, "device.revoke", device, reason=reason)
        self._revoked_s = time.monotonic()
        return count

    async def revocation_list(self) -> bytes:
        """The signed list of what is revoked and has not expired, PEM; others' revocations are in it after `LIST_S`."""
        async with self._listing:
            now_s = time.monotonic()
            if self._listed_s <= max(self._revoked_s, now_s - LIST_S):
                self._list, self._listed_s = await self._make_list(), now_s
            return self._list

    async def _make_list(self) -> bytes:
        known = tables.certificates.c
        rows = await self._store.read(
            select(known.serial, known.revoked_at_ns)
            .where(known.revoked_at_ns.is_not(None), known.expires_at_ns > time.time_ns())
            .order_by(known.serial)
        )
        revoked = [(int(row["serial"], 16), row["revoked_at_ns"]) for row in rows]
        return await asyncio.to_thread(self._authority.revocation_list, revoked)

    async def _issue(
        self,
        connection: AsyncConnection,
        request: x509.CertificateSigningRequest,
        site: str,
        device: str,
        action: str,
    ) -> str:
        """A certificate that is noted in the transaction of `connection`, PEM; `Problem` 429 beyond `MAX_A_DAY`."""
        known, now_ns = tables.certificates, time.time_ns()
        lately = select(func.count()).where(
            known.c.device == device,
            known.c.revoked_at_ns.is_(None),
            known.c.issued_at_ns > now_ns - DAY_NS,
        )
        if (await connection.execute(lately)).scalar_one() >= MAX_A_DAY:
            detail = f"{device} was given {MAX_A_DAY} certificates within a day: use the last, or wait."
            raise Problem(429, "too_often", detail, {"Retry-After": "21600"})
        certificate = self._authority.issue(request, device, self._days)
        row = {
            "serial": f"{certificate.serial_number:x}",
            "site": site,
            "device": device,
            "issued_at_ns": now_ns,
            "expires_at_ns": int(certificate.not_valid_after_utc.timestamp()) * 1_000_000_000,
        }
        await connection.execute(known.insert(), row)
        await audit.record(connection, f"device {device}"[:64], action, f"{site}/{device}")
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _read(self, csr: str, device: str) -> x509.CertificateSigningRequest:
        try:
            return self._authority.read_request(csr, device)
        except MessageError as error:
            raise Problem(422, error.reason, str(error)) from error


def _digest_with_key(token: str, request: x509.CertificateSigningRequest) -> str:
    """What is kept of a token once it was used, for the request's key."""
    key = request.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return digest_secret(f"{token}\0{key.decode()}")
