"""Check-in: a slot is kept once the agent holds a connection to its broker; one that never gets there gives way.

Read from the kernel's own table of connections, not from what the agent says of itself: a new version that cannot
reach the broker must not be able to claim that it can.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from edge.system.site import AGENT_ID
from edge.system.slot import Loader, current_slot, find_loader
from splitward.config import read_config
from splitward.errors import SplitwardError

HOLD_S = 5.0
"""A broker that refuses the device closes the connection sooner."""
DEADLINE_S = 900.0
POLL_S = 1.0
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
SETTINGS = Path("/etc/splitward/edge.toml")
_ESTABLISHED = "01"


def connections(port: int, user: int, tables: tuple[Path, ...]) -> frozenset[str]:
    """Inodes of the established connections of `user` to `port`, in tables such as /proc/net/tcp."""
    found = set()
    for table in tables:
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            remote_port = int(fields[2].rpartition(":")[2], 16)
            if fields[3] == _ESTABLISHED and remote_port == port and int(fields[7]) == user:
                found.add(fields[9])
    return frozenset(found)


def wait_for_checkin(settings: Path, user: int, tables: tuple[Path, ...], deadline_s: float) -> bool:
    """Whether one connection to the broker of `settings` was held for `HOLD_S` before `deadline_s` had passed.

    A version that cannot use its settings (edge.toml) has no broker to connect to. It waits all the same: somebody
    may mend them meanwhile.
    """
    from edge.config import EdgeConfig  # a slot that is not on trial does without

    since: dict[str, float] = {}
    said = ""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        now = time.monotonic()
        open_now: frozenset[str] = frozenset()
        try:
            open_now = connections(read_config(settings, EdgeConfig).broker.port, user, tables)
        except SplitwardError as error:
            if str(error) != said:
                said = str(error)
                print(f"no broker to check in with: {said}", file=sys.stderr, flush=True)
        since = {inode: since.get(inode, now) for inode in open_now}
        if any(now - first >= HOLD_S for first in since.values()):
            return True
        time.sleep(POLL_S)
    return False


def settle(loader: Loader, checked_in: bool) -> bool:
    """Keep the running slot when it is on trial and has `checked_in`; whether the device must restart."""
    slot = current_slot()
    if not loader.on_trial(slot):
        return False
    if checked_in:
        loader.mark(slot, "good")
        print(f"slot {slot} has checked in and is kept")
    else:
        print(f"slot {slot} has not checked in within {DEADLINE_S:.0f} s; restarting")
    return not checked_in


def main() -> int:
    """Wait for the check-in of a slot on trial."""
    loader = find_loader()
    if not loader.on_trial(current_slot()):
        return 0
    if settle(loader, wait_for_checkin(SETTINGS, AGENT_ID, TABLES, DEADLINE_S)):
        subprocess.run(["systemctl", "reboot"], check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
