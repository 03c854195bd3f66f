"""The run directory of a local cluster: what is where, who owns it, and which of its processes live.

admin/NAME.sock   the admin API of a controller, for kfadmin on this host
lock              held by the `kfadmin up` that owns the directory; holds its pid
cluster.json      settings that every process of the cluster reads
endpoints.json    where gateways and controllers listen
host.json         of a host of several: what runs on it (`kfadmin host join`)
secret            the cluster's secret (0600)
api-keys          keys that the gateway accepts, one a line (0600)
keys.json         keys with names and limits, as hashes (0600): `kfadmin keys`
pids/NAME.json    processes that `kfadmin up` started itself
nodes/NODE.json   nodes, written by the launcher, and relay/relay.json
hold/NAME         while this file exists NAME is not started again
logs/NAME.log     one file a process
etcd/             data of the etcd members; history.db: events
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import secrets
import shlex
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from controlplane.contract.address import bound, join
from controlplane.contract.auth import create_secret, derive, load_secret
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError
from controlplane.contract.files import is_blank, opened_folder, replace_file
from controlplane.supervisor import ProcessFile
from controlplane.unreadable import UNREADABLE

TAIL_BYTES = 16 * 1024
HOST_RUN_DIR = Path("/var/lib/kevlarflow")  # of a host that joined a cluster
FOLDERS = ("pids", "nodes", "hold", "logs", "etcd")  # every run directory has them, from its first start on
LOST_FOUND = "lost+found"  # of a file system's root: a volume may be mounted here
# What may be there before the folders are: of a start that was cut short, or brought by the operator.
BEFOREHAND = frozenset({"lock", "secret", "api-keys", "keys.json", "keys.json.lock", "oidc.toml", "certs"})
STRANGERS_SHOWN = 3
PID_MAX = 1 << 22  # Linux's own bound
LOCK_BYTES = 32  # more than any pid has
PORTS = range(20_000, 32_000)  # below Linux's range for outgoing connections, which take any port there


class RunDirBusy(ConfigError):
    """Another `kfadmin up` runs in this directory."""


class RunDirUnusable(ConfigError):
    """What the operating system says against this directory."""


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """Tells in words what keeps us from using a run directory. Raises RunDirUnusable."""
    try:
        yield
    except OSError as error:
        what = "" if error.filename is None or str(error.filename) == str(path) else f" ({error.filename})"
        raise RunDirUnusable(
            f"cannot use the run directory {path}{what}: {error.strerror or error}; give another one with --run-dir"
        ) from error


class Endpoints(msgspec.Struct, frozen=True):
    """HTTP addresses, without a path: "http://127.0.0.1:8000"."""

    gateways: tuple[str, ...]
    admin: tuple[str, ...]
    # Unix sockets of the admin APIs; empty: the run directory's path is too long.
    sockets: tuple[str, ...] = ()
    ca: str = ""  # file with the authorities of their certificates, beside those of the system


def admin_endpoints(known: Endpoints) -> list[str]:
    """For an AdminClient on the same host: the sockets, as nobody else can listen there."""
    return [f"unix:{path}" for path in known.sockets] or list(known.admin)


def create_api_key(path: Path) -> None:
    """Write a file with a new API key, mode 0600, unless there is one. An empty file is none, but beside keys with
    limits: there it may be empty on purpose."""
    meant = path.exists() and path.with_name("keys.json").exists()
    if is_blank(path) and not meant:
        replace_file(path, f"kf-{secrets.token_hex(24)}\n".encode())


def home() -> Path:
    """The user's; the one of hosts for a user without, as a container's may be that is but a number."""
    try:
        return Path.home()
    except RuntimeError:
        return HOST_RUN_DIR


def default_run_dir(cluster: str = "kevlarflow") -> Path:
    """$KF_RUN_DIR; else, on a host of several, the one that it joined in; else the user's state directory."""
    if given := os.environ.get("KF_RUN_DIR"):
        return Path(given)
    if os.path.exists(HOST_RUN_DIR / "host.json"):  # False where it belongs to somebody else
        return HOST_RUN_DIR
    state = os.environ.get("XDG_STATE_HOME") or home() / ".local" / "state"
    return Path(state) / "kevlarflow" / cluster


