"""Mutual authentication of a new link, sans-IO: who sends what is in `links.py`.

    acceptor                                initiator
        | --- Challenge(protocol, nonce) -----> |
        | <-- Response(member, nonce, proof) -- |
        | --- Accept(proof) ------------------> |

Each proof is an HMAC-SHA256 under the cluster secret over a label of the role, both nonces, the cluster and both
members, so it is worth nothing in another connection, in the other direction, or to another incarnation. Both
sides then derive the link's token, which every message carries.

With certificates (`sealing.py`) on a link that leaves the host, each side also sends a fresh public key, which all
proofs cover, and signs what the proofs are made of with the key of its certificate. The link's key follows. A side
that expects this does not go on without it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

import msgspec

from controlplane.contract.ids import Member
from controlplane.unreadable import UNREADABLE
from dataplane.transport.base import FRAMES_VERSION

if TYPE_CHECKING:
    from dataplane.transport.sealing import LinkIdentity

# What a node speaks on a link: frames of a version, after this hello. Nodes of two versions do not get as far as
# frames. The hello is what it was with frames of version 2; whoever changes it raises FRAMES_VERSION, too.
PROTOCOL = FRAMES_VERSION - 1
NONCE_BYTES = 32
TOKEN_BYTES = 16
HELLO_BYTES_MAX = 16 << 10  # chains of certificates come with it


class HelloError(Exception):
    """The other side sent something else than the hello expected, or proved the wrong secret."""


class OtherVersion(HelloError):
    """The other side speaks another protocol: it is nobody's fault, and does not pass by itself."""


class Challenge(msgspec.Struct, frozen=True, tag="challenge", forbid_unknown_fields=True, omit_defaults=True):
    protocol: int
    nonce: bytes
    key: bytes = b""  # public, X25519; "": the link is not sealed


class Response(msgspec.Struct, frozen=True, tag="response", forbid_unknown_fields=True, omit_defaults=True):
    member: Member
    nonce: bytes
    proof: bytes
    key: bytes = b""
    chain: tuple[bytes, ...] = ()  # certificates, DER
    signature: bytes = b""


class Accept(msgspec.Struct, frozen=True, tag="accept", forbid_unknown_fields=True, omit_defaults=True):
    proof: bytes
    chain: tuple[bytes, ...] = ()
    signature: bytes = b""


Hello = Challenge | Response | Accept
_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def _decode(data: bytes | memoryview) -> Hello:
    if len(data) > HELLO_BYTES_MAX:
        raise HelloError(f"a hello of {len(data)} bytes")
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise HelloError(f"not a hello: {error}") from error


def _message(role: str, transcript: list[bytes]) -> bytes:
    return msgspec.msgpack.encode((f"kevlarflow link {PROTOCOL} {role}", transcript))


def _proof(secret: bytes, role: str, transcript: list[bytes]) -> bytes:
    return hmac.digest(secret, _message(role, transcript), hashlib.sha256)


def _transcript(
    cluster: str, initiator: Member, acceptor: Member, acceptor_nonce: bytes, initiator_nonce: bytes
) -> list[bytes]:
    members = (initiator.node, initiator.incarnation, acceptor.node, acceptor.incarnation)
    return [acceptor_nonce, initiator_nonce, cluster.encode(), *(name.encode() for name in members)]


class _Side:
    """`nonce` must be fresh and random. `identity`: of a side that wants the link sealed."""

    def __init__(
        self, secret: bytes, cluster: str, me: Member, nonce: bytes, identity: LinkIdentity | None
    ) -> None:
        self._secret, self._cluster, self._me, self._nonce = secret, cluster, me, nonce
        self._identity = identity
        self._exchange = identity.begin() if identity is not None else None
        self.key: bytes | None = None  # of a sealed link, once the other side has proved itself

    @property
    def _public(self) -> bytes:
        return self._exchange.public if self._exchange is not None else b""

    def _agree(self, theirs: bytes) -> bool:
        """Whether the link is sealed. Raises HelloError if only one side has certificates."""
        if bool(theirs) != bool(self._public):
            raise HelloError(
                "only one side has certificates: give both the settings tls.ca, tls.cert and tls.key"
            )
        return bool(theirs)

    def _prove(self, role: str, transcript: list[bytes]) -> tuple[tuple[bytes, ...], bytes]:
        """(certificates, signature)"""
        if self._identity is None:
            return (), b""
        return self._identity.chain(), self._identity.sign(_message(role, transcript))

    def _verify(
        self,
        peer: Member,
        chain: tuple[bytes, ...],
        signature: bytes,
        role: str,
        transcript: list[bytes],
        theirs: bytes,
    ) -> None:
        """Raises HelloError."""
        if self._identity is None or self._exchange is None:
            return
        why = self._identity.refusal(peer.node, chain, signature, _message(role, transcript))
        if why:
            raise HelloError(why)
        salt = hashlib.sha256(_message("key", transcript)).digest()
        self.key = self._exchange.key(theirs, salt)
        if self.key is None:
            raise HelloError("not a public key")


