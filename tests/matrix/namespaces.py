"""Hosts and their network: one network namespace a host, and one more for the router between them.

All faults of the network are the router's: it drops packets from one address to another (nftables), or hands them to
`proxy.Relay`, which keeps them for a while or loses them. Hosts notice nothing but silence, as behind a broken switch.
Nothing outside of these namespaces is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.matrix.proxy import Relay

PREFIX = "kfm"
ROUTER = "router"
CLONE_NEWNET = 0x40000000
END_LIMIT_S = 5.0
COMMAND_LIMIT_S = 20.0
HELD_MARK, HELD_TABLE = 1, 100

# Marked packets are routed into the relay's device; it gives them back there, and then they are not marked again.
RULES = f"""
table ip kf {{
  set cut {{ type ipv4_addr . ipv4_addr; }}
  set held {{ type ipv4_addr . ipv4_addr; }}
  counter dropped {{ }}
  chain arriving {{
    type filter hook prerouting priority mangle;
    iifname != "tun0" ip saddr . ip daddr @held meta mark set {HELD_MARK}
  }}
  chain forwarded {{
    type filter hook forward priority filter;
    ip saddr . ip daddr @cut counter name dropped drop
  }}
}}
"""

Way = tuple[str, str]  # from host, to host

_numbers = itertools.count(1)


class NotPermitted(Exception):
    """Namespaces cannot be made here; the text says why."""


class Network:
    """Use as a context manager: every process in its namespaces ends with it, and they are removed."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        self._prefix = f"{PREFIX}{os.getpid()}-{next(_numbers)}-"  # several live side by side in one process
        self._stack = contextlib.ExitStack()
        self._relay: Relay | None = None

    def __enter__(self) -> Network:
        remove_stale()
        self._stack.callback(remove, self._prefix)
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def namespace(self, host: str) -> str:
        return f"{self._prefix}{host}"

    def address(self, host: str) -> str:
        return f"10.77.{self.hosts.index(host) + 1}.2"

    def command(self, host: str) -> list[str]:
        """What to put in front of a command so that it runs on `host`, as the same process."""
        return ["ip", "netns", "exec", self.namespace(host)]

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and those that it starts meanwhile, have their sockets on `host`."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.namespace(host)}") as there:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def end(self, host: str) -> None:
        """Every process on `host` ends at once."""
        end_processes(self.namespace(host))

    # ---- faults

    def cut(self, ways: Iterable[Way]) -> None:
        """From now on packets on exactly these ways are dropped; none: all arrive."""
        self._fill("cut", ways)

    def hold(self, ways: Iterable[Way], *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """From now on packets on exactly these ways come `delay_s` late, and a share `loss` of them never."""
        assert self._relay is not None
        self._relay.delay_s, self._relay.loss = delay_s, loss
        self._fill("held", ways)

    def touched(self) -> int:
        """Packets that were dropped or held since the last call."""
        assert self._relay is not None
        dropped = _run([*self.command(ROUTER), "nft", "reset", "counter", "ip", "kf", "dropped"])
        count = int(dropped.partition("packets ")[2].split()[0])
        held, self._relay.passed, self._relay.lost = self._relay.passed + self._relay.lost, 0, 0
        return count + held

    def _fill(self, name: str, ways: Iterable[Way]) -> None:
        pairs = ", ".join(f"{self.address(a)} . {self.address(b)}" for a, b in ways)
        lines = f"flush set ip kf {name}\n"
        if pairs:
            lines += f"add element ip kf {name} {{ {pairs} }}\n"
        _run([*self.command(ROUTER), "nft", "-f", "-"], lines)  # all of it at once

    # ---- building

    def _build(self) -> None:
        names = [ROUTER, *self.hosts]
        _run(["ip", "-batch", "-"], "".join(f"netns add {self.namespace(name)}\n" for name in names))
        router = ["link set lo up"]
        for number, host in enumerate(self.hosts, 1):
            port, near = f"r-{host}", f"10.77.{number}.1"
            router += [
                f"link add {port} type veth peer name eth0 netns {self.namespace(host)}",
                f"addr add {near}/24 dev {port}",
                f"link set {port} up",
            ]
        self._ip(ROUTER, router)
        for number, host in enumerate(self.hosts, 1):
            self._ip(
                host,
                [
                    "link set lo up",
                    f"addr add 10.77.{number}.2/24 dev eth0",
                    "link set eth0 up",
                    f"route add default via 10.77.{number}.1",
                ],
            )
        with self.inside(ROUTER):
            self._relay = self._stack.enter_context(Relay("tun0"))
        self._ip(
            ROUTER,
            [
                "link set tun0 up",
                f"route add default dev tun0 table {HELD_TABLE}",
                f"rule add fwmark {HELD_MARK} lookup {HELD_TABLE}",
            ],
        )
        with self.inside(ROUTER):
            for setting, value in (("ip_forward", 1), ("conf/all/rp_filter", 0), ("conf/tun0/rp_filter", 0)):
                Path("/proc/sys/net/ipv4", setting).write_text(str(value))
        _run([*self.command(ROUTER), "nft", "-f", "-"], RULES)

    def _ip(self, host: str, lines: Sequence[str]) -> None:
        _run(["ip", "-n", self.namespace(host), "-batch", "-"], "\n".join(lines) + "\n")


def why_not() -> str:
    """Why this machine lets us have no such network; empty if it does."""
    if missing := [tool for tool in ("ip", "nft") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network(["probe"]) as network:
            network.hold([("probe", "probe")])
    except (NotPermitted, OSError) as error:
        return f"network namespaces are not permitted here: {error}"
    return ""


def remove_stale() -> None:
    """What a test run that was killed has left behind."""
    for name in _namespaces():
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            remove(name)


def remove(prefix: str) -> None:
    """End every process in the namespaces whose names begin so, and remove them."""
    for name in _namespaces():
        if name.startswith(prefix):
            end_processes(name)
            _run(["ip", "netns", "del", name])


def end_processes(namespace: str) -> None:
    deadline = time.monotonic() + END_LIMIT_S
    while pids := _run(["ip", "netns", "pids", namespace]).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes in {namespace} did not die of SIGKILL: {pids}")
        time.sleep(0.02)


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(PREFIX)) if folder.is_dir() else []


def _run(command: Sequence[str], given: str = "") -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT_S
    )
    if done.returncode != 0:
        raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _set_namespace(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
