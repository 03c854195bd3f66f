"""The digest of a stage's weights, kept beside the identity of the files that it was computed from.

To hash a stage takes a second a gigabyte at every start. As long as the files are the same ones (device, inode, size,
times of change), so are the tensors in them, and the digest that was computed once is taken."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from controlplane.contract.files import replace_file
from controlplane.unreadable import UNREADABLE
from dataplane.model.errors import ModelError

FORMAT = 1  # raise it when what is hashed, or how, changes
# A file that was written to a moment ago may be written to again without a change of its times.
SETTLED_S = 2.0


class FileIdentity(msgspec.Struct, frozen=True):
    path: str
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int  # of the inode: also set by who sets `modified_ns` back


class KnownDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    names: tuple[str, ...]  # of the tensors
    files: tuple[FileIdentity, ...]
    digest: str


def identity(path: Path) -> FileIdentity:
    """Raises ModelError."""
    path = path.resolve()
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(path, None, f"cannot be read: {error}") from error
    return FileIdentity(str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def identities(files: Iterable[Path]) -> tuple[FileIdentity, ...]:
    """To be taken before the files are read. Raises ModelError."""
    return tuple(map(identity, sorted(files)))


def digest_as(digest: str, weights: str) -> str:
    """The digest of tensors of this digest that are served as `engine.weights` says: what is quantised when it is
    loaded stands in for nothing but its like."""
    if weights == "model":
        return digest
    return hashlib.blake2b(f"{weights} {digest}".encode(), digest_size=len(digest) // 2).hexdigest()


def digest_once(
    compute: Callable[[], str], names: Iterable[str], before: tuple[FileIdentity, ...], kept: Path | None
) -> str:
    """What `compute` returns for these tensors, read from files that had these identities `before`; from the file
    `kept` if it was computed for the same ones earlier.

    `kept` None: computed each time. A file `kept` that cannot be read or written costs time, nothing else. Raises
    ModelError if a checkpoint's file is gone, and what `compute` raises."""
    wanted, paths = tuple(sorted(names)), [Path(file.path) for file in before]
    known = _read(kept) if kept is not None else None
    same = known is not None and (known.format, known.names, known.files) == (FORMAT, wanted, before)
    if known is not None and same and identities(paths) == before:  # else what was read may be another file's
        return known.digest
    digest = compute()
    settled = time.time_ns() - int(SETTLED_S * 1e9)
    old = all(max(file.modified_ns, file.changed_ns) < settled for file in before)
    if kept is not None and old and identities(paths) == before:
        _write(kept, KnownDigest(FORMAT, wanted, before, digest))
    return digest


def _read(kept: Path) -> KnownDigest | None:
    try:
        return msgspec.json.decode(kept.read_bytes(), type=KnownDigest)
    except (OSError, *UNREADABLE):
        return None  # none yet, damaged, or of another version: it is computed and written anew


def _write(kept: Path, known: KnownDigest) -> None:
    """Whole or not at all: nodes of one stage on one host share the file."""
    with contextlib.suppress(OSError):  # it is computed again at the next start
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(kept, msgspec.json.encode(known), durable=False)
