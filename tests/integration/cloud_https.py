"""A small real HTTPS server with the cloud's addresses: enrolment, renewal, and bundles with ranges."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.timezone.utc)


class Authority:
    """A certificate authority in `folder`: `authority.pem`, and `server.pem` with `server.key` for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._build(name, name, self.key.public_key(), days=30, is_authority=True)
        self.path = folder / "authority.pem"
        self.path.write_bytes(pem(self.certificate))
        server = ec.generate_private_key(ec.SECP256R1())
        (folder / "server.pem").write_bytes(
            pem(self.issue(server.public_key(), "127.0.0.1", days=30, server=True))
        )
        (folder / "server.key").write_bytes(private_pem(server))

    def issue(
        self, key: ec.EllipticCurvePublicKey, common_name: str, days: float = 30, server: bool = False
    ) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        return self._build(name, self.certificate.subject, key, days, server=server)

    def revoke(self, *certificates: x509.Certificate) -> Path:
        """Revocation list with these certificates."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(NOW).next_update(NOW + datetime.timedelta(days=7))
        for one in certificates:
            entry = x509.RevokedCertificateBuilder().serial_number(one.serial_number).revocation_date(NOW)
            builder = builder.add_revoked_certificate(entry.build())
        path = self.folder / "revocations.crl"
        path.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    def _build(
        self, name: Any, issuer: Any, key: Any, days: float, server: bool = False, is_authority: bool = False
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(days=1))
            .not_valid_after(NOW + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if server:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(self.key, hashes.SHA256())


class HttpsCloud:
    """What the server knows and has seen.

    Attributes
    ----------
    files : dict
        Bytes by model id.
    cut_after : int or None
        The next answer breaks off after so many bytes, once.
    ranges : list of str
        Range headers seen.
    """

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.tokens = {"good"}
        self.devices: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.cut_after: int | None = None
        self.ranges: list[str] = []
        self.order_key = Ed25519PrivateKey.generate()
        self.revoked: set[int] = set()
        self.url = ""

    def enrol(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["token"] not in self.tokens:
            return 403, {"title": "Forbidden", "detail": "The token is unknown, used or expired."}
        if body["device"] in self.devices:
            return 409, {"title": "Conflict", "detail": "The device id is taken."}
        request = x509.load_pem_x509_csr(body["csr"].encode())
        assert request.is_signature_valid
        self.tokens.discard(body["token"])
        self.devices.add(body["device"])
        certificate = self.authority.issue(request.public_key(), body["device"])  # type: ignore[arg-type]  # P-256
        return 201, {
            "certificate": pem(certificate).decode(),
            "authority": self.authority.path.read_text(),
            "order_key": public_pem(self.order_key).decode(),
            "trusted_key": public_pem(self.order_key).decode(),
            "broker": {"host": "127.0.0.1", "port": 8883},
        }

    def renew(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        old = x509.load_pem_x509_certificate(body["certificate"].encode())
        if old.serial_number in self.revoked:
            return 403, {"title": "Forbidden", "detail": "The certificate is revoked."}
        key = old.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        try:
            signed = b"splitward renewal v1\0" + body["csr"].encode()
            key.verify(base64.b64decode(body["signature"]), signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return 403, {"title": "Forbidden", "detail": "The signature is not the certificate's."}
        request = x509.load_pem_x509_csr(body["csr"].encode())
        name = str(old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        certificate = self.authority.issue(request.public_key(), name, days=90)  # type: ignore[arg-type]  # P-256
        return 200, {"certificate": pem(certificate).decode(), "authority": self.authority.path.read_text()}


@contextmanager
def https_cloud(folder: Path) -> Iterator[HttpsCloud]:
    """The server, until the block ends."""
    cloud = HttpsCloud(Authority(folder))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = cloud.renew(body) if self.path.endswith("/renew") else cloud.enrol(body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            data = cloud.files.get(self.path.split("/")[3])
            if data is None or "ticket=" not in self.path:
                self.send_error(404)
                return
            asked = self.headers.get("Range", "")
            cloud.ranges.append(asked)
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            first = int(asked[6:-1]) if asked else 0
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - first))
            self.send_header("ETag", tag)
            self.end_headers()
            end, cloud.cut_after = cloud.cut_after, None
            self.wfile.write(data[first:] if end is None else data[first : first + end])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    cloud.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
