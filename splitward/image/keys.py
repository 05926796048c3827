"""The key of system updates: RAUC trusts X.509 certificates, not bare keys."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from splitward.disk import write_whole
from splitward.errors import ImageError
from splitward.image.debian import read_epoch

YEARS = 20


def create_update_key(folder: Path) -> tuple[Path, Path]:
    """Create `update.key` (mode 0600) and the self-signed `update.crt` in `folder`, and return their paths.

    Raises
    ------
    ImageError
        There is a key already: devices trust its certificate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key_path, certificate_path = folder / "update.key", folder / "update.crt"
    if key_path.exists():
        raise ImageError(f"{key_path}: exists already, and devices may trust it. Choose another folder.")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Splitward system updates")])
    # A board without a clock of its own starts at the lock's time.
    start = min(datetime.now(timezone.utc), datetime.fromtimestamp(read_epoch(), timezone.utc)) - timedelta(
        days=2
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_whole(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    write_whole(key_path, pem)  # the last: where it is, all is
    return key_path, certificate_path