def free_port(host: str, taken: set[int]) -> int:
    """A port that nobody listens on now; it is added to `taken`. Raises ConfigError after many tries."""
    for _ in range(200):
        port = random.choice(PORTS)
        if port not in taken and port_is_free(host, port):
            taken.add(port)
            return port
    raise ConfigError(f"no free port between {PORTS.start} and {PORTS.stop} on {host}")


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there; not: somebody does. Raises ConfigError if it is something else."""
    try:
        bound(host, port).close()
    except socket.gaierror as error:
        raise ConfigError(f"host = {host!r}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"host = {host!r} is not an address of this machine") from error
        raise ConfigError(f"cannot listen on {join(host, port)}: {error.strerror or error}") from error
    return True


def check_name(path: Path) -> None:
    """Raises RunDirUnusable for a path that settings cannot name."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise RunDirUnusable(
            f"the run directory {str(path)!r} is not UTF-8: give another --run-dir"
        ) from error
    if "{process}" in str(path):  # as `TlsConfig.paths` reads it
        raise RunDirUnusable(
            f"the run directory {path}: {{process}} in a path stands for another name in each process; give another"
            " --run-dir"
        )


class _Settings(msgspec.Struct):
    """What tells our settings from other files of the name; those of any release have it."""

    run_dir: str
    model: str


def _is_settings(path: Path) -> bool:
    try:
        msgspec.json.decode(path.read_bytes(), type=_Settings)
    except (OSError, *UNREADABLE):
        return False
    return True


def _is_blank_folder(path: Path) -> bool:
    """Whether it is one of ours, or a mount point's, with nothing in it: a volume may be mounted in its place. A file
    that has the name of one is in the way of a start, which says so."""
    if path.name == LOST_FOUND:
        return True
    ours = path.name in (*FOLDERS, "weights", "gguf", "digests", "relay", "admin")
    return ours and not (path.is_dir() and any(entry.name != LOST_FOUND for entry in path.iterdir()))


