"""Small files that are whole or not there: a full disk or a power failure leaves no half of one behind."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = 0o600


def replace_file(
    path: Path,
    content: bytes,
    mode: int = PRIVATE,
    owner: os.stat_result | None = None,
    *,
    durable: bool = True,
) -> None:
    """Put a file in place of another one at once; nobody reads it half written, or with more rights.

    Where this process may give files away it becomes `owner`'s, or stays whose it was: a service goes on reading what
    root has changed. Not `durable`: a power failure may leave an empty one, and nobody waits for the disk.
    Raises OSError; then the old file stays."""
    fresh = f".{path.name}.{secrets.token_hex(8)}.new"  # nobody can put a link there before us
    with opened_folder(path.parent) as folder:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder)
        try:
            with open(fd, "wb") as file:
                if os.geteuid() == 0:
                    _give(fd, folder, path.name, owner)
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(fd)  # or the name could reach the disk before the content does
            os.replace(fresh, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=folder)
            raise


def make_folder(path: Path) -> None:
    """A private folder, unless it is there; one that root makes is of whoever has the folder around it."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        if os.geteuid() == 0:
            around = path.parent.stat()
            os.chown(path, around.st_uid, around.st_gid, follow_symlinks=False)


@contextlib.contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """A folder, for functions that take `dir_fd`: it stays the same one, whatever becomes of its name. Raises OSError;
    PermissionError for root where its name is somebody else's link, as that could lead anywhere."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    if os.geteuid() == 0 and not (path.is_symlink() and path.lstat().st_uid == 0):
        flags |= os.O_NOFOLLOW
    try:
        folder = os.open(path, flags)
    except NotADirectoryError:
        if flags & os.O_NOFOLLOW and path.is_symlink():
            raise PermissionError(errno.EPERM, "a link that is not root's", str(path)) from None
        raise
    try:
        yield folder
    finally:
        os.close(folder)


def owner_of(path: Path) -> os.stat_result:
    """Whose a file is, or is to be if it is not there: of its folder's owner. Raises OSError."""
    with opened_folder(path.parent) as folder:
        return _owner(folder, path.name)


def _owner(folder: int, name: str) -> os.stat_result:
    around = os.fstat(folder)
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(name, dir_fd=folder, follow_symlinks=False)
        # Where everybody may write, somebody could have put it there to be given what comes.
        if stat.S_ISREG(old.st_mode) and (old.st_uid == around.st_uid or not around.st_mode & 0o002):
            return old
    return around


def _give(fd: int, folder: int, name: str, owner: os.stat_result | None) -> None:
    heir = _owner(folder, name) if owner is None else owner
    if (heir.st_uid, heir.st_gid) == (os.geteuid(), os.getegid()):
        return
    try:
        os.fchown(fd, heir.st_uid, heir.st_gid)
    except OSError:
        # A root that may not: in a container, or on NFS. Where it was nobody's before, nobody misses it.
        if owner is not None or stat.S_ISREG(heir.st_mode):
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
