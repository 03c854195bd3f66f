"""Small files that are whole or not there: a full disk or a power failure leaves no half of one behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = 0o600


def replace_file(
    path: Path, content: bytes, mode: int = PRIVATE, owner: os.stat_result | None = None
) -> None:
    """Put a file in place of another one at once; nobody reads it half written, or with more rights.

    `owner`: whose it becomes, where this process may give files away. Raises OSError; then the old file stays."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            if owner is not None and os.geteuid() == 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            os.fsync(fd)  # or the name could reach the disk before the content does
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_file(path: Path, mode: int = PRIVATE) -> Iterator[IO[bytes]]:
    """A file to be written, never in place of another one; removed if the block raises. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def is_blank(path: Path) -> bool:
    """Whether there is no such file, or one with nothing in it, as those of earlier releases are after a full disk
    (empty) or a power failure (zeros). One that cannot be read is not blank."""
    try:
        return not path.read_bytes().strip(b"\0 \t\r\n")
    except FileNotFoundError:
        return True
    except OSError:
        return False