class Acceptor(_Side):
    """The listening side of one connection."""

    def __init__(
        self, secret: bytes, cluster: str, me: Member, nonce: bytes, identity: LinkIdentity | None = None
    ) -> None:
        super().__init__(secret, cluster, me, nonce, identity)

    def challenge(self) -> bytes:
        return msgspec.msgpack.encode(Challenge(PROTOCOL, self._nonce, self._public))

    def admit(self, data: bytes | memoryview) -> tuple[Member, bytes, bytes]:
        """Checks a Response. Returns (peer, link token, Accept to send). Raises HelloError."""
        hello = _decode(data)
        if not isinstance(hello, Response) or len(hello.nonce) != NONCE_BYTES:
            raise HelloError("a response was expected")
        transcript = _transcript(self._cluster, hello.member, self._me, self._nonce, hello.nonce)
        if self._agree(hello.key):
            transcript += [self._public, hello.key]
        if not hmac.compare_digest(hello.proof, _proof(self._secret, "initiator", transcript)):
            raise HelloError("wrong proof: another secret, cluster, member or incarnation")
        self._verify(hello.member, hello.chain, hello.signature, "initiator", transcript, hello.key)
        accept = Accept(_proof(self._secret, "acceptor", transcript), *self._prove("acceptor", transcript))
        token = _proof(self._secret, "token", transcript)[:TOKEN_BYTES]
        return hello.member, token, msgspec.msgpack.encode(accept)


class Initiator(_Side):
    """The connecting side of one connection."""

    def __init__(
        self,
        secret: bytes,
        cluster: str,
        me: Member,
        peer: Member,
        nonce: bytes,
        identity: LinkIdentity | None = None,
    ) -> None:
        super().__init__(secret, cluster, me, nonce, identity)
        self._peer = peer
        self._theirs = b""
        self._transcript: list[bytes] | None = None

    @property
    def answered(self) -> bool:
        return self._transcript is not None

    def answer(self, data: bytes | memoryview) -> bytes:
        """Checks a Challenge. Returns the Response to send. Raises HelloError."""
        hello = _decode(data)
        if not isinstance(hello, Challenge) or len(hello.nonce) != NONCE_BYTES:
            raise HelloError("a challenge was expected")
        if hello.protocol != PROTOCOL:
            raise OtherVersion(f"the peer speaks protocol {hello.protocol}, we speak {PROTOCOL}")
        transcript = _transcript(self._cluster, self._me, self._peer, hello.nonce, self._nonce)
        if self._agree(hello.key):
            transcript += [hello.key, self._public]
        self._transcript, self._theirs = transcript, hello.key
        proof = _proof(self._secret, "initiator", transcript)
        signed = self._prove("initiator", transcript)
        return msgspec.msgpack.encode(Response(self._me, self._nonce, proof, self._public, *signed))

    def confirm(self, data: bytes | memoryview) -> bytes:
        """Checks an Accept. Returns the link token. Raises HelloError."""
        hello = _decode(data)
        if not isinstance(hello, Accept) or self._transcript is None:
            raise HelloError("an accept was expected")
        if not hmac.compare_digest(hello.proof, _proof(self._secret, "acceptor", self._transcript)):
            raise HelloError("the acceptor does not know the cluster secret")
        self._verify(self._peer, hello.chain, hello.signature, "acceptor", self._transcript, self._theirs)
        return _proof(self._secret, "token", self._transcript)[:TOKEN_BYTES]
