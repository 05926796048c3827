"""A certificate authority for simulations: broker, cloud and devices trust it, and nobody else has to."""

from __future__ import annotations

import ipaddress
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID = timedelta(days=3650)
"""Longer than any simulated clock jumps."""
_PEM = serialization.Encoding.PEM


class Authority:
    """The authority of one simulation, whose files lie in `folder`; its own certificate is `ca.pem`.

    Parameters
    ----------
    folder : Path
    since_s : float, optional
        UNIX time from which the certificates count, where a device's clock may be so far behind.
    """

    def __init__(self, folder: Path, since_s: float | None = None) -> None:
        self.folder = folder
        now = datetime.now(timezone.utc)
        self._start = now if since_s is None else min(now, datetime.fromtimestamp(since_s, timezone.utc))
        self._start -= VALID / 2 if since_s is None else timedelta(days=2)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulation")])
        certificate = self._build(self._name, self._key, []).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self._write("ca.pem", certificate.sign(self._key, hashes.SHA256()).public_bytes(_PEM))

    def issue(self, name: str, addresses: tuple[str, ...] = ()) -> None:
        """Write `name`.pem and `name`.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        others = [x509.IPAddress(ipaddress.ip_address(one)) for one in addresses]
        certificate = self._build(subject, key, others).sign(self._key, hashes.SHA256())
        self._write(f"{name}.pem", certificate.public_bytes(_PEM))
        plain = serialization.NoEncryption()
        self._write(f"{name}.key", key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, plain))

    def files(self, name: str) -> dict[str, str]:
        """Paths of `ca`, `cert` and `key` for the one called `name`, as configurations name them."""
        return {
            "ca": str(self.folder / "ca.pem"),
            "cert": str(self.folder / f"{name}.pem"),
            "key": str(self.folder / f"{name}.key"),
        }

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, others: list[x509.IPAddress]
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(self._start).not_valid_after(self._start + VALID)
        return builder.add_extension(x509.SubjectAlternativeName(others), critical=False) if others else builder

    def _write(self, name: str, data: bytes) -> None:
        with os.fdopen(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
