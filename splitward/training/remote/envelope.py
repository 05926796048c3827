"""Client halves from client to client, past the cloud: sealed to the members of a training.

A client half and its change give the frames away (`splitward.audit.dense`), so the cloud that carries halves must not
read them. Each is encrypted under a key of its own, and that key for every member: X25519 between a fresh key and the
member's, and between the sender's and the member's, which only the sender could have done (the construction of HPKE's
authenticated mode, RFC 9180, 5.1.3); HKDF-SHA-256; ChaCha20-Poly1305.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitward.errors import TrainingError

CONTEXT = b"splitward half v1\0"
_NONCE = bytes(12)
"""Every key encrypts once."""


class _Envelope(msgspec.Struct, frozen=True):
    ephemeral: bytes
    keys: dict[str, bytes]
    body: bytes


_decoder = msgspec.msgpack.Decoder(_Envelope)


def fingerprint(public: bytes) -> str:
    """By which people compare a member's key: 32 hexadecimal digits."""
    return hashlib.sha256(public).hexdigest()[:32]


def check_key(public: bytes) -> None:
    """Refuse with `ValueError` what is no X25519 key, or one with which every exchange gives the same."""
    X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))


def seal(content: bytes, sender: X25519PrivateKey, members: Mapping[str, bytes], about: bytes) -> bytes:
    """Envelope that each of `members` (name to public key, 32 bytes) can open and nobody else.

    Parameters
    ----------
    about : bytes
        What this content is, and whose: bound to the envelope, so that another cannot stand in for it.
    """
    ephemeral, key = X25519PrivateKey.generate(), secrets.token_bytes(32)
    public = ephemeral.public_key().public_bytes_raw()
    keys = {}
    for name, raw in members.items():
        member = X25519PublicKey.from_public_bytes(raw)
        shared = ephemeral.exchange(member) + sender.exchange(member)
        keys[name] = ChaCha20Poly1305(_derive(shared, about, public, raw)).encrypt(_NONCE, key, None)
    body = ChaCha20Poly1305(key).encrypt(_NONCE, content, CONTEXT + about)
    return msgspec.msgpack.encode(_Envelope(public, keys, body))


def open_envelope(envelope: bytes, own: X25519PrivateKey, name: str, sender: bytes, about: bytes) -> bytes:
    """Content of an envelope that `sender` (public key) made for the member `name`.

    Raises
    ------
    TrainingError
        It is for others, from another sender, about something else, or damaged.
    """
    try:
        parts = _decoder.decode(envelope)
        shared = own.exchange(X25519PublicKey.from_public_bytes(parts.ephemeral))
        shared += own.exchange(X25519PublicKey.from_public_bytes(sender))
        kek = _derive(shared, about, parts.ephemeral, own.public_key().public_bytes_raw())
        key = ChaCha20Poly1305(kek).decrypt(_NONCE, parts.keys[name], None)
        return ChaCha20Poly1305(key).decrypt(_NONCE, parts.body, CONTEXT + about)
    except (msgspec.DecodeError, KeyError, ValueError, InvalidTag) as error:
        raise TrainingError(
            "a client half is not what its sender sealed for this client: the cloud or a member has changed it, or "
            "exchanged keys. Compare the fingerprints of all clients, and begin a new training."
        ) from error


def _derive(shared: bytes, about: bytes, ephemeral: bytes, member: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, CONTEXT + about + ephemeral + member).derive(shared)
