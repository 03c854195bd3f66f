"""What can go wrong with etcd, named by whose fault it is, and the one place that reads gRPC's answers."""

from __future__ import annotations

import enum

import grpc


class EtcdError(Exception):
    """etcd answered with a refusal: ours to mend (a bad request) or the operator's (rights, disk space)."""


class EtcdUnavailable(EtcdError):
    """The environment's: no etcd endpoint could serve in time. Nothing was changed; later may help."""


class EtcdUnknown(EtcdError):
    """A write was sent and no answer came: it may or may not have been applied, now or in a moment.

    Never treat it as failed: read again, or repeat the write under a guard that makes repeating harmless.
    """


class EtcdCompacted(EtcdError):
    """The revision asked for is no longer kept: start again from a snapshot."""


class EtcdLeaseGone(EtcdError):
    """The lease has expired or was revoked, and the keys attached to it are deleted."""


class NameTaken(Exception):
    """The operator's: another process has this one's name in the cluster."""


class Outcome(enum.Enum):
    """What an error of one attempt says about the request."""

    REFUSED = "refused"  # definite: repeating gives the same answer
    NOT_APPLIED = "not applied"  # definite: certainly not applied, another endpoint may do better
    UNKNOWN = "unknown"  # it may have been applied


# Refused before the request entered raft, so repeating is safe whatever it was.
_NOT_APPLIED_TEXTS = (
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not capable",
    "etcdserver: rpc not supported for learner",  # a member that is not a voter yet
    "auth: revision in header is old",  # users were changed just then
    "etcdserver: revision of auth store is old",
)

_AMBIGUOUS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
    }
)


def outcome_of(error: grpc.aio.AioRpcError) -> Outcome:
    """Classify the error of a call that was sent on a connected channel."""
    details = error.details() or ""
    if any(text in details for text in _NOT_APPLIED_TEXTS):
        return Outcome.NOT_APPLIED
    return Outcome.UNKNOWN if error.code() in _AMBIGUOUS else Outcome.REFUSED


def refusal(what: str, error: grpc.aio.AioRpcError) -> EtcdError:
    """The exception for a call that etcd refused."""
    details = error.details() or ""
    text = f"{what}: {error.code().name}: {details}"
    if "has been compacted" in details:
        return EtcdCompacted(text)
    if "requested lease not found" in details:
        return EtcdLeaseGone(text)
    return EtcdError(text)


def describe(error: grpc.aio.AioRpcError) -> str:
    """One line for a log or a last-error field."""
    return f"{error.code().name}: {error.details() or 'no details'}"
