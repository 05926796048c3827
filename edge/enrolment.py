"""Enrolment: the device makes its own key, and the cloud signs a certificate for it. docs/wire.md, section 8.

The key never leaves the device. A one-time token says to the cloud that an operator wants this device; later the
certificate itself is the proof, and is renewed before it ends.
"""

from __future__ import annotations

import base64
import datetime
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge.config import EdgeConfig
from edge.errors import FetchError
from edge.fetch import post_json
from splitward.disk import make_folder, move_whole, write_whole
from splitward.errors import ConfigError, SplitwardError
from splitward.wire.names import NAME

RENEWAL_CONTEXT = b"splitward renewal v1\0"
STATE = Path("/var/lib/splitward")
"""The agent's state, where the settings that are written here have it."""
_TOML = """\
# Written by `edge enroll`. Every key stands in edge/config.py; what is not here has its default.
[device]
id = "{device}"
site = "{site}"
bundle = "{out}/model.bundle"
trusted_key = "{out}/trusted.key.pub"
order_key = "{out}/order.key.pub"
state_dir = "{state}"

[capture]
kind = "folder"
path = "{state}/images"
watch = true
sort = true

[broker]
host = "{host}"
port = {port}

[broker.tls]
ca = "{out}/authority.pem"
cert = "{out}/device.pem"
key = "{out}/device.key"

[cloud]
url = "{url}"
{ca}
"""


def enroll(url: str, token: str, site: str, device: str, out: Path, ca: Path | None = None) -> str:
    """Enrol this device and write key, certificate and edge.toml to `out`; what to do next, for a person.

    A key that is there from an attempt that failed is used again. An edge.toml that is there is not touched: its
    certificates are, as that is what enrolling again is for.

    Raises
    ------
    ConfigError
        A name cannot be one, `out` cannot be written, or is root's where the agent is not; nothing was sent then.
    FetchError
        The cloud refuses, or cannot be reached; `.reason` is `http_403` where the token is not good any more,
        `http_409` where the device id is taken, `http_422` where the request cannot be used. After `unreachable` or
        `bad_answer` the token may be spent on this key: the same call gets the certificate again.
    """
    for name in (site, device):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r}: sites and devices match {NAME.pattern}. Give another name.")
    try:
        _prepare(out)
        key = _key_at(out / "device.key")
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}. Run this as a user who may write there.") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{out / 'device.key'}: {error}. Remove it to make a new key.") from error
    body = {"token": token, "site": site, "device": device, "csr": _request(key, device).decode()}
    answer = post_json(f"{url.rstrip('/')}/v1/enrolments", body, None if ca is None else str(ca))
    certificate = _checked(answer, key, device)
    broker = answer.get("broker")
    if not isinstance(broker, dict) or not isinstance(broker.get("port"), int) or "host" not in broker:
        raise FetchError("bad_answer", f"{url}: names no broker. Ask its operator.")
    write_whole(out / "authority.pem", _text(answer, "authority"), 0o644)
    write_whole(out / "trusted.key.pub", _text(answer, "trusted_key"), 0o644)
    write_whole(out / "order.key.pub", _text(answer, "order_key"), 0o644)
    write_whole(out / "device.pem", certificate, 0o644)
    settings = out / "edge.toml"
    if settings.exists():
        return f"{device} is enrolled; {settings} was there and is as it was."
    if ca is not None:
        write_whole(out / "cloud.pem", ca.read_bytes(), 0o644)
    text = _TOML.format(
        device=device,
        site=site,
        out=out.resolve(),
        state=STATE,
        host=str(broker["host"]).replace('"', ""),
        port=broker["port"],
        url=url,
        ca=f'ca = "{out.resolve()}/cloud.pem"' if ca is not None else "",
    )
    write_whole(settings, text.rstrip().encode() + b"\n", 0o644)
    bundle = out.resolve() / "model.bundle"
    return f"{device} is enrolled. Put its bundle at {bundle}, look over {settings}, and run `edge check`."


