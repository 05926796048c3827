"""`python -m cloud.revocations URL FOLDER PID`: keep a broker's revocation list fresh.

Asks the service once a minute. mosquitto reads the file `revoked.crl` in FOLDER at its start and at SIGHUP, and keeps
every list that it has read: so the file is replaced, and the process PID told, only where the new list revokes
something else, or lasts a day longer. FOLDER is what `certify broker` wrote.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import ssl
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from splitward.disk import write_whole

PERIOD_S = 60.0
TIMEOUT_S = 30.0
LONGER = datetime.timedelta(days=1)
MAX_BYTES = 64 << 20


def main(argv: list[str] | None = None) -> None:
    """Refresh the list until the process is ended; what fails is told, and tried again."""
    parser = argparse.ArgumentParser(prog="python -m cloud.revocations", description=__doc__)
    parser.add_argument("url", help="of the list, such as https://cloud:8443/v1/revocations.crl")
    parser.add_argument("folder", type=Path, help="folder with authority.pem and revoked.crl")
    parser.add_argument("pid", type=int, help="process of mosquitto")
    arguments = parser.parse_args(argv)
    while True:
        try:
            refresh(arguments.url, arguments.folder, arguments.pid)
        except (OSError, HTTPException, ValueError) as error:
            sys.stderr.write(f"{arguments.url}: {error}; trying again\n")
        time.sleep(PERIOD_S)


def refresh(url: str, folder: Path, pid: int) -> bool:
    """Fetch the list once; whether the broker was told of it.

    Raises
    ------
    OSError, HTTPException
        The service does not answer, the file cannot be written, or there is no such process to be told.
    ValueError
        What came is not a list that this authority signed.
    """
    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    context = ssl.create_default_context(cafile=folder / "authority.pem")
    with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as answer:  # noqa: S310  # the operator's
        fetched = answer.read(MAX_BYTES)
    key, new = authority.public_key(), x509.load_pem_x509_crl(fetched)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not new.is_signature_valid(key):
        raise ValueError("the revocation list is not signed by the authority")
    if _is_known(folder / "revoked.crl", new):
        return False
    os.kill(pid, 0)  # a broker that cannot be told must not seem to know
    write_whole(folder / "revoked.crl", fetched, 0o644)
    os.kill(pid, signal.SIGHUP)
    return True


def _is_known(path: Path, new: x509.CertificateRevocationList) -> bool:
    """Whether the file revokes the same, and lasts about as long."""
    try:
        old = x509.load_pem_x509_crl(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    ends, lasts = old.next_update_utc, new.next_update_utc
    same = {one.serial_number for one in old} == {one.serial_number for one in new}
    return same and ends is not None and lasts is not None and lasts - ends < LONGER


if __name__ == "__main__":
    main()
