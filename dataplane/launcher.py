"""The launcher: starts the nodes of one host, and its relay (`relay.py`), and puts a dead one back at once.

    python -m dataplane.launcher --config FILE [--nodes n0,n1]

It has imported torch and the node's modules and has run no operator, so a fork is a running node within
about 10 ms and shares its pages. (After a threaded operator a forked child hangs; the same goes for open
gRPC channels and UCX contexts: `preload` imports and does nothing else.) How nodes are watched, adopted and started
again, and the files of that, are in `controlplane/supervisor.py`; their ProcessFiles lie in RUN_DIR/nodes and, of the
relay, in RUN_DIR/relay.

Without --nodes it follows the group: the relay says which nodes are to run (`hosted.py`), as instances come and go.
With --nodes it runs these, but for those that the group says are to end, until it wants them again.

SIGTERM and SIGINT end the launcher and its nodes. After SIGHUP it leaves them running, for the next launcher to adopt.

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
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import structlog

from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.hosting import Wanted, all_nodes, number_of
from controlplane.contract.lifetime import raise_descriptor_limit
from controlplane.contract.logs import configure_logging
from controlplane.contract.topology import Mode
from controlplane.contract.version import code_version
from controlplane.supervisor import Begin, ProcessFile, Supervisor, run_command
from controlplane.unreadable import UNREADABLE
from dataplane.accelerators import Place, Places, count_devices
from dataplane.hosted import WantedFile
from dataplane.installed import Installed

TARGET = "dataplane.main:run_node"
RELAY = "relay"
RELAY_TARGET = "dataplane.relay:run_relay"
PAUSE_MAX_S = 10.0  # before the next start of what keeps dying, or has its name taken
STOP_GRACE_S = 3.0
FOLLOW_S = 0.2  # how often it looks at what the relay says
LOCK_WAIT_S = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

RunNode = Callable[..., None]  # settings and name, and a GPU's place where there is one


def preload(target: str, torch: bool = True, sealed: bool = False) -> RunNode:
    """Import what a node runs, so that forks need not. Must start no thread and compute nothing."""
    # numpy's OpenBLAS would start its threads at import; matrix products are torch's here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code_version()  # while the files are the ones that are imported here: forks register what they run
    if target == TARGET and torch:
        importlib.import_module("torch").set_num_threads(1)
        importlib.import_module("dataplane.executor")
        importlib.import_module("dataplane.numerics").kernel_sources()  # as well while the files are those
    if target == TARGET and sealed:
        importlib.import_module("dataplane.transport.sealing")
    module, _, name = target.partition(":")
    function: RunNode = getattr(importlib.import_module(module), name)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, every page that the forks share
    return function


class Launcher:
    """Supervises the nodes of one host until SIGTERM, SIGINT or SIGHUP. Single-threaded, because it forks."""

    def __init__(
        self,
        config: ClusterConfig,
        config_path: Path,
        nodes: Sequence[str],
        target: str,
        follows: bool = True,
    ) -> None:
        """`follows`: whether the group says which nodes run; else `nodes` do, and none besides."""
        self._config = config
        self._config_path = config_path.absolute()
        self._target = target
        self._run_dir = Path(config.run_dir)
        self._given = tuple(nodes)
        self._nodes = list(nodes)
        self._follows = follows
        self._file = WantedFile(self._run_dir)
        self._wanted = Wanted((), ())
        self._uncertified: set[str] = set()  # nodes that cannot start yet
        # Nodes that SIGKILL has not ended yet, in a call of a driver say: each has its name and its GPU until it does.
        self._ending: set[str] = set()
        self._log = structlog.get_logger()
        self._cold = config.mode is Mode.STOP_RESTART
        self._run_node: RunNode | None = None
        self._run_relay: RunNode | None = None
        self._places: Places | None = None  # on CPUs there is nothing to place
        self._installed = Installed(self._config_path, config)
        self._children = Supervisor(
            self._run_dir,
            self._log,
            pause_first_s=config.timing.restart_backoff_s,
            pause_max_s=PAUSE_MAX_S,
            orphans=os.getpid() == 1,
        )

    def run(self) -> None:
        """Start or adopt every node and keep them running; returns when all have been stopped, or left (SIGHUP)."""
        for folder in ("nodes", RELAY, "hold", "logs"):
            (self._run_dir / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._only_one():
            self._children.catch(SIGNALS)
            if self._config.engine.device == "cuda":
                self._places = Places(self._run_dir, count_devices())
            if self._target == TARGET:
                self._children.add(RELAY, RELAY, self._begin_relay)
            self._follow(add=False)
            self._recall_places()
            for node in self._nodes:
                self._add(node)
            if not self._cold:
                if self._target == TARGET:
                    self._run_relay = preload(RELAY_TARGET)
                self._run_node = preload(
                    self._target, self._config.engine.executor == "torch", self._config.tls.enabled
                )
                if (threads := len(os.listdir("/proc/self/task"))) > 1:
                    self._log.warning(
                        "threads run before the first fork: forked nodes may hang", threads=threads
                    )
            self._end_left_over()  # not earlier: the others are started, as well, while these end
            if self._target == TARGET:
                # One that is adopted may run other code or settings: a fresh one takes its place, and nobody notices.
                self._children.send(RELAY, signal.SIGTERM)
            self._log.info("launcher is up", nodes=self._nodes, pid=os.getpid(), cold=self._cold)
            while not self._children.signals:
                self._children.turn(FOLLOW_S)
                self._follow()
            if set(self._children.signals) == {signal.SIGHUP}:
                self._log.info("leaving the nodes to the next launcher")
                return
            self._end()

    def _add(self, node: str) -> None:
        reload_s = self._config.timing.reload_s if self._cold else 0.0
        self._children.add(node, "nodes", partial(self._begin, node), reload_s)

    def _follow(self, add: bool = True) -> None:
        """Start the nodes that the group has come to want, and end those that have nothing to do any more. `add`: not
        only in the list."""
        try:
            news = self._file.news()
        except (OSError, *UNREADABLE) as error:
            self._log.error("what the relay says of the nodes to run is not readable", error=str(error))
            return
        ended = self._bury()
        if news is not None:
            self._wanted = news
        elif not self._uncertified and not ended:
            return
        self._stop([node for node in self._nodes if node in self._wanted.stop], add)
        if self._follows:
            self._stop([node for node in self._nodes if node not in self._wanted.run], add)
        wanted = self._wanted.run if self._follows else self._given
        left_out = {*self._nodes, *self._ending, *self._wanted.stop}
        fresh = [node for node in wanted if node not in left_out and self._certified(node)]
        self._nodes += fresh
        for node in fresh if add else ():
            self._log.info("the group has come to want a node", node=node)
            self._add(node)

    def _end_left_over(self) -> None:
        """Nodes that the launcher before had started, and that nobody wants any more."""
        files = (self._run_dir / "nodes").glob("*.json")
        left = [
            path.stem
            for path in files
            if path.stem not in self._nodes and (self._follows or path.stem in self._wanted.stop)
        ]
        for node in left:
            self._add(node)
        self._stop(left, True)

    def _stop(self, nodes: list[str], running: bool) -> None:
        self._nodes = [node for node in self._nodes if node not in nodes]
        if not nodes or not running:
            return
        self._log.info("nodes have nothing to do any more", nodes=nodes)
        try:
            self._children.end(nodes, STOP_GRACE_S)
        except KevlarFlowError as error:
            self._log.error("nodes cannot be ended", error=str(error))
        self._ending.update(nodes)
        self._bury()

    def _bury(self) -> set[str]:
        """Those of the ending that have ended: nothing of them stays."""
        ended = self._ending - self._children.pids().keys() if self._ending else set()
        for node in ended:
            self._children.remove(node)
            self._let_go(node)
        self._ending -= ended
        return ended

    def _certified(self, node: str) -> bool:
        """Whether there is a certificate for it: `kfadmin up` makes those of new nodes, elsewhere the operator does."""
        tls = self._config.tls
        if tls.enabled and not Path(tls.paths(f"node-{node}")[1]).exists():
            if node not in self._uncertified:
                self._uncertified.add(node)
                self._log.warning(
                    "a node waits for its certificate", node=node, file=tls.paths(f"node-{node}")[1]
                )
            return False
        self._uncertified.discard(node)
        return True

    def _recall_places(self) -> None:
        """GPUs of nodes that run, or come back, under this launcher as under the one before."""
        if self._places is None:
            return
        running = {path.stem for path in (self._run_dir / "nodes").glob("*.json") if is_running(path)}
        try:
            self._places.recall(self._nodes, running)
        except (OSError, ValueError) as error:
            self._log.error("which GPUs nodes have is not readable; all are placed anew", error=str(error))

    def _place(self, node: str) -> Place | None:
        """Its GPU. Who has none yet gets one with all others that wait: they share alike. Raises AllTaken."""
        if self._places is None:
            return None
        try:
            fresh = self._places.add(self._nodes)
        except OSError as error:
            self._log.error("the next launcher will not know which GPUs nodes have", error=str(error))
        else:
            if fresh:
                self._log.info("devices", **{name: place.device for name, place in fresh.items()})
        return self._places.of(node)

    def _let_go(self, node: str) -> None:
        if self._places is None:
            return
        try:
            self._places.remove(node)
        except OSError as error:  # to the next launcher it has its GPU until another one is written
            self._log.error("a node's GPU cannot be let go of", node=node, error=str(error))

    def _end(self) -> None:
        """Raises KevlarFlowError if a node cannot be ended."""
        self._log.info("stopping the nodes")
        try:
            self._children.end([*self._nodes, *self._ending], STOP_GRACE_S)
        finally:
            self._children.end([RELAY], STOP_GRACE_S)  # it has passed on that they leave
        self._log.info("all nodes have ended")

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

    def _begin(self, node: str, log: IO[bytes]) -> int:
        if self._cold:
            return self._cold_command(node)(log)
        self._renew()
        assert self._run_node is not None
        place = self._place(node)
        run = partial(self._run_node, self._config, node)
        return self._fork(node, run if place is None else partial(run, place=place), log)

    def _begin_relay(self, log: IO[bytes]) -> int:
        if self._cold:
            return run_command([sys.executable, "-m", "dataplane.relay", "--config", str(self._config_path)])(
                log
            )
        self._renew()
        assert self._run_relay is not None
        return self._fork(RELAY, partial(self._run_relay, self._config), log)

    def _renew(self) -> None:
        """A node runs the code and the settings that are installed when it is started: if they are not this process's
        any more, it becomes a fresh launcher first. The nodes that run stay its children, and are adopted. A cold
        process reads both itself."""
        try:
            changed = self._installed.changed()
        except ConfigError as error:
            self._log.error("the settings are not readable; nodes go on with the old ones", error=str(error))
            return
        if not changed:
            return
        self._log.info("a fresh launcher takes over", installed=changed)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it can handle them
        try:
            for number in self._children.signals:  # came since the turn began: pending ones survive the exec
                os.kill(os.getpid(), number)
            sys.stdout.flush()
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        finally:  # it could not be executed
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _fork(self, name: str, run: Callable[[], None], log: IO[bytes]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        # Held back until the child has its own handlers, so that no signal to it is taken for the launcher's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(name, run, log.fileno())
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _become(self, name: str, run: Callable[[], None], log_fd: int) -> None:
        """In the child: let go of all that is the launcher's, then run. Never returns."""
        status = 1
        try:
            os.setpgid(0, 0)
            self._children.left_by_fork()
            null = os.open(os.devnull, os.O_RDONLY)
            for source, to in ((null, 0), (log_fd, 1), (log_fd, 2)):
                os.dup2(source, to)
            os.close(null)
            os.close(self._lock.fileno())  # closed, not unlocked: the lock stays the launcher's
            structlog.reset_defaults()
            run()
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except KevlarFlowError as error:  # said in words: nothing of ours is broken
            structlog.get_logger().error(str(error), process=name)
        except BaseException:  # the process ends here: the log is the only place left to tell why
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):  # a full disk must not keep a dead node alive
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _cold_command(self, node: str) -> Begin:
        command = [sys.executable, "-m", "dataplane.main", "--config", str(self._config_path), "--node", node]
        if place := self._place(node):
            command += ["--device", place.device, "--device-share", str(place.share)]
        if self._target != TARGET:
            call = f"preload({self._target!r})(load_config(Path({str(self._config_path)!r})), {node!r})"
            code = f"from dataplane.launcher import Path, load_config, preload; {call}"
            command = [sys.executable, "-c", code]
        return run_command(command)


def is_running(file: Path) -> bool:
    """Whether the process of a ProcessFile runs; not if it is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=ProcessFile).alive
    except (OSError, *UNREADABLE):
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m dataplane.launcher`."""
    parser = argparse.ArgumentParser(
        prog="python -m dataplane.launcher", description="Run this host's nodes."
    )
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings (TOML or JSON)")
    parser.add_argument(
        "--nodes", default="", help="names, separated by commas; without: all that the group wants"
    )
    parser.add_argument("--target", default=TARGET, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    configure_logging("launcher")
    raise_descriptor_limit()
    try:
        config = load_config(options.config)
        given = [name for name in options.nodes.split(",") if name]
        if unknown := [name for name in given if number_of(name) < 0]:
            raise ConfigError(f"no such node: {', '.join(unknown)}; nodes are n0, n1 and so on")
        Launcher(config, options.config, given or all_nodes(config), options.target, not given).run()
    except KevlarFlowError as error:
        sys.exit(f"launcher: {error}")


if __name__ == "__main__":
    main()
