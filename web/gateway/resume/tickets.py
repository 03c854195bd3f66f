"""Who a stream is: what every event id of it begins with, and what is derived from that (pure but for randomness).

Any gateway can find a stream by it: the ids of its requests and, when the client gave none, its seed are functions of
the nonce. So even a stream that nobody remembers can be computed again from its body, token by token the same.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass

from web.gateway.errors import ApiError

PREFIX = "kf1-"
NONCE_BYTES = 16
OWNER_BYTES, TAG_BYTES = 6, 14
PAYLOAD = struct.Struct(">16sI8s6s")  # nonce, created, digest, owner; 48 bytes with the tag, 64 characters
UNKNOWN = "this is no event id or stream of this cluster: send the request anew, without Last-Event-ID"


@dataclass(frozen=True, slots=True)
class Ticket:
    nonce: bytes
    created_unix_s: int
    digest: bytes  # of what was asked: the same stream cannot be continued with another body
    text: str


class Tickets:
    """Issues and reads tickets. `key` is the cluster's, so that each gateway reads what another has issued."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def issue(self, nonce: bytes, created_unix_s: int, digest: bytes, owner: bytes) -> Ticket:
        payload = PAYLOAD.pack(nonce, created_unix_s, digest, self._name(owner))
        sealed = base64.urlsafe_b64encode(payload + self._tag(payload)).decode()
        return Ticket(nonce, created_unix_s, digest, PREFIX + sealed)

    def read(self, text: str, owner: bytes) -> Ticket:
        """Raises ApiError: 404 for what no gateway of this cluster has issued, 403 for another API key's."""
        try:
            data = base64.b64decode(text.removeprefix(PREFIX), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(404, UNKNOWN) from None
        payload, tag = data[: PAYLOAD.size], data[PAYLOAD.size :]
        genuine = len(payload) == PAYLOAD.size and hmac.compare_digest(tag, self._tag(payload))
        if not genuine or not text.startswith(PREFIX):
            raise ApiError(404, UNKNOWN)
        nonce, created, digest, issued_to = PAYLOAD.unpack(payload)
        if issued_to != self._name(owner):
            raise ApiError(403, "this stream belongs to another API key")
        return Ticket(nonce, created, digest, text)

    def keyed_nonce(self, owner: bytes, idempotency_key: str) -> bytes:
        """The nonce that an Idempotency-Key of this API key always has."""
        message = b"key\0" + owner + idempotency_key.encode()
        return hmac.digest(self._key, message, "sha256")[:NONCE_BYTES]

    def _name(self, owner: bytes) -> bytes:
        """Not a piece of the key's hash: an id is no help in guessing a key."""
        return hmac.digest(self._key, b"owner\0" + owner, "sha256")[:OWNER_BYTES]

    def _tag(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, b"id\0" + payload, "sha256")[:TAG_BYTES]


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def rid_of(nonce: bytes, index: int) -> int:
    """The request of choice `index`: 63 bits, never 0 (`ids.new_rid`)."""
    bits = hashlib.sha256(b"rid" + nonce + index.to_bytes(4, "big")).digest()
    return int.from_bytes(bits[:8], "big") >> 2 | (1 << 62)


def seed_of(nonce: bytes) -> int:
    """The seed of a request that named none: 62 bits."""
    return int.from_bytes(hashlib.sha256(b"seed" + nonce).digest()[:8], "big") >> 2
