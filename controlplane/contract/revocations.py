"""Tokens and sessions that are good no more, although they are signed and have not expired (pure).

A signature says that a credential was given; whether it was taken back stands in etcd, under `revoked/` of the group,
where every controller watches it. An entry is leased until what it revokes would have expired by itself.
"""

from __future__ import annotations

import hashlib

import msgspec

ENTRIES_MAX = 10_000  # of people who sign out; as many again for operators' decisions
ENTRIES_PER_NAME_MAX = 500  # so that nobody who may sign in, and out, can use all of them up
LEEWAY_S = 60  # between the clocks of controllers: an entry goes later than what it revokes
SHOWN = " ("  # what follows in the name of somebody at a provider may change: their mail address


class Revocation(msgspec.Struct, frozen=True):
    """One entry. It does not contain the credential, and nothing can be made of it."""

    id: str  # of a session, a token, or all that has one name
    name: str  # whose it was, as the audit has it
    expiry_unix_s: int  # until when it would have been good
    by: str  # who took it back


class RevokeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two: a token, or everything that was given to a name, its sessions included."""

    name: str = ""
    token: str = ""


def token_id(token: str) -> str:
    """Sessions that were opened with the token carry it as well."""
    return f"t{_digest('token', token)}"


def name_id(name: str) -> str:
    return f"n{_digest('name', name.partition(SHOWN)[0])}"


def _digest(kind: str, text: str) -> str:
    return hashlib.sha256(f"kevlarflow/revoked/{kind}/{text}".encode()).hexdigest()[:32]
