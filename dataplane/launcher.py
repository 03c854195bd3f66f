"""The launcher: starts the nodes of one host and puts a dead one back at once.

    python -m dataplane.launcher --config FILE [--nodes n0,n1]

It has imported torch and the node's modules and has run no operator, so a fork is a running node within
about 10 ms and shares its pages. (After a threaded operator a forked child hangs; the same goes for open
gRPC channels and UCX contexts: `preload` imports and does nothing else.) Deaths are seen through pidfds.

Files in the run directory:
    nodes/NODE.json   {"pid", "started", "restarts", "start_ticks"}: who runs now. A launcher that was killed and
                      started again adopts the nodes it finds there, and they never notice.
                      So does one that got SIGHUP: it ends and leaves its nodes running; SIGTERM and SIGINT end them.
    hold/NODE         while this empty file exists the node is not (re)started
    logs/NODE.log     stdout and stderr of the node, appended; NODE.log.1 is what was there before it grew too large

In mode stop-restart (the baseline) nodes are started as cold processes instead of forks, and restarts wait
`timing.reload_s` first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec
import structlog

from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.lifetime import raise_descriptor_limit
from controlplane.contract.logs import LOG_LOOK_S, bound_logs, configure_logging
from controlplane.contract.topology import Mode
from controlplane.contract.version import code_version
from controlplane.etcd.errors import NameTaken
from controlplane.process import start_ticks
from dataplane.accelerators import Place, assign, count_devices
from dataplane.installed import Installed

TARGET = "dataplane.main:run_node"
BACKOFF_MAX_S = 10.0
QUICK_DEATH_S = 10.0  # a node that dies younger than this is one that "keeps dying"
QUICK_EXIT_S = 1.0  # a retired node served before it left; one that exits 0 faster than this is broken
HOLD_POLL_S = 0.05
STOP_GRACE_S = 3.0
LOCK_WAIT_S = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

RunNode = Callable[..., None]  # settings and name, and a GPU's place where there is one


class NodeFile(msgspec.Struct, frozen=True):
    """nodes/NODE.json. A pid may be used again by the kernel; with the start time it names one process."""

    pid: int
    started: float  # unix seconds
    restarts: int
    start_ticks: int  # field 22 of /proc/PID/stat


def restart_delay_s(quick_deaths: int, backoff_s: float) -> float:
    """Pause before the next start: none after a first death, then doubled while deaths come quickly."""
    return 0.0 if quick_deaths <= 1 else min(BACKOFF_MAX_S, backoff_s * 2.0 ** min(quick_deaths - 2, 30))


def parent_of(pid: int) -> int:
    """0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def preload(target: str, torch: bool = True) -> RunNode:
    """Import what a node runs, so that forks need not. Must start no thread and compute nothing."""
    # numpy's OpenBLAS would start its threads at import; matrix products are torch's here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code_version()  # while the files are the ones that are imported here: forks register what they run
    if target == TARGET and torch:
        importlib.import_module("torch").set_num_threads(1)
        importlib.import_module("dataplane.executor")
        importlib.import_module("dataplane.numerics").kernel_sources()  # as well while the files are those
    module, _, name = target.partition(":")
    function: RunNode = getattr(importlib.import_module(module), name)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, every page that the forks share
    return function


@dataclass(slots=True)
class Slot:
    """One node of this host: running when `fd` is open, else due at `due` (monotonic seconds)."""

    node: str
    due: float = 0.0
    pid: int = 0
    fd: int = -1  # pidfd
    child: bool = True  # false: adopted, so its exit status is somebody else's to read
    started: float = 0.0  # monotonic
    starts: int = 0
    quick_deaths: int = 0


