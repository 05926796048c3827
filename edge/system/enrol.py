"""The first start of an image whose site.toml names a token: the device enrols, and the agent may begin.

Run again by its unit until it succeeds: a board without a clock of its own has to learn the time first, and a network
may come late. A key that an earlier attempt made is used again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edge.enrolment import enroll
from edge.system.site import IDENTITY, KEPT, SiteConfig, give_to_agent, read_site, write_agent_settings
from splitward.disk import make_folder
from splitward.errors import SplitwardError


def enrol_device(site: SiteConfig, root: Path) -> bool:
    """Enrol as `site` says, and write edge.toml below `root`; whether there was anything to do.

    Raises
    ------
    FetchError, ConfigError
        As `edge.enrolment.enroll`; nothing is lost, and it may be tried again.
    """
    identity, wanted = root / IDENTITY, site.enrolment
    if wanted is None:
        return False
    make_folder(identity, 0o750)
    for path in (identity, *identity.iterdir()):  # what is written there from now on is the agent's, too
        give_to_agent(path)
    if (identity / "edge.toml").exists():
        return False
    ca = None if wanted.ca is None else Path(wanted.ca)
    enroll(wanted.url, wanted.token, wanted.site, wanted.device, identity, ca)
    return write_agent_settings(site, root)


def main() -> int:
    """Enrol, and start the agent; 1 when it has to be tried again."""
    try:
        site = read_site(KEPT) if KEPT.exists() else SiteConfig()  # none yet was without a mistake
        if enrol_device(site, Path("/")):
            print(f"enrolled as {site.enrolment.device if site.enrolment else ''}")
            subprocess.run(["systemctl", "--no-block", "start", "splitward-edge.service"], check=False)
    except SplitwardError as error:
        print(f"not enrolled yet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
