"""Between our values and etcd's messages, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from controlplane.etcd.proto import kv_pb2, rpc_pb2
from controlplane.etcd.values import (
    Compare,
    Delete,
    Deleted,
    Get,
    KeyValue,
    Operation,
    OperationResult,
    Put,
    PutDone,
    Relation,
    Snapshot,
    Target,
    WatchEvent,
)

_RELATIONS = {
    Relation.EQUAL: rpc_pb2.Compare.EQUAL,
    Relation.NOT_EQUAL: rpc_pb2.Compare.NOT_EQUAL,
    Relation.GREATER: rpc_pb2.Compare.GREATER,
    Relation.LESS: rpc_pb2.Compare.LESS,
}
_TARGETS = {
    Target.VERSION: rpc_pb2.Compare.VERSION,
    Target.CREATE_REVISION: rpc_pb2.Compare.CREATE,
    Target.MOD_REVISION: rpc_pb2.Compare.MOD,
    Target.VALUE: rpc_pb2.Compare.VALUE,
    Target.LEASE: rpc_pb2.Compare.LEASE,
}


def key_bytes(key: str) -> bytes:
    """The key on the wire. Raises ValueError for the empty key, which etcd does not allow."""
    if not key:
        raise ValueError("an etcd key cannot be empty")
    return key.encode("utf-8", "surrogateescape")


def key_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """(key, range_end) that cover every key starting with `prefix`; the empty prefix covers all keys."""
    raw = prefix.encode("utf-8", "surrogateescape")
    if not raw:
        return b"\0", b"\0"
    stem = raw.rstrip(b"\xff")
    return raw, (stem[:-1] + bytes((stem[-1] + 1,))) if stem else b"\0"


def _span(key: str, prefix: bool) -> tuple[bytes, bytes]:
    return prefix_range(key) if prefix else (key_bytes(key), b"")


def range_request(key: str, prefix: bool, count_only: bool = False) -> rpc_pb2.RangeRequest:
    start, end = _span(key, prefix)
    return rpc_pb2.RangeRequest(key=start, range_end=end, count_only=count_only)


def put_request(put: Put) -> rpc_pb2.PutRequest:
    return rpc_pb2.PutRequest(key=key_bytes(put.key), value=put.value, lease=put.lease)


def delete_request(delete: Delete) -> rpc_pb2.DeleteRangeRequest:
    start, end = _span(delete.key, delete.prefix)
    return rpc_pb2.DeleteRangeRequest(key=start, range_end=end)


def compare_message(compare: Compare) -> rpc_pb2.Compare:
    message = rpc_pb2.Compare(
        key=key_bytes(compare.key), target=_TARGETS[compare.target], result=_RELATIONS[compare.relation]
    )
    setattr(message, compare.target.value, compare.operand)
    return message


def operation_message(operation: Operation) -> rpc_pb2.RequestOp:
    match operation:
        case Put():
            return rpc_pb2.RequestOp(request_put=put_request(operation))
        case Delete():
            return rpc_pb2.RequestOp(request_delete_range=delete_request(operation))
        case Get(key, prefix):
            return rpc_pb2.RequestOp(request_range=range_request(key, prefix))
        case _:
            assert_never(operation)


def operation_result(message: rpc_pb2.ResponseOp) -> OperationResult:
    """Raises ValueError for an answer to something that we never ask."""
    match message.WhichOneof("response"):
        case "response_put":
            return PutDone()
        case "response_delete_range":
            return Deleted(message.response_delete_range.deleted)
        case "response_range":
            return snapshot(message.response_range)
        case other:
            raise ValueError(f"etcd answered a transaction with {other}")


def key_value(message: kv_pb2.KeyValue) -> KeyValue:
    return KeyValue(
        key=key_text(message.key),
        value=message.value,
        create_revision=message.create_revision,
        mod_revision=message.mod_revision,
        version=message.version,
        lease=message.lease,
    )


def snapshot(message: rpc_pb2.RangeResponse) -> Snapshot:
    values = map(key_value, message.kvs)
    return Snapshot(message.header.revision, {value.key: value for value in values})


def watch_events(messages: Iterable[kv_pb2.Event], after_revision: int) -> tuple[WatchEvent, ...]:
    """The events newer than `after_revision`, in order."""
    return tuple(
        WatchEvent(
            key=key_text(message.kv.key),
            mod_revision=message.kv.mod_revision,
            now=None if message.type == kv_pb2.Event.DELETE else key_value(message.kv),
        )
        for message in messages
        if message.kv.mod_revision > after_revision
    )
