"""Versions of values that outlive the code that wrote them: which one a value has, and what is kept on a rewrite.

Each value in etcd says the schema that it was written in. What has to hold when two versions of the code run
side by side:

- A field that older code does not know is not lost when older code rewrites the value (`encode`, with what was there
  before). So an added field needs no new schema, as long as older code does no harm by not knowing it.
- Where older code would do harm, `SCHEMA` is raised: code never rewrites what is newer than itself. It still reads what
  it can (nodes go on serving), but a leader steps back, and says why.
- What cannot be read is unknown: not absent, not cancelled, not to be overwritten. So is what does not say clearly
  which schema it has.

Of a name that a record has twice the last value counts, and alone is kept.
"""

from __future__ import annotations

import json
import types
import typing
from functools import cache
from typing import Any, TypeVar

import msgspec

from controlplane.contract.errors import NewerSchema, PeerError
from controlplane.unreadable import UNREADABLE

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA = 1  # what this code writes, and the newest that it may rewrite
FIELD = "schema"


class _Header(msgspec.Struct, frozen=True):
    schema: int = 1  # values of the first release do not say


def schema_of(value: bytes) -> int:
    """The schema that a value was written in, 1 or more; 0: that cannot be told."""
    try:
        schema = msgspec.json.decode(value, type=_Header).schema
        # A record within may have such a field, too.
        if value.count(b'"%s"' % FIELD.encode()) > 1 and _said(value) > 1:
            return 0
    except (*UNREADABLE, ValueError):
        return 0
    return max(schema, 0)


def _said(value: bytes) -> int:
    """How often an object says its schema. Raises ValueError, RecursionError."""
    fields: list[tuple[str, Any]] = json.loads(value, object_pairs_hook=list)
    return [name for name, _ in fields].count(FIELD)


def encode(value: msgspec.Struct, before: bytes | None = None) -> bytes:
    """A value as it goes to etcd. `before`: what it replaces, whose fields that this code does not know are kept.

    They are kept as they are written, at every level, as long as the record that they belong to persists: see `_same`.
    Raises NewerSchema; PeerError where `before` cannot be read.
    """
    plain = msgspec.json.encode(value)
    if value.__struct_config__.forbid_unknown_fields:
        return plain  # not a value that versions of the code share
    plain = _with_schema(plain)
    if before is None:
        return plain
    if (schema := schema_of(before)) > SCHEMA:
        raise NewerSchema(f"it was written in schema {schema}, this code knows {SCHEMA}")
    if not schema:
        raise PeerError("what it replaces does not say which schema it was written in")
    try:
        if not _has_unknown(before, type(value)):
            return plain
        return msgspec.json.encode(_keep(type(value), msgspec.Raw(before), msgspec.Raw(plain)))
    except UNREADABLE as error:
        raise PeerError(f"what it replaces cannot be read: {error}") from error


def _with_schema(encoded: bytes) -> bytes:
    separator = b"" if encoded == b"{}" else b","
    return b'{"%s":%d%s' % (FIELD.encode(), SCHEMA, separator) + encoded[1:]


def _has_unknown(before: bytes, kind: type[msgspec.Struct]) -> bool:
    """Whether a value is anything else than what this code would write for it: the usual case, told fast."""
    return _with_schema(msgspec.json.encode(msgspec.json.decode(before, type=kind))) != before


def _keep(kind: Any, before: msgspec.Raw, after: msgspec.Raw) -> Any:
    """`after`, with what `before` has beyond the fields of `kind` (a record, or a tuple of them), where both are the
    same record. What is kept is not decoded: a number would be written in another way, or could not be."""
    if not _is_struct(kind):
        items = _array(after)
        return _keep_items(typing.get_args(kind)[0], _array(before), items) if items else after
    if msgspec.json.encode(msgspec.json.decode(before, type=kind | None)) == bytes(before):
        return after  # usual for most of a value's parts
    old, new = _object(before), _object(after)
    if not old or not new or not _same(kind, old, new):
        return after
    within = {n: _keep(k, old[n], new[n]) for n, k in _records(kind).items() if n in old and n in new}
    unknown = old.keys() - _fields(kind).keys() - {FIELD}
    return new | within | {name: value for name, value in old.items() if name in unknown}


def _keep_items(kind: type[msgspec.Struct], before: list[msgspec.Raw], after: list[msgspec.Raw]) -> list[Any]:
    if not _identity(kind):  # its place in the list is what it is
        return [_keep(kind, old, new) for old, new in zip(before, after, strict=False)] + after[len(before) :]
    known = {_name(kind, _object(old)): old for old in before}
    return [
        _keep(kind, known[name], new) if (name := _name(kind, _object(new))) in known else new
        for new in after
    ]


def _same(kind: type[msgspec.Struct], before: dict[str, msgspec.Raw], after: dict[str, msgspec.Raw]) -> bool:
    return _name(kind, before) == _name(kind, after)


def _name(kind: type[msgspec.Struct], raw: dict[str, msgspec.Raw]) -> tuple[Any, ...]:
    """Which record a mapping is, by the fields that the struct names as its `identity`."""
    fields = _fields(kind)
    return tuple(
        msgspec.json.decode(raw[name], type=fields[name]) if name in raw else None for name in _identity(kind)
    )


def _object(raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """Empty for null, too."""
    return msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None) or {}


def _array(raw: msgspec.Raw) -> list[msgspec.Raw]:
    """Empty for null, too."""
    return msgspec.json.decode(raw, type=list[msgspec.Raw] | None) or []


def _identity(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(kind, "identity", ())
    return found


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


@cache
def _records(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields that are records, or tuples of them."""
    found = {name: _without_none(of) for name, of in _fields(kind).items()}
    return {
        name: of
        for name, of in found.items()
        if _is_struct(typing.get_args(of)[0] if typing.get_origin(of) is tuple else of)
    }


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return options[0] if len(options) == 1 else kind
    return kind