def _pid_in(lock: IO[bytes]) -> int | None:
    """0: it is empty, as that of one that is about to begin; None: what it has is no pid."""
    lock.seek(0)
    text = lock.read(LOCK_BYTES).strip()
    if not text:
        return 0
    return int(text) if text.isdigit() and 0 < int(text) <= PID_MAX else None


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths and small files of one run directory."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "cluster.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def claim(self) -> None:
        """Make the directory, or find that it may be used. Raises RunDirUnusable before anything in it is changed, and
        OSError."""
        check_name(self.path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # `mkdir` says the latter
            if strangers := self._strangers():
                shown = ", ".join(strangers[:STRANGERS_SHOWN]) + ", ..." * (len(strangers) > STRANGERS_SHOWN)
                raise RunDirUnusable(
                    f"{self.path} is no run directory, and it is not empty ({shown!r}): its rights would be changed"
                    " and files in it deleted; give another --run-dir, which need not exist"
                )
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _strangers(self) -> list[str]:
        """What is in the directory and not ours; nothing in one that an earlier start has made, whatever else somebody
        has put there."""
        if all((self.path / folder).is_dir() for folder in FOLDERS) or _is_settings(self.config_file):
            return []
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if not (entry.name in BEFOREHAND or entry.name.endswith(".new") or _is_blank_folder(entry))
        )

    def make_folders(self) -> None:
        """The directory (0700), its folders, and nothing of an earlier run that keeps a process from starting."""
        self.claim()
        self.path.chmod(0o700)
        for folder in FOLDERS:
            (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        with opened_folder(self.path / "hold") as hold:
            for old in os.listdir(f"/proc/self/fd/{hold}"):
                os.unlink(old, dir_fd=hold)

    def prepare(self) -> None:
        """Make the directory (0700) and everything in it that has to be there before a process starts."""
        self.make_folders()
        create_secret(self.path / "secret")
        create_api_key(self.path / "api-keys")

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the directory for this process. Raises RunDirBusy when another one has it, RunDirUnusable, OSError."""
        self.claim()
        with (self.path / "lock").open("ab+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _pid_in(lock) or "?"
                raise RunDirBusy(
                    f"a cluster already runs in {self.path} (kfadmin up, pid {pid}); stop it with "
                    f"`kfadmin down --run-dir {shlex.quote(str(self.path))}` or give another --run-dir"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())
            lock.flush()
            try:
                yield
            finally:
                lock.truncate(0)

    def owner(self) -> int:
        """Pid of the `kfadmin up` that holds the directory; 0 when nobody does. Raises RunDirBusy when it is not known
        who does."""
        try:
            with (self.path / "lock").open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    if (pid := _pid_in(lock)) is None:
                        raise RunDirBusy(
                            f"somebody holds {self.path / 'lock'}, and it has no pid of a `kfadmin up`: `fuser` says"
                            " who it is"
                        ) from None
                    return pid
        except (FileNotFoundError, NotADirectoryError):
            pass
        return 0

    def config(self) -> ClusterConfig:
        return load_config(self.config_file)

    def admin_token(self) -> str:
        return derive(load_secret(self.path / "secret"), "admin")

    def api_key(self) -> str:
        """The first API key. Raises ConfigError when there is none."""
        try:
            return (self.path / "api-keys").read_text().split()[0]
        except (OSError, IndexError) as error:
            raise ConfigError(f"no API key in {self.path / 'api-keys'}") from error

    def endpoints(self) -> Endpoints:
        path = self.path / "endpoints.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Endpoints)
        except (OSError, *UNREADABLE) as error:
            raise ConfigError(f"no cluster was started in {self.path} ({error})") from error

    def write(self, name: str, value: msgspec.Struct) -> None:
        """Replace one JSON file of the directory at once."""
        replace_file(self.path / name, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")

    def processes(self, folder: str) -> dict[str, ProcessFile]:
        """Files of `folder` ("pids", "nodes" or "relay") by process name, dead ones included. What a power failure has
        left of one is passed over: its process has not outlived that."""
        found = {}
        for path in sorted((self.path / folder).glob("*.json")):
            # Replaced between the listing and the read, or not whole.
            with contextlib.suppress(FileNotFoundError, *UNREADABLE):
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=ProcessFile)
        return found

    def tail(self, name: str, lines: int = 20) -> str:
        """The end of a log, for people."""
        path = self.log(name)
        try:
            with path.open("rb") as log:
                log.seek(max(0, path.stat().st_size - TAIL_BYTES))
                return b"\n".join(log.read().splitlines()[-lines:]).decode(errors="replace")
        except FileNotFoundError:
            return f"(there is no {path})"

    def end_leftovers(
        self, limit_s: float = 5.0, folders: Sequence[str] = ("pids", "nodes", "relay")
    ) -> list[str]:
        """End processes that a killed `kfadmin up` has left behind; their names.

        Launcher first, because it would start the nodes again. Raises ConfigError if one cannot be ended.
        """
        ended = []
        for folder in folders:
            left = {name: file for name, file in self.processes(folder).items() if file.alive}
            ended += sorted(left)
            for number, share in ((signal.SIGTERM, 0.7), (signal.SIGKILL, 0.3)):
                deadline = time.monotonic() + share * limit_s
                for file in left.values():
                    with contextlib.suppress(ProcessLookupError):  # it ended by itself
                        os.kill(file.pid, number)
                while any(file.alive for file in left.values()) and time.monotonic() < deadline:
                    time.sleep(0.02)
                left = {name: file for name, file in left.items() if file.alive}
            if left:
                raise ConfigError(f"cannot end {', '.join(left)} of an earlier run in {self.path}")
        return ended
