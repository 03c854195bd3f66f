"""What makes a link that leaves the host private: certificates in its hello, and AES-256-GCM around its messages.

Each connection has a key of its own, of an exchange of fresh X25519 keys, which both sides sign with the keys of their
certificates: what was recorded cannot be read later, whatever secret leaks then. A link goes one way, so it has one
key, and the place of a piece in it (message, piece) is its nonce: never the same twice, and nothing can be moved,
left out or repeated without being noticed. The header of the message and its length are authenticated as well.

Messages are sealed part by part, in pieces that stay in a core's cache, into a buffer that is kept for the next one.
All of it is on the event loop: the library holds the interpreter's lock, so a thread would keep it waiting as long.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509 import verification

from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Identity, Material, ProcessName, ProcessRole

from .base import Part

KEY_BYTES = 32
TAG_BYTES = 16
PIECE_BYTES = 256 << 10
NONCE = struct.Struct("<QI")  # message, piece: 96 bits
BOUND = struct.Struct("<QQ")  # lengths of the first part and of the whole message, behind the header
KEPT_BYTES_MAX = 8 << 20  # of a buffer for the next message
CHAIN_MAX = 4  # certificates

Signer = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class SealError(Exception):
    """The other side proved nothing."""


class Exchange:
    """One side's part of one connection's key."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def key(self, theirs: bytes, transcript: bytes) -> bytes | None:
        """None: it is no public key."""
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(theirs))
        except ValueError:
            return None
        return HKDF(hashes.SHA256(), KEY_BYTES, transcript, b"kevlarflow link key").derive(shared)


class LinkIdentity:
    """A node's certificate, and whom it takes for a node. Reads files again when they have changed."""

    def __init__(self, identity: Identity) -> None:
        """Raises ConfigError."""
        self._identity = identity
        self._material: Material | None = None
        self._load()

    def begin(self) -> Exchange:
        return Exchange()

    def sealer(self, key: bytes) -> Sealer:
        return Sealer(key)

    def opener(self, key: bytes) -> Opener:
        return Opener(key)

    def chain(self) -> tuple[bytes, ...]:
        """Our certificate and what leads to an authority, in DER."""
        self._load()
        return self._chain

    def sign(self, message: bytes) -> bytes:
        match self._key:
            case ec.EllipticCurvePrivateKey():
                return self._key.sign(message, ec.ECDSA(hashes.SHA256()))
            case ed25519.Ed25519PrivateKey():
                return self._key.sign(message)
            case rsa.RSAPrivateKey():
                return self._key.sign(message, _pss(), hashes.SHA256())

    def refusal(self, node: str, chain: Sequence[bytes], signature: bytes, message: bytes) -> str:
        """Why `message` was not signed by this node; "": it was."""
        try:
            self._verify(node, chain, signature, message)
        except SealError as error:
            return str(error)
        return ""

    def _verify(self, node: str, chain: Sequence[bytes], signature: bytes, message: bytes) -> None:
        if not 0 < len(chain) <= CHAIN_MAX:
            raise SealError(f"{len(chain)} certificates")
        self._load()
        try:
            leaf, *others = [x509.load_der_x509_certificate(der) for der in chain]
            checks = verification.PolicyBuilder().store(self._store).time(datetime.now(UTC))
            subjects = checks.build_client_verifier().verify(leaf, others).subjects or []
            names = {name.value.lower() for name in subjects if isinstance(name, x509.DNSName)}
            public = leaf.public_key()
            match public:
                case ec.EllipticCurvePublicKey():
                    public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
                case ed25519.Ed25519PublicKey():
                    public.verify(signature, message)
                case rsa.RSAPublicKey():
                    public.verify(signature, message, _pss(), hashes.SHA256())
                case _:
                    raise SealError("a certificate with a kind of key that we do not use")
        except (ValueError, verification.VerificationError, InvalidSignature) as error:
            raise SealError(f"its certificate: {error or type(error).__name__}") from error
        wanted = ProcessName(ProcessRole.NODE, node).dns(self._identity.cluster)
        if wanted.lower() not in names:
            raise SealError(f"its certificate does not name {wanted}")

    def _load(self) -> None:
        now = self._identity.files.current()
        if now is self._material:
            return
        try:
            key = serialization.load_pem_private_key(now.key, None)
            chain = x509.load_pem_x509_certificates(now.cert)
            store = verification.Store(x509.load_pem_x509_certificates(now.ca))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"tls: certificates cannot be used for links: {error}") from error
        if not isinstance(key, Signer):
            raise ConfigError("tls.key: links need a key for elliptic curves, Ed25519 or RSA")
        self._key: Signer = key
        self._chain = tuple(one.public_bytes(serialization.Encoding.DER) for one in chain)
        self._store, self._material = store, now


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


class Sealer:
    """The sending end of one link."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._buffer = bytearray()

    def seal(
        self, header: bytes, sequence: int, parts: Sequence[Part], *, reuse: bool
    ) -> tuple[bytes, memoryview]:
        """(header, data) to send. `reuse`: nothing that was sealed before is waiting to be sent any more."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        lengths = [view.nbytes for view in views]
        first, total = (lengths[0] if lengths else 0), sum(lengths)
        if len(views) > 2:  # a frame has two
            views = [views[0], memoryview(b"".join(views[1:]))]
        bound = header + BOUND.pack(first, total)
        size = total + TAG_BYTES * _pieces(first, total)
        if not reuse or len(self._buffer) < size:
            self._buffer = bytearray(size)
        out = memoryview(self._buffer)[:size]
        at = piece = 0
        for view in views:
            for begin in range(0, view.nbytes, PIECE_BYTES):
                cut = view[begin : begin + PIECE_BYTES]
                end = at + cut.nbytes + TAG_BYTES
                self._cipher.encrypt_into(NONCE.pack(sequence, piece), cut, bound, out[at:end])
                at, piece = end, piece + 1
        if not total:
            self._cipher.encrypt_into(NONCE.pack(sequence, 0), b"", bound, out)
        if len(self._buffer) > KEPT_BYTES_MAX:
            self._buffer = bytearray()
        return bound, out


class Opener:
    """The receiving end of one link."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    @staticmethod
    def bytes_max(message_bytes: int) -> int:
        """Of a message on the wire."""
        return message_bytes + TAG_BYTES * (message_bytes // PIECE_BYTES + 2)

    def open(self, bound: bytes, sequence: int, data: memoryview) -> memoryview | None:
        """The message, in memory of its own; None: it is not what was sealed. `bound`: the whole header that came with
        it."""
        first, total = BOUND.unpack_from(bound, len(bound) - BOUND.size)
        pieces = _pieces(first, total) if first <= total else 0
        if pieces == 0 or data.nbytes != total + TAG_BYTES * pieces:
            return None
        message = memoryview(bytearray(total))
        at = into = piece = 0
        try:
            for length in _cuts(first, total):
                end = at + length + TAG_BYTES
                out = message[into : into + length]
                self._cipher.decrypt_into(NONCE.pack(sequence, piece), data[at:end], bound, out)
                at, into, piece = end, into + length, piece + 1
        except InvalidTag:
            return None
        return message


def _cuts(first: int, total: int) -> list[int]:
    """Lengths of a message's pieces, in order: those of its first part, and of the rest."""
    found = []
    for length in (first, total - first):
        found += [min(PIECE_BYTES, length - begin) for begin in range(0, length, PIECE_BYTES)]
    return found or [0]


def _pieces(first: int, total: int) -> int:
    return max(1, -(-first // PIECE_BYTES) + -(-(total - first) // PIECE_BYTES))
