"""What makes a link that leaves the host private: certificates in its hello, and AES-256-GCM around its messages.

Each connection has a key of its own, of an exchange of fresh X25519 keys, which both sides sign with the keys of their
certificates: what was recorded cannot be read later, whatever secret leaks then. A link goes one way, so it has one
key, and a message's number in it is the nonce: never the same twice, and nothing can be moved, left out or repeated
without being noticed. The header of the message is authenticated as well.

Large messages are sealed into a buffer that is kept for the next ones, and opened where they came. All of it is on the
event loop: the library holds the interpreter's lock, so a thread would keep it waiting just as long.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509 import verification

from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Identity, Material, ProcessName, ProcessRole

from .base import Part

log = structlog.get_logger(__name__)

KEY_BYTES = 32
TAG_BYTES = 16
NONCE = struct.Struct("<QI")  # message, 0: 96 bits
SMALL_BYTES = 4 << 10  # not worth a buffer that is kept
JOINED_BYTES = 256 << 10  # to join such parts costs less than a cipher that takes them one by one
KEPT_BYTES_MAX = 16 << 20  # of a link's buffers for the next messages
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
        self._material = identity.files.current()
        self._take(self._material)

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
        """Take up what has changed. What cannot be used for links leaves them as they are, and is told."""
        now = self._identity.files.current()
        if now is self._material:
            return
        self._material = now
        try:
            self._take(now)
        except ConfigError as error:
            log.warning("links go on with the certificate from before", error=str(error))

    def _take(self, now: Material) -> None:
        """Raises ConfigError; nothing has changed then."""
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
        self._store = store


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


class Sealer:
    """The sending end of one link."""

    def __init__(self, key: bytes) -> None:
        self._cipher, self._key = AESGCM(key), algorithms.AES256(key)
        self._given = 0  # bytes that were given to the endpoint
        self._busy: deque[tuple[int, bytearray]] = deque()  # buffers, and how much had been given with them
        self._free: list[bytearray] = []

    def seal(self, header: bytes, sequence: int, parts: Sequence[Part], queued_bytes: int) -> Part:
        """What to send in place of `parts`, behind `header`. `queued_bytes`: of the endpoint, which has let go of
        whatever is not among them."""
        nonce = NONCE.pack(sequence, 0)
        total = sum([part.nbytes if type(part) is memoryview else len(part) for part in parts])
        if total <= SMALL_BYTES:
            small = self._cipher.encrypt(nonce, b"".join(parts), header)
            self._given += len(small)
            return small
        buffer = self._buffer(total + TAG_BYTES, queued_bytes)
        sealed = memoryview(buffer)[: total + TAG_BYTES]
        if len(parts) == 1 or total <= JOINED_BYTES:
            self._cipher.encrypt_into(nonce, parts[0] if len(parts) == 1 else b"".join(parts), header, sealed)
        else:
            cipher = Cipher(self._key, modes.GCM(nonce)).encryptor()
            cipher.authenticate_additional_data(header)
            at = 0
            for part in parts:
                at += cipher.update_into(part, sealed[at:])
            cipher.finalize()
            sealed[at:] = cipher.tag
        self._busy.append((self._given + len(sealed), buffer))
        self._given += len(sealed)
        return sealed

    def _buffer(self, size: int, queued_bytes: int) -> bytearray:
        """Memory that was used before is in place already: fresh pages cost more than to encrypt into them."""
        sent = self._given - queued_bytes
        while self._busy and self._busy[0][0] <= sent:
            self._free.append(self._busy.popleft()[1])
        kept = sum(map(len, self._free))
        while self._free and kept > KEPT_BYTES_MAX:
            kept -= len(self._free.pop(0))
        for index, buffer in enumerate(self._free):
            if size <= len(buffer) <= 4 * size:
                return self._free.pop(index)
        return bytearray(size)


class Opener:
    """The receiving end of one link."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    @staticmethod
    def bytes_max(message_bytes: int) -> int:
        """Of a message on the wire."""
        return message_bytes + TAG_BYTES

    def open(self, header: bytes, sequence: int, data: memoryview) -> memoryview | None:
        """The message, in the memory in which it came; None: it is not what was sealed, and that memory is spoilt."""
        if data.nbytes < TAG_BYTES:
            return None
        message = data[:-TAG_BYTES]
        try:
            self._cipher.decrypt_into(NONCE.pack(sequence, 0), data, header, message)
        except InvalidTag:
            return None
        return message
