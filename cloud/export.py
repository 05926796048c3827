"""Results as a CSV file of any length, page by page: nothing but one page is ever held."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator

from cloud.record import Record
from cloud.store import Store

COLUMNS = (
    "site", "device", "boot", "sequence", "captured_at_ns", "received_at_ns", "stored_at_ns", "model",
    "class_index", "class_name", "attacked", "recovered", "fused", "scores",
)  # fmt: skip
_PAGE = 1000


async def csv_of_results(
    store: Store, *, device: str | None, site: str | None, model: str | None, after: str
) -> AsyncIterator[bytes]:
    """Header and rows, in the order of storing; scores are separated by spaces.

    A page that cannot be read ends the file early, and the connection with it: the reader sees that it is not whole.
    """
    yield _lines([COLUMNS])
    while page := await store.results(device=device, site=site, model=model, after=after, limit=_PAGE):
        yield _lines([_row(record) for record in page])
        after = page[-1].cursor


def _row(record: Record) -> tuple[object, ...]:
    result = record.result
    return (
        record.site, record.device, result.boot, result.sequence, result.captured_at_ns, record.received_at_ns,
        result.stored_at_ns, result.model, result.class_index, _text(result.class_name),
        *(result.streams.get(name, "") for name in ("attacked", "recovered", "fused")),
        " ".join(f"{score:.6g}" for score in result.scores),
    )  # fmt: skip


def _text(value: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _lines(rows: list[tuple[object, ...]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()