class Launcher:
    """Supervises the nodes of one host until SIGTERM, SIGINT or SIGHUP. Single-threaded, because it forks."""

    def __init__(self, config: ClusterConfig, config_path: Path, nodes: Sequence[str], target: str) -> None:
        self._config = config
        self._config_path = config_path.absolute()
        self._target = target
        self._run_dir = Path(config.run_dir)
        self._slots = {node: Slot(node) for node in nodes}
        self._log = structlog.get_logger()
        self._selector = selectors.DefaultSelector()
        self._wake, self._wake_write = socket.socketpair()
        self._look_at = 0.0  # at the logs' sizes
        self._stopping = False
        self._leaving = False  # SIGHUP: the nodes run on, and the next launcher adopts them
        self._cold = config.mode is Mode.STOP_RESTART
        self._run_node: RunNode | None = None
        self._places: dict[str, Place] = {}
        self._installed = Installed(self._config_path, config)

    def run(self) -> None:
        """Start or adopt every node and keep them running; returns when all have been stopped, or left (SIGHUP)."""
        for folder in ("nodes", "hold", "logs"):
            (self._run_dir / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._only_one():
            self._catch_signals()
            if self._config.engine.device == "cuda":
                self._places = assign(list(self._slots), count_devices())
                self._log.info("devices", **{node: place.device for node, place in self._places.items()})
            for slot in self._slots.values():
                self._adopt(slot)
            if not self._cold:
                self._run_node = preload(self._target, torch=self._config.engine.executor == "torch")
                if (threads := len(os.listdir("/proc/self/task"))) > 1:
                    self._log.warning(
                        "threads run before the first fork: forked nodes may hang", threads=threads
                    )
            self._log.info("launcher is up", nodes=list(self._slots), pid=os.getpid(), cold=self._cold)
            while not (self._stopping or self._leaving):
                self._start_due()
                self._wait()
            if self._stopping:
                self._stop_all()
            else:
                self._log.info("leaving the nodes to the next launcher")

    # ---- waiting

    def _wait(self) -> None:
        idle = [slot.due for slot in self._slots.values() if slot.fd < 0]
        due = min(*idle, self._look_at) if idle else self._look_at
        self._handle(self._selector.select(max(0.0, due - time.monotonic())))
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOG_LOOK_S
            bound_logs(self._run_dir / "logs" / f"{node}.log" for node in self._slots)

    def _handle(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            if isinstance(key.data, Slot):
                self._died(key.data)
            else:
                self._wake.recv(64)

    def _catch_signals(self) -> None:
        def stop(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                self._leaving = True
            else:
                self._stopping = True

        self._wake.setblocking(False)
        self._wake_write.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, stop)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked if this is a renewed launcher

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """One launcher a run directory: two would start every node twice."""
        with (self._run_dir / "launcher.lock").open("w") as lock:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(f"another launcher runs in {self._run_dir}") from None
                    time.sleep(0.02)
            self._lock = lock
            yield

    # ---- starting

    def _adopt(self, slot: Slot) -> None:
        path = self._node_path(slot.node)
        try:
            file = msgspec.json.decode(path.read_bytes(), type=NodeFile)
            fd = os.pidfd_open(file.pid)
        except FileNotFoundError:
            return
        except ProcessLookupError:
            slot.starts = file.restarts + 1
            return
        except msgspec.MsgspecError as error:
            self._log.warning("a node file is not readable", file=str(path), error=str(error))
            return
        slot.starts = file.restarts + 1
        if start_ticks(file.pid) != file.start_ticks:  # compared after the pidfd has pinned the process
            os.close(fd)
            return
        age_s = max(0.0, time.time() - file.started)
        slot.pid, slot.fd, slot.started = file.pid, fd, time.monotonic() - age_s
        slot.child = parent_of(file.pid) == os.getpid()  # where this process was its launcher before, as well
        self._selector.register(fd, selectors.EVENT_READ, slot)
        self._log.info("adopted", node=slot.node, node_pid=file.pid)

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots.values():
            if slot.fd >= 0 or slot.due > now or self._stopping or self._leaving:
                continue
            if (self._run_dir / "hold" / slot.node).exists():
                slot.due = now + HOLD_POLL_S
                continue
            self._renew()
            self._start(slot)

    def _renew(self) -> None:
        """A node runs the code and the settings that are installed when it is started: if they are not this process's
        any more, it becomes a fresh launcher first. The nodes that run stay its children, and are adopted."""
        if self._cold:
            return  # a cold process reads both itself
        try:
            changed = self._installed.changed()
        except ConfigError as error:
            self._log.error("the settings are not readable; nodes go on with the old ones", error=str(error))
            return
        if not changed:
            return
        self._log.info("a fresh launcher takes over", installed=changed)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it can handle them
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _start(self, slot: Slot) -> None:
        before = time.monotonic()
        try:
            with (self._run_dir / "logs" / f"{slot.node}.log").open("ab", buffering=0) as log:
                pid = self._spawn_cold(slot.node, log) if self._cold else self._fork(slot.node, log)
        except OSError as error:  # no memory, no disk, too many processes: the other nodes go on
            slot.quick_deaths += 1
            slot.due = before + max(
                HOLD_POLL_S, restart_delay_s(slot.quick_deaths, self._config.timing.restart_backoff_s)
            )
            self._log.error("cannot start", node=slot.node, error=str(error))
            return
        slot.pid, slot.fd, slot.child = pid, os.pidfd_open(pid), True
        slot.started, slot.starts = time.monotonic(), slot.starts + 1
        self._selector.register(slot.fd, selectors.EVENT_READ, slot)
        self._record(slot)
        took_s = round(time.monotonic() - before, 4)
        self._log.info("started", node=slot.node, node_pid=pid, restarts=slot.starts - 1, took_s=took_s)

    def _record(self, slot: Slot) -> None:
        file = NodeFile(slot.pid, time.time(), slot.starts - 1, start_ticks(slot.pid) or 0)
        path = self._node_path(slot.node)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(file))
            fresh.replace(path)
        except OSError as error:  # the node can still serve, but a next launcher will not find it
            self._log.error("cannot write the node file", node=slot.node, error=str(error))

    def _fork(self, node: str, log: IO[bytes]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        # Held back until the child has its own handlers, so that no signal to it is taken for the launcher's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_node(node, log.fileno())
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _become_node(self, node: str, log_fd: int) -> None:
        """In the child: let go of all that is the launcher's, then be the node. Never returns."""
        status = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            null = os.open(os.devnull, os.O_RDONLY)
            for source, to in ((null, 0), (log_fd, 1), (log_fd, 2)):
                os.dup2(source, to)
            os.close(null)
            self._selector.close()
            for other in self._slots.values():
                if other.fd >= 0:
                    os.close(other.fd)
            self._wake.close()
            self._wake_write.close()
            os.close(self._lock.fileno())  # closed, not unlocked: the lock stays the launcher's
            structlog.reset_defaults()
            assert self._run_node is not None
            place = {"place": self._places[node]} if self._places else {}
            self._run_node(self._config, node, **place)
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except (KevlarFlowError, NameTaken) as error:  # said in words: nothing of ours is broken
            structlog.get_logger().error(str(error), node=node)
        except BaseException:  # the process ends here: the log is the only place left to tell why
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):  # a full disk must not keep a dead node alive
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _spawn_cold(self, node: str, log: IO[bytes]) -> int:
        command = [sys.executable, "-m", "dataplane.main", "--config", str(self._config_path), "--node", node]
        if place := self._places.get(node):
            command += ["--device", place.device, "--device-share", str(place.share)]
        if self._target != TARGET:
            call = f"preload({self._target!r})(load_config(Path({str(self._config_path)!r})), {node!r})"
            code = f"from dataplane.launcher import Path, load_config, preload; {call}"
            command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        process.returncode = 0  # reaped here through its pid; tells Popen that there is nothing to wait for
        return process.pid

    def _node_path(self, node: str) -> Path:
        return self._run_dir / "nodes" / f"{node}.json"

    # ---- ending

    def _died(self, slot: Slot) -> None:
        status = self._reap(slot)
        age_s = time.monotonic() - slot.started
        retired = status == 0 and age_s >= QUICK_EXIT_S
        slot.quick_deaths = 0 if retired or age_s >= QUICK_DEATH_S else slot.quick_deaths + 1
        delay_s = restart_delay_s(slot.quick_deaths, self._config.timing.restart_backoff_s)
        if self._cold:
            delay_s += self._config.timing.reload_s
        slot.due = time.monotonic() + delay_s
        self._log.info(
            "retired" if retired else "died",
            node=slot.node, node_pid=slot.pid, status=status, age_s=round(age_s, 3), restart_in_s=delay_s,
        )  # fmt: skip

    def _reap(self, slot: Slot) -> int | None:
        """Exit status as Python gives it (negative: the signal); None for an adopted process."""
        self._selector.unregister(slot.fd)
        os.close(slot.fd)
        slot.fd = -1
        return os.waitstatus_to_exitcode(os.waitpid(slot.pid, 0)[1]) if slot.child else None

    def _stop_all(self) -> None:
        self._log.info("stopping the nodes")
        signal.set_wakeup_fd(-1)
        for number, grace_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
            running = [slot for slot in self._slots.values() if slot.fd >= 0]
            for slot in running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(slot.fd, number)
            deadline = time.monotonic() + grace_s
            while any(slot.fd >= 0 for slot in running) and (left := deadline - time.monotonic()) > 0:
                for key, _ in self._selector.select(left):
                    if isinstance(key.data, Slot):
                        self._reap(key.data)
                    else:
                        self._wake.recv(64)
        survivors = [slot.node for slot in self._slots.values() if slot.fd >= 0]
        if survivors:  # only a process stuck in the kernel outlives SIGKILL
            raise KevlarFlowError(f"nodes did not die of SIGKILL: {', '.join(survivors)}")
        self._log.info("all nodes have ended")


def all_nodes(config: ClusterConfig) -> list[str]:
    """Every node's name: the instances' first, then `spares` blank ones for each stage."""
    return [f"n{number}" for number in range((config.instances + config.spares) * config.stages)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m dataplane.launcher`."""
    parser = argparse.ArgumentParser(
        prog="python -m dataplane.launcher", description="Run this host's nodes."
    )
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings (TOML or JSON)")
    parser.add_argument("--nodes", default="", help="names, separated by commas; all of them if not given")
    parser.add_argument("--target", default=TARGET, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    configure_logging("launcher")
    raise_descriptor_limit()
    try:
        config = load_config(options.config)
        known = all_nodes(config)
        nodes = [name for name in options.nodes.split(",") if name] or known
        if unknown := [name for name in nodes if name not in known]:
            raise ConfigError(f"no such node: {', '.join(unknown)}; this cluster has n0 to {known[-1]}")
        Launcher(config, options.config, nodes, options.target).run()
    except KevlarFlowError as error:
        sys.exit(f"launcher: {error}")


if __name__ == "__main__":
    main()
