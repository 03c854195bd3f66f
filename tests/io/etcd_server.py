"""Real etcd members for tests: loopback, free ports, their data in the test's folder, nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.etcd.server import HOST, etcd_command, etcd_version, find_etcd_binary
from controlplane.kfadmin.rundir import free_port

START_LIMIT_S = 20.0
POLL_S = 0.02


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, and that the kernel gives to nobody who asks for any: a member that is killed
    finds its own free when it starts again."""
    taken: set[int] = set()
    return [free_port(HOST, taken) for _ in range(count)]


@dataclass
class EtcdMember:
    """One member. `kill` and `start` again keep its data; `pause` is SIGSTOP."""

    name: str
    client_port: int
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def endpoint(self) -> str:
        return f"{HOST}:{self.client_port}"

    def start(self) -> None:
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()  # also ends a stopped process
            self.process.wait(timeout=10)
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def healthy(self) -> bool:
        """Whether the member can read through its quorum."""
        connection = http.client.HTTPConnection(HOST, self.client_port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_healthy(self) -> None:
        """Raises AssertionError with the end of the member's log if it ends or is not healthy in time."""
        deadline = time.monotonic() + START_LIMIT_S
        while not self.healthy():
            assert self.process is not None
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"{self.name} {'ended' if ended else 'is not healthy'}:\n{tail}")
            time.sleep(POLL_S)


@contextlib.contextmanager
def etcd_cluster(
    folder: Path,
    count: int = 1,
    *,
    heartbeat_ms: int = 100,
    election_ms: int = 1000,
    flags: Sequence[str] = (),
) -> Iterator[list[EtcdMember]]:
    """`count` healthy members; killed at the end. `flags`: more of etcd's own."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = find_etcd_binary(os.environ)
    version = etcd_version(binary)
    ports = free_ports(2 * count)
    names = [f"e{index}" for index in range(count)]
    peers = dict(zip(names, ports[count:], strict=True))
    members = []
    for name, port in zip(names, ports, strict=False):
        data = folder / name
        command = etcd_command(
            binary,
            name,
            data,
            port,
            peers[name],
            members=peers,
            version=version,
            heartbeat_ms=heartbeat_ms,
            election_ms=election_ms,
        )
        members.append(EtcdMember(name, port, [*command, *flags], folder / f"{name}.log"))
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait_healthy()
        yield members
    finally:
        for member in members:
            member.kill()


@contextlib.contextmanager
def etcd_member(folder: Path, flags: Sequence[str] = ()) -> Iterator[EtcdMember]:
    """A cluster of one; its short election time only makes it start faster."""
    with etcd_cluster(folder, heartbeat_ms=30, election_ms=300, flags=flags) as (member,):
        yield member


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll in a synchronous test; AssertionError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(POLL_S)
