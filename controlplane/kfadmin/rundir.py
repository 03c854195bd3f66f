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

import msgspec

from controlplane.contract.address import bound
from controlplane.contract.auth import create_secret, derive, load_secret
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError
from controlplane.supervisor import ProcessFile

TAIL_BYTES = 16 * 1024
HOST_RUN_DIR = Path("/var/lib/kevlarflow")  # of a host that joined a cluster
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
    sockets: tuple[
        str, ...
    ] = ()  # Unix sockets of the admin APIs; empty: the run directory's path is too long
    ca: str = ""  # file with the authorities of their certificates, beside those of the system


def admin_endpoints(known: Endpoints) -> list[str]:
    """For an AdminClient on the same host: the sockets, as nobody else can listen there."""
    return [f"unix:{path}" for path in known.sockets] or list(known.admin)


def create_api_key(path: Path) -> None:
    """Write a file with a new API key, mode 0600, unless there is one."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(f"kf-{secrets.token_hex(24)}\n")


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
    """Whether a server could listen there. Raises ConfigError if nothing could, whatever the port."""
    try:
        bound(host, port).close()
    except socket.gaierror as error:
        raise ConfigError(f"host = {host!r}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"host = {host!r} is not an address of this machine") from error
        return False
    return True


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths and small files of one run directory."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "cluster.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def prepare(self) -> None:
        """Make the directory (0700) and everything in it that has to be there before a process starts."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for folder in ("pids", "nodes", "hold", "logs", "etcd"):
            (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        for old in (self.path / "hold").iterdir():
            old.unlink()
        create_secret(self.path / "secret")
        create_api_key(self.path / "api-keys")

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the directory for this process. Raises RunDirBusy when another one has it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                pid = lock.read().strip() or "?"
                raise RunDirBusy(
                    f"a cluster already runs in {self.path} (kfadmin up, pid {pid}); stop it with "
                    f"`kfadmin down --run-dir {shlex.quote(str(self.path))}` or give another --run-dir"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            try:
                yield
            finally:
                lock.truncate(0)

    def owner(self) -> int:
        """Pid of the `kfadmin up` that holds the directory; 0 when nobody does."""
        try:
            with (self.path / "lock").open("r") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read().strip() or "0")
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
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"no cluster was started in {self.path} ({error})") from error

    def write(self, name: str, value: msgspec.Struct) -> None:
        """Replace one JSON file of the directory at once."""
        path = self.path / name
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        fresh.replace(path)

    def processes(self, folder: str) -> dict[str, ProcessFile]:
        """Files of `folder` ("pids", "nodes" or "relay") by process name, dead ones included."""
        found = {}
        for path in sorted((self.path / folder).glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # replaced between the listing and the read
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
