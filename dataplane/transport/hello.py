"""Mutual authentication of a new link, sans-IO: who sends what is in `links.py`.

    acceptor                                initiator
        | --- Challenge(protocol, nonce) -----> |
        | <-- Response(member, nonce, proof) -- |
        | --- Accept(proof) ------------------> |

Each proof is an HMAC-SHA256 under the cluster secret over a label of the role, both nonces, the cluster and both
members, so it is worth nothing in another connection, in the other direction, or to another incarnation. Both
sides then derive the link's token, which every message carries. Nothing is encrypted: on a network that others
can read, run the data plane inside an encrypted one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import msgspec

from controlplane.contract.ids import Member
from dataplane.transport.base import FRAMES_VERSION

# What a node speaks on a link: frames of a version, after this hello. Nodes of two versions do not get as far as
# frames. The hello is what it was with frames of version 2; whoever changes it raises FRAMES_VERSION, too.
PROTOCOL = FRAMES_VERSION - 1
NONCE_BYTES = 32
TOKEN_BYTES = 16
HELLO_BYTES_MAX = 4096


class HelloError(Exception):
    """The other side sent something else than the hello expected, or proved the wrong secret."""


class OtherVersion(HelloError):
    """The other side speaks another protocol: it is nobody's fault, and does not pass by itself."""


class Challenge(msgspec.Struct, frozen=True, tag="challenge", forbid_unknown_fields=True):
    protocol: int
    nonce: bytes


class Response(msgspec.Struct, frozen=True, tag="response", forbid_unknown_fields=True):
    member: Member
    nonce: bytes
    proof: bytes


class Accept(msgspec.Struct, frozen=True, tag="accept", forbid_unknown_fields=True):
    proof: bytes


Hello = Challenge | Response | Accept
_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def _decode(data: bytes | memoryview) -> Hello:
    if len(data) > HELLO_BYTES_MAX:
        raise HelloError(f"a hello of {len(data)} bytes")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HelloError(f"not a hello: {error}") from error


def _proof(secret: bytes, role: str, transcript: list[bytes]) -> bytes:
    message = msgspec.msgpack.encode((f"kevlarflow link {PROTOCOL} {role}", transcript))
    return hmac.digest(secret, message, hashlib.sha256)


def _transcript(
    cluster: str, initiator: Member, acceptor: Member, acceptor_nonce: bytes, initiator_nonce: bytes
) -> list[bytes]:
    members = (initiator.node, initiator.incarnation, acceptor.node, acceptor.incarnation)
    return [acceptor_nonce, initiator_nonce, cluster.encode(), *(name.encode() for name in members)]


class Acceptor:
    """The listening side of one connection. `nonce` must be fresh and random."""

    def __init__(self, secret: bytes, cluster: str, me: Member, nonce: bytes) -> None:
        self._secret, self._cluster, self._me, self._nonce = secret, cluster, me, nonce

    def challenge(self) -> bytes:
        return msgspec.msgpack.encode(Challenge(PROTOCOL, self._nonce))

    def admit(self, data: bytes | memoryview) -> tuple[Member, bytes, bytes]:
        """Checks a Response. Returns (peer, link token, Accept to send). Raises HelloError."""
        hello = _decode(data)
        if not isinstance(hello, Response) or len(hello.nonce) != NONCE_BYTES:
            raise HelloError("a response was expected")
        transcript = _transcript(self._cluster, hello.member, self._me, self._nonce, hello.nonce)
        if not hmac.compare_digest(hello.proof, _proof(self._secret, "initiator", transcript)):
            raise HelloError("wrong proof: another secret, cluster, member or incarnation")
        accept = Accept(_proof(self._secret, "acceptor", transcript))
        token = _proof(self._secret, "token", transcript)[:TOKEN_BYTES]
        return hello.member, token, msgspec.msgpack.encode(accept)


class Initiator:
    """The connecting side of one connection. `nonce` must be fresh and random."""

    def __init__(self, secret: bytes, cluster: str, me: Member, peer: Member, nonce: bytes) -> None:
        self._secret, self._cluster, self._me, self._peer, self._nonce = secret, cluster, me, peer, nonce
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
        self._transcript = _transcript(self._cluster, self._me, self._peer, hello.nonce, self._nonce)
        proof = _proof(self._secret, "initiator", self._transcript)
        return msgspec.msgpack.encode(Response(self._me, self._nonce, proof))

    def confirm(self, data: bytes | memoryview) -> bytes:
        """Checks an Accept. Returns the link token. Raises HelloError."""
        hello = _decode(data)
        if not isinstance(hello, Accept) or self._transcript is None:
            raise HelloError("an accept was expected")
        if not hmac.compare_digest(hello.proof, _proof(self._secret, "acceptor", self._transcript)):
            raise HelloError("the acceptor does not know the cluster secret")
        return _proof(self._secret, "token", self._transcript)[:TOKEN_BYTES]
