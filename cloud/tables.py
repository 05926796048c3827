"""The tables of the store, as both SQLite and PostgreSQL hold them. `cloud/migrations` makes and changes them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
results = Table(
    "results",
    metadata,
    # In the order of commits, and never given twice: on SQLite by AUTOINCREMENT and its one writer at a time, on
    # PostgreSQL by a sequence and the trigger of migration 0005. Who inserts leaves it out.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("boot", String(32), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("site", String(64), nullable=False),
    Column("model", String(32), nullable=False),
    Column("class_index", Integer, nullable=False),
    Column("class_name", Text, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("streams", JSON, nullable=False),
    Column("captured_at_ns", BigInteger, nullable=False),
    Column("received_at_ns", BigInteger, nullable=False),
    Column("stored_at_ns", BigInteger, nullable=False),
    # CRC-32 of the activation's message: another message under the same name is a replay, not a repeat.
    Column("checksum", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("device", "boot", "sequence", name="result_of_frame"),
    Index("results_by_time", "stored_at_ns"),
    sqlite_autoincrement=True,
)
labels = Table(
    "labels",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("boot", String(32), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("class_index", Integer, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
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
audit = Table(
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
)
tokens = Table(
    "tokens",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created_at_ns", BigInteger, nullable=False),
    Column("expires_at_ns", BigInteger),
    Column("revoked_at_ns", BigInteger),
)
enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("site", String(64), nullable=False),
    Column("device", String(64)),
    Column("created_at_ns", BigInteger, nullable=False),
    Column("expires_at_ns", BigInteger, nullable=False),
    Column("used_at_ns", BigInteger),
    Column("used_by", String(64)),
)
certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("device", String(64), nullable=False, index=True),
    Column("issued_at_ns", BigInteger, nullable=False),
    Column("expires_at_ns", BigInteger, nullable=False),
    Column("revoked_at_ns", BigInteger),
    Column("reason", Text),
)
enrolled = Table(
    "enrolled",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("at_ns", BigInteger, nullable=False),
)
bundles = Table(
    "bundles",
    metadata,
    Column("model", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("added_at_ns", BigInteger, nullable=False),
    Column("manifest", JSON, nullable=False),
)
rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("model", String(32), nullable=False),
    Column("site", String(64)),
    Column("canary_share", Float, nullable=False),
    Column("max_failure_rate", Float, nullable=False),
    Column("min_outcomes", Integer, nullable=False),
    Column("patience_s", Float, nullable=False),
    Column("allow_older", Boolean, nullable=False),
    Column("roll_back", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at_ns", BigInteger, nullable=False),
    Column("changed_at_ns", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    # When a worker with a broker last drove it; 0 of those that ended before this was kept.
    Column("driven_at_ns", BigInteger, nullable=False, server_default="0"),
)
orders = Table(
    "orders",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(32), nullable=False),
    Column("model", String(32), nullable=False),
    Column("previous", String(32), nullable=False),
    Column("rollout", String(32)),
    Column("canary", Boolean, nullable=False),
    Column("arguments", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("message", Text, nullable=False),
    # Since when an answer is awaited: later by as long as nobody with a broker drove the roll-out.
    Column("sent_at_ns", BigInteger, nullable=False),
    Column("answered_at_ns", BigInteger),
    # When the broker was last given it, and when the empty message that takes a retained one from it.
    Column("published_at_ns", BigInteger),
    Column("withdrawn_at_ns", BigInteger),
    UniqueConstraint("device", "serial", name="order_of_device"),
    Index("order_of_rollout", "rollout", "kind", "site", "device", unique=True),
)
leases = Table(
    "leases",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("until_ns", BigInteger, nullable=False),
)
trainings = Table(
    "trainings",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("wanted", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at_ns", BigInteger, nullable=False),
    Column("changed_at_ns", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
)
