"""Who did what to a cluster, from where, and in which epochs: append-only, see controlplane/history."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Action(StrEnum):
    SUBMITTED = "submitted"  # accepted and written
    REFUSED = "refused"  # by pre-flight, or because the epoch was another one
    CANCELLED = "cancelled"
    DONE = "done"
    FAILED = "failed"
    REVOKED = "revoked"  # a token, or all that has one name


class AuditEntry(msgspec.Struct, frozen=True):
    id: int
    unix_s: float
    action: Action
    operation: str  # its id, or that of a revocation
    kind: str
    node: str
    substitute: str
    message: str  # what the cluster says
    reason: str  # what the operator said
    who: str  # name in the token; "admin": the cluster's own token; for done and failed the controller
    role: str
    address: str  # host that the request came from; "" for what a controller did by itself
    epoch_before: int  # counter of the topology when the operation was first heard of
    epoch_after: int  # and as this entry was made
    recorded_by: str  # the controller
