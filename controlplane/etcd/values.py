"""The values that cross the client's border: str keys, bytes values, everything frozen.

Keys are UTF-8; a foreign key that is not survives the round trip (surrogateescape).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it. Revisions are those of the whole store; `lease` is 0 without one."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every key under a prefix, as of `revision`."""

    revision: int
    items: Mapping[str, KeyValue]


class Target(enum.Enum):
    """What a comparison looks at. An absent key has version, create and mod revision 0."""

    VERSION = "version"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VALUE = "value"
    LEASE = "lease"


class Relation(enum.Enum):
    EQUAL = "="
    NOT_EQUAL = "!="
    GREATER = ">"
    LESS = "<"


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition of a transaction: `target` of `key` stands in `relation` to `operand`."""

    key: str
    target: Target
    relation: Relation
    operand: int | bytes

    @staticmethod
    def absent(key: str) -> Compare:
        return Compare(key, Target.CREATE_REVISION, Relation.EQUAL, 0)

    @staticmethod
    def create_revision(key: str, revision: int) -> Compare:
        return Compare(key, Target.CREATE_REVISION, Relation.EQUAL, revision)

    @staticmethod
    def mod_revision(key: str, revision: int) -> Compare:
        """The compare-and-swap condition; revision 0 means that the key is absent."""
        return Compare(key, Target.MOD_REVISION, Relation.EQUAL, revision)

    @staticmethod
    def value(key: str, value: bytes) -> Compare:
        return Compare(key, Target.VALUE, Relation.EQUAL, value)


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    key: str
    prefix: bool = False


Operation = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class PutDone:
    """A put of a transaction was applied."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """A delete of a transaction was applied to `count` keys."""

    count: int


OperationResult = PutDone | Deleted | Snapshot


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`succeeded`: the conditions held and `success` was applied; else `failure` was. Results in order."""

    succeeded: bool
    revision: int
    results: tuple[OperationResult, ...]


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A change of one key: its new state, or None once it is deleted."""

    key: str
    mod_revision: int
    now: KeyValue | None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes up to and including `revision`, in order; no revision is split over two batches.

    With `is_snapshot` the events are the puts of every key there is, and any other key is gone.
    """

    revision: int
    events: tuple[WatchEvent, ...]
    is_snapshot: bool = False


def fold(items: Mapping[str, KeyValue], batch: WatchBatch) -> dict[str, KeyValue]:
    """The view after `batch`, given the view before it."""
    after = {} if batch.is_snapshot else dict(items)
    for event in batch.events:
        if event.now is None:
            after.pop(event.key, None)
        else:
            after[event.key] = event.now
    return after


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """What one endpoint says of itself, for an operator's page. `problem` is set when it did not answer."""

    endpoint: str
    problem: str = ""
    latency_s: float = 0.0
    version: str = ""
    member_id: int = 0
    leader_id: int = 0  # 0: it knows no leader
    is_learner: bool = False
    db_size_bytes: int = 0
    db_in_use_bytes: int = 0
    raft_term: int = 0
    raft_index: int = 0
    raft_applied_index: int = 0
    errors: tuple[str, ...] = ()  # alarms: NOSPACE, CORRUPT

    @property
    def is_leader(self) -> bool:
        return self.member_id != 0 and self.member_id == self.leader_id


@dataclass(slots=True)
class EtcdCounters:
    """Running totals of one client, for /metrics."""

    calls: int = 0
    retries: int = 0
    unavailable: int = 0
    unknown: int = 0
    endpoint_switches: int = 0
    watch_reconnects: int = 0
    watch_snapshots: int = 0
    watch_compactions: int = 0
    watch_resets: int = 0  # the store went back in time (restored, or wiped)
    leases_lost: int = 0
    last_error: str = field(default="")
