"""The fetched weights of a host, `RUN_DIR/weights`: one bundle for each stage that nodes here run, and none besides.

A node holds a lock on the bundle that it has loaded (a shared flock of its directory, which ends with the process), so
that nobody removes what is in use. Groups may share the shelf, and a bundle: each that needs it has a note in it. One
without notes was fetched by earlier code, and is anybody's."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from controlplane.contract.config import DEFAULT_GROUP
from controlplane.contract.files import replace_file
from controlplane.unreadable import UNREADABLE

log = logging.getLogger(__name__)

# The bundle of a stage; with ".partial" while it is fetched, and GONE while it is removed.
BUNDLE = re.compile(r"(stage\d+of(\d+)-)[^.]+")
GONE = ".gone"
USE_TRIES_MAX = 8  # each time the bundle was removed and fetched again meanwhile
_in_use: list[int] = []  # descriptors, for as long as this process lives


def use(bundle: Path) -> None:
    """This process needs the bundle from now on. Raises OSError if it is gone."""
    for _ in range(USE_TRIES_MAX):
        fd = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            is_current = _is_at(fd, bundle)
        except BaseException:
            os.close(fd)
            raise
        if is_current:
            _in_use.append(fd)
            return
        os.close(fd)
    raise OSError(errno.EAGAIN, "is replaced again and again", str(bundle))


def _is_at(fd: int, bundle: Path) -> bool:
    """Whether it is still this directory that has the name: who waited for its lock may have one that was removed.
    Raises OSError if none has."""
    return os.path.samestat(os.fstat(fd), os.stat(bundle))


class Note(msgspec.Struct, frozen=True):
    """Why a group has a bundle."""

    model: str  # of its settings, when it was fetched
    checkpoint: str = ""  # as in NodeRecord


def note(bundle: Path, group: str, said: Note) -> None:
    """In place of the group's note of before. Raises OSError."""
    replace_file(bundle / f"of-{group}.json", msgspec.json.encode(said))


def notes(bundle: Path) -> Mapping[str, Note]:
    """By group. One that cannot be read is of a model that nobody has."""
    found = {}
    for path in bundle.glob("of-*.json"):
        try:
            said = msgspec.json.decode(path.read_bytes(), type=Note)
        except (OSError, *UNREADABLE):
            said = Note("")
        found[path.name.removeprefix("of-").removesuffix(".json")] = said
    return found


def tidy(shelf: Path, current: Path | None, prefix: str, group: str = DEFAULT_GROUP) -> list[Path]:
    """Removes what no stage of the group needs: bundles of the stage (`prefix`) but `current`, all but the newest of
    other stages, and those of another number of stages. What other groups need stays. The caller holds the lock of its
    stage. Returns what is gone."""
    for path in [path for path in shelf.iterdir() if path.suffix == GONE and BUNDLE.match(path.name)]:
        _remove(path)  # of which a process that ended left some
    stages = _stages(f"{prefix}x")
    newest: dict[str, Path] = {} if current is None else {prefix: current}
    bundles = [path for path in shelf.iterdir() if path.is_dir() and _is_bundle(path)]
    noted = {path: notes(path) for path in bundles}
    ours = [path for path in bundles if not noted[path] or group in noted[path]]
    whole = [path for path in ours if not path.suffix]
    for path in sorted(whole, key=lambda path: path.stat().st_mtime):
        of = _prefix(path.name)
        if of != prefix and _stages(path.name) == stages:
            newest[of] = path
    removed = []
    for path in ours:
        mine = _prefix(path.name) == prefix
        if path in newest.values() or (path.suffix and not mine and _stages(path.name) == stages):
            continue  # needed, or another stage's fetch that goes on
        if len(noted[path]) > 1:
            (path / f"of-{group}.json").unlink(missing_ok=True)
        elif _remove(path):
            removed.append(path)
    return removed


def _is_bundle(path: Path) -> bool:
    return BUNDLE.match(path.name) is not None and path.suffix != GONE


def _prefix(name: str) -> str:
    match = BUNDLE.match(name)
    assert match is not None
    return match[1]


def _stages(name: str) -> str:
    match = BUNDLE.match(name)
    return match[2] if match is not None else ""


def _remove(bundle: Path) -> bool:
    """Unless it is in use. What cannot be removed is tried again at the next start. It loses its name first: one of
    which some files are gone looks whole to who finds it."""
    try:
        fd = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(fd, bundle):
            return False
        gone = bundle if bundle.suffix == GONE else bundle.with_name(bundle.name + GONE)
        shutil.rmtree(bundle.rename(gone))
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("old weights %s cannot be removed: %s", bundle, error)
        return False
    finally:
        os.close(fd)
    log.info("old weights %s are removed", bundle)
    return True
