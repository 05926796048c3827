"""Results as a file of any length, CSV or Parquet, page by page: nothing but one page is ever held."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from typing import Any

from cloud.record import Record
from cloud.store import Store

COLUMNS = (
    "site", "device", "boot", "sequence", "captured_at_ns", "received_at_ns", "stored_at_ns", "model",
    "class_index", "class_name", "attacked", "recovered", "fused", "scores",
)  # fmt: skip
_PAGE = 1000
ROW_GROUP = 50
"""Pages in a row group of Parquet: readers skip whole groups, and small ones cost more than they hold."""


async def csv_of_results(
    store: Store, *, device: str | None, site: str | None, model: str | None, since_ns: int
) -> AsyncIterator[bytes]:
    """Header and rows, by the time of storing; scores are separated by spaces.

    A page that cannot be read ends the file early, and the connection with it: the reader sees that it is not whole.
    """
    yield _lines([COLUMNS])
    async for page in store.history(since_ns, _PAGE, device=device, site=site, model=model):
        yield _lines([_row(record) for record in page])


async def parquet_of_results(
    store: Store, *, device: str | None, site: str | None, model: str | None, since_ns: int
) -> AsyncIterator[bytes]:
    """The same columns as Parquet, compressed; times are timestamps in UTC, scores are lists of float32.

    A page that cannot be read ends the file without its footer: no reader takes it for a whole one. Needs pyarrow.
    """
    import pyarrow
    from pyarrow import parquet

    columns = [
        *((name, pyarrow.string()) for name in ("site", "device", "boot")),
        ("sequence", pyarrow.int64()),
        *((name, pyarrow.timestamp("ns", tz="UTC")) for name in ("captured_at", "received_at", "stored_at")),
        ("model", pyarrow.string()),
        ("class_index", pyarrow.int32()),
        ("class_name", pyarrow.string()),
        *((name, pyarrow.int32()) for name in ("attacked", "recovered", "fused")),
        ("scores", pyarrow.list_(pyarrow.float32())),
    ]
    schema, sink = pyarrow.schema(columns), _Sink()
    with parquet.ParquetWriter(pyarrow.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
        rows: list[tuple[object, ...]] = []
        async for page in store.history(since_ns, _PAGE, device=device, site=site, model=model):
            rows += [_values(record) for record in page]
            if len(rows) >= ROW_GROUP * _PAGE:
                writer.write_table(_table(pyarrow, schema, rows))
                rows = []
                yield sink.take()
        if rows:
            writer.write_table(_table(pyarrow, schema, rows))
    yield sink.take()


class _Sink(io.RawIOBase):
    """What was written and not taken yet."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._at += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._at

    def take(self) -> bytes:
        """Everything since the last call."""
        whole, self._parts = b"".join(self._parts), []
        return whole


def _table(pyarrow: Any, schema: Any, rows: list[tuple[object, ...]]) -> Any:
    arrays = [
        pyarrow.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)
    ]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _values(record: Record) -> tuple[object, ...]:
    result = record.result
    return (
        record.site, record.device, result.boot, result.sequence, result.captured_at_ns, record.received_at_ns,
        result.stored_at_ns, result.model, result.class_index, result.class_name,
        *(result.streams.get(name) for name in ("attacked", "recovered", "fused")),
        list(result.scores),
    )  # fmt: skip


def _row(record: Record) -> tuple[object, ...]:
    *first, name, attacked, recovered, fused, _ = _values(record)
    streams = ("" if index is None else index for index in (attacked, recovered, fused))
    return *first, _text(str(name)), *streams, " ".join(f"{score:.6g}" for score in record.result.scores)


def _text(value: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _lines(rows: list[tuple[object, ...]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()
