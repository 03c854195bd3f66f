"""etcd's data model: revisions, comparisons, transactions, leases, history and compaction. No time, no network."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpc import StatusCode as Status

from controlplane.etcd.proto import kv_pb2, rpc_pb2

VALUE_BYTES_MAX = 1_500_000


class Refused(Exception):
    """etcd's answer to a request that it does not take."""

    def __init__(self, code: Status, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


@dataclass
class Lease:
    id: int
    ttl_s: int
    deadline: float
    owner: Any
    keys: set[bytes] = field(default_factory=set)


COMPARED = {
    rpc_pb2.Compare.VERSION: ("version", "version"),
    rpc_pb2.Compare.CREATE: ("create_revision", "create_revision"),
    rpc_pb2.Compare.MOD: ("mod_revision", "mod_revision"),
    rpc_pb2.Compare.VALUE: ("value", "value"),
    rpc_pb2.Compare.LEASE: ("lease", "lease"),
}
RELATIONS: dict[int, Callable[[Any, Any], bool]] = {
    rpc_pb2.Compare.EQUAL: lambda a, b: a == b,
    rpc_pb2.Compare.NOT_EQUAL: lambda a, b: a != b,
    rpc_pb2.Compare.GREATER: lambda a, b: a > b,
    rpc_pb2.Compare.LESS: lambda a, b: a < b,
}


class Store:
    """What raft agrees on. Every method is atomic; each that changes something makes one revision."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.kvs: dict[bytes, kv_pb2.KeyValue] = {}
        self.leases: dict[int, Lease] = {}
        self.history: list[tuple[int, list[kv_pb2.Event]]] = []
        self.latest: list[kv_pb2.KeyValue] = []  # what the newest revision changed; deleted: without a value
        self.changed: Callable[[], None] = lambda: None
        self._next_lease = 7000
        self._news: dict[tuple[int, bytes, bytes], rpc_pb2.WatchResponse | None] = {}  # at this revision:
        self._news_revision = 0

    def header(self) -> rpc_pb2.ResponseHeader:
        return rpc_pb2.ResponseHeader(cluster_id=1, revision=self.revision, raft_term=2)

    # Requests. Each raises Refused.

    def range(self, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
        found = [self.kvs[key] for key in self._keys(request.key, request.range_end)]
        kvs = [] if request.count_only else found
        return rpc_pb2.RangeResponse(header=self.header(), kvs=kvs, count=len(found))

    def put(self, request: rpc_pb2.PutRequest) -> rpc_pb2.PutResponse:
        self._check_put(request)
        self._commit([lambda revision: self._put(request, revision)])
        return rpc_pb2.PutResponse(header=self.header())

    def delete_range(self, request: rpc_pb2.DeleteRangeRequest) -> rpc_pb2.DeleteRangeResponse:
        keys = self._keys(request.key, request.range_end)
        self._commit([lambda revision: self._delete(keys, revision)])
        return rpc_pb2.DeleteRangeResponse(header=self.header(), deleted=len(keys))

    def txn(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        for op in (*request.success, *request.failure):
            if op.WhichOneof("request") == "request_put":
                self._check_size(op.request_put)
        succeeded = all(self._holds(compare) for compare in request.compare)
        chosen = request.success if succeeded else request.failure
        for op in chosen:
            if op.WhichOneof("request") == "request_put":
                self._check_put(op.request_put)
        responses: list[rpc_pb2.ResponseOp] = []

        def run(op: rpc_pb2.RequestOp) -> Callable[[int], list[kv_pb2.Event]]:
            def at(revision: int) -> list[kv_pb2.Event]:
                match op.WhichOneof("request"):
                    case "request_put":
                        responses.append(rpc_pb2.ResponseOp(response_put=rpc_pb2.PutResponse()))
                        return self._put(op.request_put, revision)
                    case "request_delete_range":
                        keys = self._keys(op.request_delete_range.key, op.request_delete_range.range_end)
                        done = rpc_pb2.DeleteRangeResponse(deleted=len(keys))
                        responses.append(rpc_pb2.ResponseOp(response_delete_range=done))
                        return self._delete(keys, revision)
                    case _:
                        found = self.range(op.request_range)
                        responses.append(rpc_pb2.ResponseOp(response_range=found))
                        return []

            return at

        self._commit([run(op) for op in chosen])
        return rpc_pb2.TxnResponse(header=self.header(), succeeded=succeeded, responses=responses)

    def compact(self, revision: int) -> rpc_pb2.CompactionResponse:
        if revision <= self.compacted:
            text = "etcdserver: mvcc: required revision has been compacted"
            raise Refused(Status.OUT_OF_RANGE, text)
        if revision > self.revision:
            raise Refused(Status.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        self.compacted = revision
        self.history = [entry for entry in self.history if entry[0] > revision]
        return rpc_pb2.CompactionResponse(header=self.header())

    # Leases.

    def grant(self, ttl_s: int, now: float, owner: Any) -> Lease:
        self._next_lease += 1
        lease = Lease(self._next_lease, ttl_s, now + ttl_s, owner)
        self.leases[lease.id] = lease
        return lease

    def revoke(self, lease_id: int) -> None:
        """Ends a lease, and its keys with one revision."""
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            raise Refused(Status.NOT_FOUND, "etcdserver: requested lease not found")
        self._commit([lambda revision: self._delete(sorted(lease.keys), revision)])

    # History.

    def since(self, revision: int, key: bytes, end: bytes) -> list[kv_pb2.Event]:
        """Events of these keys from `revision` on, which must not be compacted."""
        first = bisect_right(self.history, revision - 1, key=lambda entry: entry[0])
        return [e for _, each in self.history[first:] for e in each if within(e.kv.key, key, end)]

    def news(self, seen: int, key: bytes, end: bytes) -> rpc_pb2.WatchResponse | None:
        """What a watcher of these keys has not seen; one message for all who have seen as much."""
        if self._news_revision != self.revision:
            self._news, self._news_revision = {}, self.revision
        asked = seen, key, end
        if asked not in self._news:
            events = self.since(seen + 1, key, end)
            made = rpc_pb2.WatchResponse(header=self.header(), events=events) if events else None
            self._news[asked] = made
        return self._news[asked]

    # Within.

    def _keys(self, key: bytes, end: bytes) -> list[bytes]:
        if not end:
            return [key] if key in self.kvs else []
        return sorted(k for k in self.kvs if within(k, key, end))

    def _holds(self, compare: rpc_pb2.Compare) -> bool:
        field_name, operand = COMPARED[compare.target]
        kv = self.kvs.get(compare.key)
        if kv is None:
            if compare.target == rpc_pb2.Compare.VALUE:
                return False
            kv = kv_pb2.KeyValue()
        return RELATIONS[compare.result](getattr(kv, field_name), getattr(compare, operand))

    def _check_size(self, request: rpc_pb2.PutRequest) -> None:
        if len(request.value) > VALUE_BYTES_MAX:
            raise Refused(Status.INVALID_ARGUMENT, "etcdserver: request is too large")

    def _check_put(self, request: rpc_pb2.PutRequest) -> None:
        self._check_size(request)
        if request.lease and request.lease not in self.leases:
            raise Refused(Status.NOT_FOUND, "etcdserver: requested lease not found")

    def _commit(self, operations: list[Callable[[int], list[kv_pb2.Event]]]) -> None:
        revision = self.revision + 1
        made = [event for operation in operations for event in operation(revision)]
        if made:
            self.revision = revision
            self.history.append((revision, made))
            self.latest = [event.kv for event in made]
            self.changed()

    def _put(self, request: rpc_pb2.PutRequest, revision: int) -> list[kv_pb2.Event]:
        key, old = request.key, self.kvs.get(request.key)
        if old is not None and old.lease in self.leases:
            self.leases[old.lease].keys.discard(key)
        kv = self.kvs[key] = kv_pb2.KeyValue(
            key=key,
            value=request.value,
            create_revision=revision if old is None else old.create_revision,
            mod_revision=revision,
            version=1 if old is None else old.version + 1,
            lease=request.lease,
        )
        if request.lease:
            self.leases[request.lease].keys.add(key)
        return [kv_pb2.Event(type=kv_pb2.Event.PUT, kv=kv)]

    def _delete(self, keys: list[bytes], revision: int) -> list[kv_pb2.Event]:
        gone = []
        for key in keys:
            kv = self.kvs.pop(key)
            if kv.lease in self.leases:
                self.leases[kv.lease].keys.discard(key)
            tombstone = kv_pb2.KeyValue(key=key, mod_revision=revision)
            gone.append(kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=tombstone))
        return gone


def within(key: bytes, start: bytes, end: bytes) -> bool:
    """Whether a range request covers a key."""
    if not end:
        return key == start
    return key >= start and (end == b"\0" or key < end)
