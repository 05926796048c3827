"""The tables of the store, as both SQLite and PostgreSQL hold them."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()
results = Table(
    "results",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("boot", String(32), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("site", String(64), nullable=False),
    Column("model", String(32), nullable=False),
    Column("class_index", Integer, nullable=False),
    Column("class_name", Text, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("streams", JSON, nullable=False),
    Column("captured_at_ns", BigInteger, nullable=False),
    Column("received_at_ns", BigInteger, nullable=False),
    Column("stored_at_ns", BigInteger, nullable=False),
    Index("results_in_order", "stored_at_ns", "device", "boot", "sequence"),
)
devices = Table(
    "devices",
    metadata,
    Column("site", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("seen_at_ns", BigInteger, nullable=False),
    Column("status", JSON(none_as_null=True)),
)
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at_ns", BigInteger, nullable=False),
    Column("topic", Text, nullable=False),
    Column("reason", String(64), nullable=False),
    Column("head", Text, nullable=False),
)
