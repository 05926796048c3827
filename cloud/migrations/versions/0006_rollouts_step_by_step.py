"""What a roll-out has said and withdrawn is on its orders; a device has one order of a kind in a roll-out.

Roll-outs that ended before are left as they are: nobody is ordered back for what an operator may have mended by now.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
_ONE_ORDER = ["rollout", "kind", "site", "device"]


def upgrade() -> None:
    op.add_column("rollouts", sa.Column("driven_at_ns", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("orders", sa.Column("published_at_ns", sa.BigInteger))
    op.add_column("orders", sa.Column("withdrawn_at_ns", sa.BigInteger))
    running = sa.text("UPDATE rollouts SET driven_at_ns = :now WHERE state IN ('canary', 'rolling')")
    op.get_bind().execute(running, {"now": time.time_ns()})
    op.execute("UPDATE orders SET published_at_ns = sent_at_ns")
    # Two workers may have ordered the same: the device obeys the later order.
    op.execute(
        "UPDATE orders SET rollout = NULL WHERE rollout IS NOT NULL AND EXISTS (SELECT 1 FROM orders AS later "
        "WHERE later.rollout = orders.rollout AND later.kind = orders.kind AND later.site = orders.site "
        "AND later.device = orders.device AND later.serial > orders.serial)"
    )
    op.drop_index("ix_orders_rollout", "orders")
    op.create_index("order_of_rollout", "orders", _ONE_ORDER, unique=True)


def downgrade() -> None:
    op.drop_index("order_of_rollout", "orders")
    op.create_index("ix_orders_rollout", "orders", ["rollout"])
    op.drop_column("orders", "withdrawn_at_ns")
    op.drop_column("orders", "published_at_ns")
    op.drop_column("rollouts", "driven_at_ns")
