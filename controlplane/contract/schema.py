"""Versions of values that outlive the code that wrote them: which one a value has, and what is kept on a rewrite.

Each value in etcd says the schema that it was written in. What has to hold when two versions of the code run
side by side:

- A field that older code does not know is not lost when older code rewrites the value (`encode`, with what was there
  before). So an added field needs no new schema, as long as older code does no harm by not knowing it.
- Where older code would do harm, `SCHEMA` is raised: code never rewrites what is newer than itself. It still reads what
  it can (nodes go on serving), but a leader steps back, and says why.
- What cannot be read is unknown: not absent, not cancelled, not to be overwritten.
"""

from __future__ import annotations

import types
import typing
from functools import cache
from typing import Any, TypeVar

import msgspec

from controlplane.contract.errors import NewerSchema

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA = 1  # what this code writes, and the newest that it may rewrite
FIELD = "schema"


class _Header(msgspec.Struct, frozen=True):
    schema: int = 1  # values of the first release do not say


def schema_of(value: bytes) -> int:
    """The schema that a value was written in; 0: that cannot be told."""
    try:
        return msgspec.json.decode(value, type=_Header).schema
    except (msgspec.MsgspecError, RecursionError):
        return 0


def encode(value: msgspec.Struct, before: bytes | None = None) -> bytes:
    """A value as it goes to etcd. `before`: what it replaces, whose fields that this code does not know are kept.

    They are kept at every level, as long as the record that they belong to persists: see `_same`. Raises NewerSchema.
    """
    plain = msgspec.json.encode(value)
    if value.__struct_config__.forbid_unknown_fields:
        return plain  # not a value that versions of the code share
    plain = _with_schema(plain)
    if before is None:
        return plain
    if (schema := schema_of(before)) > SCHEMA:
        raise NewerSchema(f"it was written in schema {schema}, this code knows {SCHEMA}")
    if not _has_unknown(before, type(value)):
        return plain
    merged = _keep(type(value), msgspec.json.decode(before), msgspec.json.decode(plain))
    return msgspec.json.encode(merged)


def _with_schema(encoded: bytes) -> bytes:
    separator = b"" if encoded == b"{}" else b","
    return b'{"%s":%d%s' % (FIELD.encode(), SCHEMA, separator) + encoded[1:]


def _has_unknown(before: bytes, kind: type[msgspec.Struct]) -> bool:
    """Whether a value is anything else than what this code would write for it: the usual case, told fast."""
    return _with_schema(msgspec.json.encode(msgspec.json.decode(before, type=kind))) != before


def _keep(kind: Any, before: Any, after: Any) -> Any:
    """`after`, with what `before` has beyond the fields of `kind`, where both are the same record."""
    kind = _without_none(kind)
    if _is_struct(kind):
        if not (isinstance(before, dict) and isinstance(after, dict) and _same(kind, before, after)):
            return after
        known = _fields(kind)
        merged = {name: _keep(known.get(name), before.get(name), value) for name, value in after.items()}
        return merged | {name: value for name, value in before.items() if name not in known and name != FIELD}
    if typing.get_origin(kind) is tuple and isinstance(before, list) and isinstance(after, list):
        return _keep_items(typing.get_args(kind)[0], before, after)
    return after


def _keep_items(kind: Any, before: list[Any], after: list[Any]) -> list[Any]:
    if not _is_struct(kind):
        return after
    if not _identity(kind):  # its place in the list is what it is
        return [_keep(kind, old, new) for old, new in zip(before, after, strict=False)] + after[len(before) :]
    known = {_name(kind, old): old for old in before if isinstance(old, dict)}
    return [_keep(kind, known.get(_name(kind, new)), new) for new in after]


def _same(kind: type[msgspec.Struct], before: dict[str, Any], after: dict[str, Any]) -> bool:
    return _name(kind, before) == _name(kind, after)


def _name(kind: type[msgspec.Struct], raw: dict[str, Any]) -> tuple[Any, ...]:
    """Which record a mapping is, by the fields that the struct names as its `identity`."""
    fields = _fields(kind)
    values = ((fields[name], raw.get(name)) for name in _identity(kind))
    return tuple(_name(k, v) if _is_struct(k) and isinstance(v, dict) else v for k, v in values)


def _identity(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(kind, "identity", ())
    return found


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return options[0] if len(options) == 1 else kind
    return kind
