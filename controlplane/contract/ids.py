"""Identities. A node keeps its name for life; each of its processes is a new incarnation of it."""

from __future__ import annotations

import secrets
from typing import ClassVar

import msgspec

NodeId = str
PipelineId = str


class Member(msgspec.Struct, frozen=True, order=True):
    """One process of one node. Two incarnations of a node share a name and nothing else (no KV, no links)."""

    node: NodeId
    incarnation: str

    identity: ClassVar[tuple[str, ...]] = ("node", "incarnation")  # see schema.py

    def __str__(self) -> str:
        return f"{self.node}@{self.incarnation}"


def new_incarnation() -> str:
    """An unguessable name for a process that just started."""
    return secrets.token_hex(6)


def new_rid() -> int:
    """A request's identity on every plane: 63 random bits, never 0."""
    return secrets.randbits(62) | (1 << 62)
