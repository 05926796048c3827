"""The bundles that devices may be told to run: verified when they come, kept by model id, served by ticket."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select

from cloud import audit, tables
from cloud.problem import Problem
from cloud.store import Store
from splitward.disk import move_whole
from splitward.errors import BundleError
from splitward.wire.bundle import Bundle, read_bundle

MAX_BYTES = 512 << 20
ABANDONED_S = 3600.0
"""An upload to which nothing was added for so long was cut off with its process."""


class Registry:
    """Bundles in a folder, and what is known of them in the store."""

    def __init__(self, store: Store, folder: Path, trusted: Ed25519PublicKey | None) -> None:
        self._store = store
        self._folder = folder
        self._trusted = trusted

    async def add(self, chunks: AsyncIterator[bytes], actor: str) -> dict[str, Any]:
        """Keep a bundle; `Problem` 409 without a trusted key, 413 when it is too large, 422 when it is refused."""
        if self._trusted is None:
            raise Problem(409, "no_trusted_key", "set fleet.trusted_key to the public key that signs bundles.")
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._folder)
        partial = self._folder / f"{secrets.token_hex(8)}.partial"
        try:
            digest, size = await _receive(chunks, partial)
            try:
                bundle = await asyncio.to_thread(read_bundle, partial, self._trusted)
            except BundleError as error:
                message = str(error).replace(str(partial), "the bundle")
                raise Problem(422, error.reason, message) from error
            move_whole(partial, self.path(bundle.model.hex()))
        finally:
            partial.unlink(missing_ok=True)
        row = _row(bundle, digest, size)
        async with self._store.write() as connection:
            insert = self._store.insert(tables.bundles)
            await connection.execute(
                insert.on_conflict_do_update(
                    index_elements=[tables.bundles.c.model],
                    set_={"sha256": insert.excluded.sha256, "size": insert.excluded.size},
                ),
                row,
            )
            await audit.record(connection, actor, "bundle.add", row["model"], name=row["name"], sha256=digest)
        return row

    async def find(self, model: str) -> dict[str, Any]:
        """What is known of a bundle; `Problem` 404 when it is not here."""
        rows = await self._store.read(select(tables.bundles).where(tables.bundles.c.model == model))
        if not rows:
            raise Problem(404, "unknown_bundle", f"no bundle has the model id {model}. Upload it first.")
        return dict(rows[0])

    async def every(self) -> list[dict[str, Any]]:
        """Every bundle, newest first."""
        query = select(tables.bundles).order_by(tables.bundles.c.added_at_ns.desc())
        return [dict(row) for row in await self._store.read(query)]

    def path(self, model: str) -> Path:
        """Where the file of a bundle lies."""
        return self._folder / f"{model}.bundle"


def _remove_abandoned(folder: Path) -> None:
    for partial in folder.glob("*.partial"):
        with suppress(FileNotFoundError):  # it has just ended, in this worker or another
            if time.time() - partial.stat().st_mtime > ABANDONED_S:
                partial.unlink()


async def _receive(chunks: AsyncIterator[bytes], path: Path) -> tuple[str, int]:
    """Write the chunks to `path`, to the disk; their SHA-256 and size."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        async for chunk in chunks:
            size += len(chunk)
            if size > MAX_BYTES:
                raise Problem(413, "oversize", f"a bundle has at most {MAX_BYTES} bytes.")
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return digest.hexdigest(), size


def _row(bundle: Bundle, digest: str, size: int) -> dict[str, Any]:
    return {
        "model": bundle.model.hex(),
        "name": bundle.manifest.name,
        "sha256": digest,
        "size": size,
        "created_at": bundle.manifest.created_at,
        "added_at_ns": time.time_ns(),
        "manifest": msgspec.to_builtins(bundle.manifest),
    }
