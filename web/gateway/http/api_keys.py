"""Who asks: API keys as hashes, from two files that may change while the gateway serves."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import hmac
import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from controlplane.contract.api_keys import KeyLimits, KeyRecord, is_secret, read_keys, split_key
from controlplane.contract.errors import ConfigError
from web.gateway.errors import ApiError
from web.gateway.key_usage import KeyUsage

log = structlog.get_logger()

LOOK_EVERY_S = 1.0  # at the files; a key that is revoked is good for so long
NEEDED = "a valid API key is needed: Authorization: Bearer KEY"
Stamp = tuple[int, int, int] | None


class Right(enum.Enum):
    """What a key is good for."""

    ALL = "all"  # an operator's, in the clear: also /metrics
    USE = "use"  # a client's
    METRICS = "metrics"  # a scraper's: /metrics alone


@dataclass(frozen=True, slots=True)
class Caller:
    """`owner`: what streams and memory are counted under, the same as long as the key lives."""

    owner: bytes
    usage: KeyUsage
    right: Right

    @property
    def name(self) -> str:
        return self.usage.name

    @property
    def limits(self) -> KeyLimits:
        return self.usage.limits


class ApiKeys:
    """The process does not keep what would let somebody in."""

    def __init__(self, plain: list[str], records: tuple[KeyRecord, ...] = ()) -> None:
        """`plain`: keys in the clear, without limits; they are called key1, key2 ... in their order."""
        self.trouble = ""  # why the newest files are not in use
        self._usages: dict[bytes, KeyUsage] = {}
        self._files: tuple[Path, Path] | None = None
        self._stamps: tuple[Stamp, Stamp] = (None, None)
        self._use(plain, records)

    @classmethod
    def load(cls, plain: Path, records: Path) -> ApiKeys:
        """`plain`: one key a line; empty lines and lines that start with # do not count. `records`: see
        controlplane/contract/api_keys.py. Either may be missing. Raises ConfigError, also if there is no key at all."""
        keys = cls([])
        keys._files = plain, records
        keys._stamps = _stamp(plain), _stamp(records)
        keys._use(_read_plain(plain), read_keys(records).keys)
        if not keys._plain and not keys._records:
            raise ConfigError(f"neither {plain} nor {records} has an API key: nobody could use the gateway")
        return keys

    def usages(self) -> list[KeyUsage]:
        """Of all keys that there are, and those gone of which something still runs."""
        return list(self._usages.values())

    def match(self, authorization: str | None) -> Caller:
        """Whose key a header carries. Raises ApiError 401."""
        scheme, _, key = (authorization or "").replace("\t", " ").partition(" ")
        if scheme.lower() != "bearer":
            raise ApiError(401, NEEDED)
        key = key.strip()
        parts = split_key(key)
        record = self._records.get(parts[0]) if parts is not None else None
        if record is not None and parts is not None and is_secret(record, parts[1]):
            if (state := record.state(time.time())) != "active":
                raise ApiError(401, f"this API key is {state}")
            return self._caller(_owner_of(record), Right.METRICS if record.metrics else Right.USE)
        digest = hashlib.sha256(key.encode()).digest()
        # All of them, in equal time.
        if not any([hmac.compare_digest(digest, known) for known in self._plain]):
            raise ApiError(401, NEEDED)
        return self._caller(digest, Right.ALL)

    def look(self) -> None:
        """Take in what has changed. What cannot be read changes nothing, and is said."""
        if self._files is None:
            return
        plain, records = self._files
        stamps = _stamp(plain), _stamp(records)
        if stamps == self._stamps:
            return
        try:
            self._use(_read_plain(plain), read_keys(records).keys)
        except ConfigError as error:
            if str(error) != self.trouble:
                log.warning("API keys as before", reason=str(error))
            self.trouble = str(error)
            return
        self._stamps, self.trouble = stamps, ""
        log.info("API keys read again", plain=len(self._plain), keys=len(self._records))

    async def follow(self) -> None:
        """For ever: `look` now and again."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def _use(self, plain: list[str], records: tuple[KeyRecord, ...]) -> None:
        self._plain = [hashlib.sha256(key.encode()).digest() for key in plain]
        self._records = {record.id: record for record in records}
        wanted = {digest: (f"key{number}", KeyLimits()) for number, digest in enumerate(self._plain, 1)}
        wanted |= {_owner_of(record): (record.name, record.limits) for record in records}
        for owner, (name, limits) in wanted.items():
            usage = self._usages.get(owner)
            if usage is None:
                self._usages[owner] = KeyUsage(name, limits)
            elif usage.limits != limits:
                usage.become(limits)
        for owner in [o for o, usage in self._usages.items() if o not in wanted and not usage.running]:
            del self._usages[owner]

    def _caller(self, owner: bytes, right: Right) -> Caller:
        return Caller(owner, self._usages[owner], right)


def _owner_of(record: KeyRecord) -> bytes:
    return hashlib.sha256(f"key {record.id}".encode()).digest()


def _read_plain(path: Path) -> list[str]:
    """Raises ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys {path}: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _stamp(path: Path) -> Stamp:
    """Another one for another content."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
