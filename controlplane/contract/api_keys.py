"""Clients' API keys with names and limits: a file that holds their hashes, which gateways read again when it changes.

`kfadmin keys` writes it; nothing else does. A key reads `kf-ID-SECRET`: the id finds the record, the secret is 256
random bits, so one salted SHA-256 of it is enough. Beside the file, `api-keys` has keys in the clear, one a line,
without limits: the one that `kfadmin up` makes for a first try."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from controlplane.contract.errors import ConfigError
from controlplane.contract.files import PRIVATE, owner_of, replace_file
from controlplane.unreadable import UNREADABLE

SCHEMA = 1
KEYS_MAX = 10_000
NAME = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$")]
HEX = Annotated[str, Meta(pattern=r"^[0-9a-f]{8,64}$")]
Count = Annotated[int, Meta(ge=0, le=1 << 50)]


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """0 or empty: no limit but the gateway's own. Each gateway counts for itself."""

    models: tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...] = ()
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0  # prompt and output; what is under way when it is used up goes on
    streams: Count = 0  # requests at a time
    memory_bytes: Count = 0  # that requests keep in a gateway
    # The most urgent priority that may be asked for, if that is less urgent than `gateway.priority_floor`.
    priority_floor: Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key. Times are unix seconds; 0: never.

    What is as ever is not written: gateways of earlier releases refuse a file with a field that they do not know."""

    id: HEX
    name: NAME
    salt: HEX
    hash: HEX
    owner: Annotated[str, Meta(max_length=200)] = ""
    created_unix_s: Count = 0
    expires_unix_s: Count = 0
    revoked_unix_s: Count = 0
    limits: KeyLimits = KeyLimits()
    metrics: bool = False  # it reads the gateways' /metrics, which tell of all keys, and does nothing else

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_unix_s:
            return "revoked"
        return "expired" if self.expires_unix_s and now >= self.expires_unix_s else "active"


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    keys: Annotated[tuple[KeyRecord, ...], Meta(max_length=KEYS_MAX)] = ()


def make_key(
    name: str, owner: str, now: int, expires_unix_s: int, limits: KeyLimits, metrics: bool = False
) -> tuple[str, KeyRecord]:
    """A new key, in the clear and as its record. Raises ConfigError for a name or limits that cannot be."""
    key_id, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_hex(16)
    record = KeyRecord(
        key_id, name, salt, _hash(salt, secret), owner, now, expires_unix_s, limits=limits, metrics=metrics
    )
    try:
        msgspec.convert(msgspec.to_builtins(record), KeyRecord)
    except msgspec.ValidationError as error:
        raise ConfigError(f"this key cannot be: {error}") from error
    return f"kf-{key_id}-{secret}", record


def split_key(text: str) -> tuple[str, str] | None:
    """(id, secret) of a key of ours; None: it is none."""
    kind, _, rest = text.partition("-")
    key_id, _, secret = rest.partition("-")
    return (key_id, secret) if kind == "kf" and secret else None


def is_secret(record: KeyRecord, secret: str) -> bool:
    return hmac.compare_digest(_hash(record.salt, secret), record.hash)


def read_keys(path: Path) -> KeyFile:
    """Raises ConfigError: a file that cannot be read, is readable by others, or has anything but records. No file: no
    keys."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except FileNotFoundError:
        return KeyFile()
    except OSError as error:
        raise ConfigError(f"cannot read the API keys {path}: {error.strerror}") from error
    if mode & 0o007:
        raise ConfigError(f"the API keys {path} can be read or written by everybody: chmod o-rwx {path}")
    return parse_keys(content, str(path))


def parse_keys(content: bytes, where: str) -> KeyFile:
    """Raises ConfigError."""
    try:
        found = msgspec.json.decode(content, type=KeyFile)
    except UNREADABLE as error:
        raise ConfigError(f"the API keys {where} cannot be understood: {error}") from error
    for what in ("id", "name"):
        values = [getattr(key, what) for key in found.keys if what == "id" or not key.revoked_unix_s]
        if len(set(values)) < len(values):
            raise ConfigError(f"the API keys {where} have the same {what} twice")
    return found


def merged(ours: Iterable[KeyRecord], theirs: Iterable[KeyRecord]) -> list[KeyRecord]:
    """What two files of keys make together: theirs, and ours that they lack. A key that either has revoked stays so.
    Raises ConfigError where both have given one name to different keys that are good."""
    found = {key.id: key for key in ours}
    for key in theirs:
        mine = found.get(key.id)
        revoked = key.revoked_unix_s or (mine.revoked_unix_s if mine is not None else 0)
        found[key.id] = msgspec.structs.replace(key, revoked_unix_s=revoked)
    named: dict[str, str] = {}
    for key in found.values():
        if not key.revoked_unix_s and (other := named.setdefault(key.name, key.id)) != key.id:
            raise ConfigError(
                f"there would be two API keys {key.name}, {other} and {key.id}: `kfadmin keys revoke {other}` ends one"
            )
    return list(found.values())


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyRecord]]:
    """The records, to be changed in place: written, whole or not at all, unless the block raises. One at a time.
    Raises ConfigError, and OSError if there is no room."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(path.with_name(path.name + ".lock"), flags, PRIVATE)
    try:
        if os.geteuid() == 0:
            owner, found = owner_of(path), os.fstat(lock)
            if found.st_uid != owner.st_uid and found.st_nlink == 1:  # no other name of somebody's file
                with contextlib.suppress(PermissionError):  # as in a container; then it is nobody else's file
                    os.fchown(lock, owner.st_uid, owner.st_gid)
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_keys(path).keys)
        yield keys
        if len(keys) > KEYS_MAX:
            raise ConfigError(f"{path} would have {len(keys)} API keys; {KEYS_MAX} are possible")
        replace_file(path, msgspec.json.format(msgspec.json.encode(KeyFile(keys=tuple(keys)))) + b"\n")
    finally:
        os.close(lock)


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(f"{salt}{secret}".encode()).hexdigest()