def renew(config: EdgeConfig, force: bool = False) -> str:
    """Renew the certificate if it is time; what was done, for a person. The agent takes it at its next connection.

    Raises
    ------
    ConfigError
        The configuration has no certificate or no cloud, or they cannot be read or written.
    FetchError
        The cloud refuses (`http_403`: revoked or expired), or cannot be reached. The old certificate stays.
    """
    tls, url = config.broker.tls, config.cloud.url
    if tls is None or tls.cert is None or tls.key is None or url is None:
        raise ConfigError(
            "broker.tls.cert, broker.tls.key and cloud.url are needed to renew; `edge enroll` sets them."
        )
    cert_path, key_path = Path(tls.cert), Path(tls.key)
    try:
        old = cert_path.read_bytes()
        certificate = x509.load_pem_x509_certificate(old)
        key = _read_key(key_path)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{cert_path}, {key_path}: {error}. Enrol again with a new token.") from error
    due = renewal_due(certificate, config.cloud.renew_at)
    now = datetime.datetime.now(datetime.timezone.utc)
    if now < due and not force:
        return f"{cert_path} ends {certificate.not_valid_after_utc:%Y-%m-%d}; it is renewed from {due:%Y-%m-%d} on."
    fresh = ec.generate_private_key(ec.SECP256R1())
    request = _request(fresh, config.device.id)
    signature = key.sign(RENEWAL_CONTEXT + request, ec.ECDSA(hashes.SHA256()))
    body = {
        "certificate": old.decode(),
        "csr": request.decode(),
        "signature": base64.b64encode(signature).decode(),
    }
    answer = post_json(f"{url.rstrip('/')}/v1/enrolments/renew", body, config.cloud.ca)
    renewed = _checked(answer, fresh, config.device.id)
    # Two files cannot be replaced at once: both new ones lie beside the old before the first is replaced, and
    # `finish_renewal` does the rest after a power cut.
    try:
        write_whole(key_path.with_name(key_path.name + ".new"), _pem_of(fresh))
        write_whole(cert_path.with_name(cert_path.name + ".new"), renewed, 0o644)
        write_whole(Path(tls.ca), _text(answer, "authority"), 0o644)
        finish_renewal(cert_path, key_path)
    except OSError as error:
        raise ConfigError(f"{cert_path.parent}: {error.strerror}. The old certificate stays.") from error
    ends = x509.load_pem_x509_certificate(renewed).not_valid_after_utc
    return f"{cert_path} is renewed, and ends {ends:%Y-%m-%d}."


def finish_renewal(cert_path: Path, key_path: Path) -> None:
    """Put a renewed pair in its place; after a power cut in the middle, the rest of it."""
    new_key, new_cert = key_path.with_name(key_path.name + ".new"), cert_path.with_name(cert_path.name + ".new")
    if new_cert.exists():
        certificate = x509.load_pem_x509_certificate(new_cert.read_bytes())
        candidate = new_key if new_key.exists() else key_path
        if _read_key(candidate).public_key() != certificate.public_key():
            new_cert.unlink()  # of another attempt
            return
        if new_key.exists():
            move_whole(new_key, key_path)
        move_whole(new_cert, cert_path)
    else:
        new_key.unlink(missing_ok=True)


def renewal_due(certificate: x509.Certificate, renew_at: float) -> datetime.datetime:
    """When a certificate is to be renewed: after the part `renew_at` of its life."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin + (end - begin) * renew_at


def _prepare(out: Path) -> None:
    """Make `out`, the agent's own: who replaces the certificate there when it is renewed is not root."""
    if not out.is_dir():
        make_folder(out, 0o750)
        if os.geteuid() == 0 and STATE.is_dir():
            os.chown(out, STATE.stat().st_uid, STATE.stat().st_gid)
    elif os.geteuid() == 0 and STATE.is_dir() and out.stat().st_uid != STATE.stat().st_uid:
        raise ConfigError(
            f"{out}: belongs to another user than {STATE}, the agent's, who could neither read nor renew a key there. "
            f"Run `chown -R --reference={STATE} {out}`."
        )


def _key_at(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        return _read_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    write_whole(path, _pem_of(key))
    return key


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds no elliptic curve key")
    return key


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _request(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _checked(answer: dict[str, Any], key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """The certificate of an answer, which must be for this key and this device."""
    text = _text(answer, "certificate")
    try:
        certificate = x509.load_pem_x509_certificate(text)
    except ValueError as error:
        raise FetchError("bad_answer", f"the cloud's answer holds no certificate: {error}.") from error
    names = [one.value for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if certificate.public_key() != key.public_key() or names != [device]:
        raise FetchError("bad_answer", "the cloud's certificate is not for this device and its key.")
    return text


def _text(answer: dict[str, Any], key: str) -> bytes:
    value = answer.get(key)
    if not isinstance(value, str):
        raise FetchError(
            "bad_answer", f"the cloud's answer has no `{key}`. Is the address that of a Splitward cloud?"
        )
    return value.encode()


def main() -> int:
    """Renew by the configuration on standard input."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EdgeConfig)
    try:
        print(renew(config))
    except SplitwardError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
