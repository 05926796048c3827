"""The fleet's keys: a certificate authority for devices, the order key, and the key of tickets.

They lie in `state_dir` (mode 0600), made at the first start and never again: where one was lost the service does not
start, as devices would refuse what another one signs. The authority signs client certificates of devices, and
those of the fleet's own services, whose names no device can bear; the broker trusts it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitward.disk import write_whole
from splitward.errors import ConfigError, MessageError

RENEWAL = b"splitward renewal v1\0"
SERVICE = "service:"
"""Begins the common name of every service; a device id holds no colon, so no device can enrol as one."""
AUTHORITY_DAYS = 3650
CRL_DAYS = 90.0
"""Life of a revocation list. A broker whose list has ended refuses everybody, so it outlasts a long outage."""
AUTHORITY_KEY, ORDER_KEY, TICKET_KEY, CERTIFICATE = "authority.key", "order.key", "ticket.key", "authority.pem"
FILES = (AUTHORITY_KEY, ORDER_KEY, TICKET_KEY, CERTIFICATE)
"""In the order of their making, so that a first start that was cut off is told from a loss."""
_BACKDATED = datetime.timedelta(minutes=10)
"""A device's clock may be behind ours, and a broker's."""


class Authority:
    """Signs what devices trust.

    Raises
    ------
    ConfigError
        The keys in `folder` cannot be read or made, everybody may read one, one was lost, or they do not belong
        together.
    """

    def __init__(self, folder: Path) -> None:
        try:
            if not all((folder / name).exists() for name in FILES):
                _make(folder)
            for name in (AUTHORITY_KEY, ORDER_KEY, TICKET_KEY):
                if (mode := (folder / name).stat().st_mode) & stat.S_IRWXO:
                    raise ConfigError(
                        f"fleet.state_dir {folder}: everybody may use {name} (mode {mode & 0o777:o}). chmod 600 it if "
                        "it never left this folder; otherwise make new keys, and enrol the fleet again."
                    )
            key, order_key = _read_key(folder / AUTHORITY_KEY), _read_key(folder / ORDER_KEY)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(order_key, Ed25519PrivateKey):
                raise ValueError("a key is of another kind")
            self._key, self.order_key = key, order_key
            self._ticket_key = (folder / TICKET_KEY).read_bytes()
            self.certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
            if self.certificate.public_key() != key.public_key():
                raise ValueError(f"{AUTHORITY_KEY} is not the key of {CERTIFICATE}")
        except (OSError, ValueError) as error:
            raise ConfigError(f"fleet.state_dir {folder}: {error}. Restore the keys from a copy.") from error

    @property
    def pem(self) -> str:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def order_key_pem(self) -> str:
        """Public half of the order key."""
        public = self.order_key.public_key()
        return public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    def read_request(self, pem: str, device: str) -> x509.CertificateSigningRequest:
        """A device's request; `MessageError` (`bad_csr`) when it cannot be granted."""
        try:
            request = x509.load_pem_x509_csr(pem.encode())
            key = request.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
                raise ValueError("its key is not of the curve P-256")
            if not request.is_signature_valid:
                raise ValueError("its signature is wrong")
            names = [one.value for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
            if names != [device]:
                raise ValueError(f"its common name is {names}, not the device id {device}")
        except (ValueError, TypeError, InvalidSignature) as error:
            raise MessageError("bad_csr", f"the certificate request cannot be used: {error}.") from error
        return request

    def issue(self, request: x509.CertificateSigningRequest, device: str, days: float) -> x509.Certificate:
        """Client certificate of `device` for the request's key."""
        return self._leaf(request.public_key(), device, days, [ExtendedKeyUsageOID.CLIENT_AUTH]).sign(
            self._key, hashes.SHA256()
        )

    def issue_service(self, name: str, hosts: tuple[str, ...], days: float) -> tuple[bytes, bytes]:
        """Certificate and key, both PEM, of the service `name`, which is also a server where it has `hosts`.

        `ConfigError` where one of them is neither an address nor a name in ASCII.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        builder = self._leaf(key.public_key(), SERVICE + name, days, uses)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(one) for one in hosts]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key)

    def revocation_list(self, revoked: list[tuple[int, int]], days: float = CRL_DAYS) -> bytes:
        """PEM list of (serial, revoked_at_ns), good for `days`."""
        now = datetime.datetime.now(datetime.UTC)
        entries = []
        for serial, at_ns in revoked:
            at = datetime.datetime.fromtimestamp(at_ns / 1e9, datetime.UTC)
            entries.append(x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build())
        builder = (  # added one by one, the builder would copy all entries for each
            x509.CertificateRevocationListBuilder(revoked_certificates=entries)
            .issuer_name(self.certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + datetime.timedelta(days=days))
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def check_renewal(self, pem: str, csr: str, signature: bytes) -> x509.Certificate:
        """The certificate that is to be renewed; `MessageError` (`bad_certificate`) when it proves nothing."""
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(self.certificate)
            key = certificate.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("its key is of another kind")
            key.verify(signature, RENEWAL + csr.encode(), ec.ECDSA(hashes.SHA256()))
        except (ValueError, TypeError, InvalidSignature) as error:
            raise MessageError(
                "bad_certificate", f"not this authority's, or not its holder's signature: {error}"
            ) from error
        return certificate

    def ticket(self, model: str, device: str, expires_at_s: int) -> str:
        """Capability to fetch the file of `model`, for `device`, until then."""
        return f"{expires_at_s}.{device}.{self._ticket_digest(model, device, expires_at_s)}"

    def check_ticket(self, ticket: str, model: str, now_s: float) -> str | None:
        """Device that a valid ticket names; None of one that is not valid."""
        expires, _, rest = ticket.partition(".")
        device, _, digest = rest.partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) < 15 and digest.isascii()):
            return None
        good = hmac.compare_digest(digest, self._ticket_digest(model, device, int(expires)))
        return device if good and int(expires) > now_s else None

    def client_id(self, name: str) -> str:
        """`name`, which others can guess, with a suffix that they cannot; the same at each start.

        A broker ends the connection of a client when another one comes under its id, whatever its certificate.
        """
        digest = self._digest(f"splitward client v1\0{name}")
        return f"{name}-{digest[:16]}"

    def _ticket_digest(self, model: str, device: str, expires_at_s: int) -> str:
        return self._digest(f"splitward ticket v1\0{model}\0{device}\0{expires_at_s}")

    def _digest(self, text: str) -> str:
        return hmac.new(self._ticket_key, text.encode(errors="replace"), hashlib.sha256).hexdigest()

    def _leaf(
        self, key: CertificatePublicKeyTypes, name: str, days: float, uses: list[x509.ObjectIdentifier]
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )


def _make(folder: Path) -> None:
    """Make what the first start did not come to; workers that start together take turns, so that all have the same.

    `ValueError` when a file was lost: one that was made later is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        makers: dict[str, Callable[[], bytes]] = {
            AUTHORITY_KEY: lambda: _private_pem(ec.generate_private_key(ec.SECP256R1())),
            ORDER_KEY: lambda: _private_pem(Ed25519PrivateKey.generate()),
            TICKET_KEY: lambda: os.urandom(32),
            CERTIFICATE: lambda: _self_signed(_read_key(folder / AUTHORITY_KEY)),
        }
        made = [(folder / name).exists() for name in FILES]
        if False in made[: sum(made)]:
            raise ValueError(f"{FILES[made.index(False)]} is missing")
        for name in FILES[sum(made) :]:
            write_whole(folder / name, makers[name](), 0o644 if name == CERTIFICATE else 0o600)


def _self_signed(key: PrivateKeyTypes) -> bytes:
    """PEM certificate of the authority itself."""
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key is of another kind")
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Splitward devices")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(
            f"host {host!r}: is no name in ASCII. Give an international one as xn--... ."
        ) from None


def _private_pem(key: PrivateKeyTypes) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _read_key(path: Path) -> PrivateKeyTypes:
    return serialization.load_pem_private_key(path.read_bytes(), password=None)
