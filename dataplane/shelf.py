"""The fetched weights of a host, `RUN_DIR/weights`: one bundle for each stage that nodes here run, and none besides.

A node holds a lock on the bundle that it has loaded (a shared flock of its directory, which ends with the process), so
that nobody removes what is in use."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

BUNDLE = re.compile(r"(stage\d+of(\d+)-)[^.]+")  # the bundle of a stage; with ".partial" while it is fetched
_in_use: list[int] = []  # descriptors, for as long as this process lives


def use(bundle: Path) -> None:
    """This process needs the bundle from now on. Raises OSError if it is gone."""
    fd = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    _in_use.append(fd)


def tidy(shelf: Path, current: Path, prefix: str) -> list[Path]:
    """Removes what no stage needs: bundles of the stage of `current` but that one, all but the newest of other stages,
    and those of another number of stages. The caller holds the lock of its stage (`prefix`). Returns what is gone."""
    stages = _stages(current.name)
    newest: dict[str, Path] = {prefix: current}
    bundles = [path for path in shelf.iterdir() if path.is_dir() and BUNDLE.match(path.name)]
    whole = [path for path in bundles if not path.suffix]
    for path in sorted(whole, key=lambda path: path.stat().st_mtime):
        of = _prefix(path.name)
        if of != prefix and _stages(path.name) == stages:
            newest[of] = path
    removed = []
    for path in bundles:
        mine = _prefix(path.name) == prefix
        if path in newest.values() or (path.suffix and not mine and _stages(path.name) == stages):
            continue  # needed, or another stage's fetch that goes on
        if _remove(path):
            removed.append(path)
    return removed


def _prefix(name: str) -> str:
    match = BUNDLE.match(name)
    assert match is not None
    return match[1]


def _stages(name: str) -> str:
    match = BUNDLE.match(name)
    return match[2] if match is not None else ""


def _remove(bundle: Path) -> bool:
    """Unless it is in use. What cannot be removed is tried again at the next start."""
    try:
        fd = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(bundle)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("old weights %s cannot be removed: %s", bundle, error)
        return False
    finally:
        os.close(fd)
    log.info("old weights %s are removed", bundle)
    return True
