"""Who may ask: tokens with scopes, hashed at rest, and how often."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from typing import Annotated, Literal

import msgspec
from fastapi import Depends, Request
from sqlalchemy import select, update

from cloud import audit, tables
from cloud.config import ApiConfig, is_loopback
from cloud.problem import Problem
from cloud.store import Store

Scope = Literal["read", "operate"]
PREFIX = "swt_"
LOCAL = "local"
"""Who asks on loopback without a token."""
MAX_CALLERS = 10_000


class Caller(msgspec.Struct, frozen=True):
    """Who asks, and what they may do; `operate` includes `read`."""

    name: str
    scopes: frozenset[str]


def digest_secret(secret: str) -> str:
    """What is kept of a token. Its 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Access:
    """Makes, checks and revokes tokens; counts requests by caller."""

    def __init__(self, store: Store, config: ApiConfig) -> None:
        self._store = store
        self._free = is_loopback(config.host) and not config.require_token
        self._rate, self._burst = config.requests_per_s, float(config.burst)
        self._allowance: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def create(self, name: str, scopes: tuple[Scope, ...], actor: str, days: float | None = None) -> str:
        """A new token, which only its holder will know; `Problem` 409 when the name is taken."""
        secret, now_ns = PREFIX + secrets.token_urlsafe(32), time.time_ns()
        row = {
            "name": name,
            "digest": digest_secret(secret),
            "scopes": sorted(scopes),
            "created_at_ns": now_ns,
            "expires_at_ns": None if days is None else now_ns + int(days * 86_400e9),
        }
        async with self._store.write() as connection:
            insert = self._store.insert(tables.tokens).on_conflict_do_nothing().returning(tables.tokens.c.name)
            if (await connection.execute(insert, row)).first() is None:
                raise Problem(409, "taken", f"a token is called {name} already. Choose another name.")
            await audit.record(connection, actor, "token.create", name, scopes=sorted(scopes))
        return secret

    async def revoke(self, name: str, actor: str) -> None:
        """Make a token useless at once; an open stream ends within seconds. `Problem` 404 when there is none."""
        tokens = tables.tokens
        change = (
            update(tokens)
            .where(tokens.c.name == name, tokens.c.revoked_at_ns.is_(None))
            .values(revoked_at_ns=time.time_ns())
        )
        async with self._store.write() as connection:
            if (await connection.execute(change)).rowcount == 0:
                raise Problem(404, "unknown", f"no valid token is called {name}.")
            await audit.record(connection, actor, "token.revoke", name)

    async def identify(self, request: Request) -> Caller:
        """Caller of `request`; `Problem` 401 without a valid token where one is needed, 429 when too often."""
        kind, secret = _credentials(request)
        if not secret and self._free:
            self._count(LOCAL)
            return Caller(LOCAL, frozenset(("read", "operate")))
        host = request.client.host if request.client else "unknown"
        if kind.lower() != "bearer" or not secret:
            self._count(host)
            raise Problem(
                401, "no_token", "send `Authorization: Bearer TOKEN`.", {"WWW-Authenticate": "Bearer"}
            )
        caller = await self._find(secret)
        if caller is not None:
            self._count(f"token {caller.name}")
            return caller
        self._count(host)
        raise Problem(
            401, "bad_token", "the token is unknown, revoked or expired.", {"WWW-Authenticate": "Bearer"}
        )

    async def is_good(self, request: Request) -> bool:
        """Whether the token of `request`, which was let in, is still good; asked while its answer goes on."""
        _, secret = _credentials(request)
        return not secret or await self._find(secret) is not None

    async def _find(self, secret: str) -> Caller | None:
        """Holder of a token that is known, not revoked and not expired."""
        tokens = tables.tokens.c
        good = (
            tokens.digest == digest_secret(secret),
            tokens.revoked_at_ns.is_(None),
            tokens.expires_at_ns.is_(None) | (tokens.expires_at_ns > time.time_ns()),
        )
        rows = await self._store.read(select(tokens.name, tokens.scopes).where(*good))
        return Caller(rows[0]["name"], frozenset(rows[0]["scopes"])) if rows else None

    def _count(self, caller: str) -> None:
        """Take one from the caller's allowance, which refills at the configured rate."""
        now_s = time.monotonic()
        left, at_s = self._allowance.pop(caller, (self._burst, now_s))
        left = min(self._burst, left + (now_s - at_s) * self._rate)
        self._allowance[caller] = (max(0.0, left - 1), now_s)
        if len(self._allowance) > MAX_CALLERS:
            self._allowance.popitem(last=False)
        if left < 1:
            raise Problem(429, "too_often", "too many requests.", {"Retry-After": str(1 + int(1 / self._rate))})


def _credentials(request: Request) -> tuple[str, str]:
    """Kind and secret of the header `Authorization`."""
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return kind, secret


async def may_read(request: Request) -> Caller:
    """Dependency: the caller may read."""
    caller = await request.app.state.service.access.identify(request)
    return _with_scope(caller, "read")


async def may_operate(request: Request) -> Caller:
    """Dependency: the caller may operate."""
    caller = await request.app.state.service.access.identify(request)
    return _with_scope(caller, "operate")


async def count_stranger(request: Request) -> None:
    """Dependency of what needs no token: it is still counted by address."""
    host = request.client.host if request.client else "unknown"
    request.app.state.service.access._count(host)


def _with_scope(caller: Caller, scope: Scope) -> Caller:
    if scope in caller.scopes or "operate" in caller.scopes:
        return caller
    raise Problem(403, "scope", f"token {caller.name} has no {scope} scope.")


Reader = Annotated[Caller, Depends(may_read)]
Operator = Annotated[Caller, Depends(may_operate)]
