"""The launcher with real forks. What it runs is a stand-in node, so that each test decides how a node ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import structlog

from controlplane.contract.config import ClusterConfig, EngineConfig, TimingConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.hosting import Wanted, all_nodes
from controlplane.contract.lifetime import run_to_exit
from controlplane.contract.logs import LOG_BYTES_MAX, bound_logs
from controlplane.contract.topology import Mode
from controlplane.etcd.errors import NameTaken
from controlplane.process import parent_of, start_ticks
from controlplane.supervisor import ProcessFile, Supervisor, run_command
from dataplane.accelerators import Place, Places
from dataplane.hosted import write_wanted
from dataplane.launcher import TARGET, Launcher

ROOT = Path(__file__).parents[2]


# ---- what the launcher runs in these tests


def serve(config: ClusterConfig, node: str) -> None:
    """Says that it runs, then lives until a signal ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    print(f"{node} serves", flush=True)
    signal.sigwait([signal.SIGUSR1])
    time.sleep(1.0)  # a retired node is one that served for a while
    Path(config.run_dir, f"{node}.left").touch()


def crash(_config: ClusterConfig, node: str) -> None:
    """Dies at once, as a node with a broken model would."""
    raise RuntimeError(f"{node} cannot start")


def name_taken(_config: ClusterConfig, node: str) -> None:
    """Finds that another process has its name."""

    async def serve() -> None:
        raise NameTaken(f"nodes/{node} is taken by another process (pid 7 on b)")

    run_to_exit(node, serve, name_taken=(NameTaken,))


def stubborn(_config: ClusterConfig, node: str) -> None:
    """Ignores SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"{node} serves", flush=True)
    while True:
        signal.pause()


def orphaning(config: ClusterConfig, node: str) -> None:
    """Leaves a process behind that its parent does not wait for, as a tool of a library may."""
    if os.fork() == 0:
        if os.fork() == 0:
            Path(config.run_dir, "orphan").touch()
            time.sleep(60)  # until it is killed
        os._exit(0)
    os.wait()
    serve(config, node)


def on_device(config: ClusterConfig, node: str, place: Place) -> None:
    """Says where it was put."""
    print(f"{place.device} {place.share} of {place.devices}", flush=True)
    serve(config, node)


def talk(config: ClusterConfig, node: str) -> None:
    """Says more than anybody wants to read, and goes on."""
    for _ in range(40):
        print("x" * (1 << 20), flush=True)
    serve(config, node)


def compute(config: ClusterConfig, node: str) -> None:
    """Uses an operator with several threads, which hangs in a fork whose parent has used one."""
    import torch

    torch.set_num_threads(2)
    total = (torch.ones(512, 512) @ torch.ones(512, 512)).sum().item()
    Path(config.run_dir, f"{node}.total").write_text(str(total))
    serve(config, node)


# ---- driving it


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.002)


class Host:
    """One launcher in its run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        target: str = "serve",
        nodes: int = 1,
        mode: Mode = Mode.REPLICATE,
        cwd: Path = ROOT,
        python_path: str = "",
        device: Literal["cpu", "cuda"] = "cpu",
        prefix: Sequence[str] = (),
        only: str = "",
    ) -> None:
        timing = TimingConfig(restart_backoff_s=0.1, reload_s=0.3)
        engine = EngineConfig(device=device)
        config = ClusterConfig(
            str(self.run_dir),
            "no-model",
            (),
            instances=1,
            stages=nodes,
            mode=mode,
            timing=timing,
            engine=engine,
        )
        path = self.run_dir / "cluster.json"
        path.write_bytes(msgspec.json.encode(config))
        command = [*prefix, sys.executable, "-m", "dataplane.launcher", "--config", str(path)]
        command += ["--nodes", only] if only else []
        command += ["--target", target if ":" in target else f"tests.io.test_launcher:{target}"]
        with (self.run_dir / "launcher.log").open("ab") as log:
            env = {**os.environ, **({"PYTHONPATH": python_path} if python_path else {})}
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stderr=log, process_group=0)

    def file(self, node: str = "n0") -> ProcessFile | None:
        try:
            return msgspec.json.decode(
                (self.run_dir / "nodes" / f"{node}.json").read_bytes(), type=ProcessFile
            )
        except FileNotFoundError:
            return None

    def running(self, node: str = "n0") -> int:
        """The node's pid, or 0 while it is not running."""
        file = self.file(node)
        return file.pid if file and start_ticks(file.pid) == file.start_ticks else 0

    def output(self, node: str = "n0") -> str:
        path = self.run_dir / "logs" / f"{node}.log"
        return path.read_text() if path.exists() else ""

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run_dir / "launcher.log").read_text().splitlines()]

    def wait_serving(self, times: int, node: str = "n0") -> int:
        wait_for(lambda: self.output(node).count("serves") >= times, f"{node} has started {times} times")
        wait_for(lambda: self.running(node), f"{node} is running")
        return self.running(node)

    def stop(self) -> float:
        """SIGTERM, and how long it took to end."""
        assert self.process is not None
        before = time.monotonic()
        self.process.terminate()
        assert self.process.wait(12) == 0
        return time.monotonic() - before

    def clean(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(5)
        for path in self.run_dir.glob("nodes/*.json"):
            if pid := self.running(path.stem):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.clean()


# ---- the tests


def test_a_killed_node_is_back_within_300_ms(host: Host) -> None:
    names = ("n0", "n1", "n2")
    host.start(nodes=len(names))
    pids = {name: host.wait_serving(1, name) for name in names}
    took_s = []
    for name in names:
        before, killed = time.monotonic(), pids[name]
        os.kill(killed, signal.SIGKILL)
        pids[name] = host.wait_serving(2, name)
        took_s.append(time.monotonic() - before)
        assert pids[name] != killed
        assert {other: host.running(other) for other in names} == pids
        file = host.file(name)
        assert file is not None
        assert file.restarts == 1
    assert sorted(took_s)[1] < 0.3, took_s
    assert [host.output(name).count("serves") for name in names] == [2, 2, 2]
    assert host.stop() < 2.5  # SIGTERM reaches the nodes: a fork does not keep the launcher's handlers


def test_torch_computes_in_a_fork(host: Host) -> None:
    host.start("compute")
    host.wait_serving(1)
    assert float((host.run_dir / "n0.total").read_text()) == 512.0**3
    os.kill(host.running(), signal.SIGKILL)
    host.wait_serving(2)
    host.stop()


def test_a_node_that_keeps_dying_is_started_ever_more_rarely(host: Host) -> None:
    host.start("crash")
    wait_for(lambda: host.output().count("n0 cannot start") >= 5, "five starts")
    host.stop()
    delays = [line["restart_in_s"] for line in host.log() if line["event"] == "died"]
    assert delays[0] == 0.0
    for delay_s, longest_s in zip(delays[1:4], (0.1, 0.2, 0.4), strict=True):
        assert longest_s / 2 <= delay_s <= longest_s
    death = next(line for line in host.log() if line["event"] == "died")
    assert (death["status"], death["said"]) == (1, "RuntimeError: n0 cannot start")
    file = host.file()
    assert file is not None
    assert (file.ended, file.said, file.taken) == (1, "RuntimeError: n0 cannot start", False)


def test_a_node_whose_name_is_taken_is_tried_ever_more_rarely_and_the_holder_is_told(host: Host) -> None:
    host.start("name_taken")

    def ended_four_times() -> bool:  # said is not ended yet: the stop would end it otherwise
        file = host.file()
        return file is not None and file.restarts >= 3 and file.start_ticks == 0

    wait_for(ended_four_times, "four ends")
    host.stop()
    deaths = [line for line in host.log() if line["event"] == "died"]
    for death, longest_s in zip(deaths[:3], (0.1, 0.2, 0.4), strict=True):  # also after the first
        assert longest_s / 2 <= death["restart_in_s"] <= longest_s
        assert death["said"] == "n0: nodes/n0 is taken by another process (pid 7 on b)"
    file = host.file()
    assert file is not None
    assert file.taken
    assert "pid 7 on b" in file.said


def test_a_retired_node_is_started_afresh_at_once(host: Host) -> None:
    host.start()
    pid = host.wait_serving(1)
    os.kill(pid, signal.SIGUSR1)
    assert host.wait_serving(2) != pid
    assert (host.run_dir / "n0.left").exists()
    host.stop()
    assert [line["restart_in_s"] for line in host.log() if line["event"] == "retired"] == [0.0]


def test_a_held_node_stays_away_until_it_is_released(host: Host) -> None:
    host.start(nodes=2)
    pid = host.wait_serving(1)
    hold = host.run_dir / "hold" / "n0"
    hold.touch()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: any(line["event"] == "died" for line in host.log()), "the death was seen")
    # The launcher goes on with other work meanwhile: the neighbour's restart shows that it had its chance.
    os.kill(host.wait_serving(1, "n1"), signal.SIGKILL)
    host.wait_serving(2, "n1")
    assert not host.running()
    hold.unlink()
    host.wait_serving(2)
    host.stop()


def test_a_new_launcher_adopts_the_nodes_of_a_killed_one(host: Host) -> None:
    host.start(nodes=2)
    pids = [host.wait_serving(1, "n0"), host.wait_serving(1, "n1")]
    assert host.process is not None
    host.process.kill()
    host.process.wait(5)
    os.kill(pids[1], signal.SIGKILL)  # dies while nobody watches
    host.start(nodes=2)
    host.wait_serving(2, "n1")
    assert host.running("n0") == pids[0]
    assert host.output("n0").count("serves") == 1
    os.kill(pids[0], signal.SIGKILL)  # an adopted node is watched, too
    assert host.wait_serving(2, "n0") != pids[0]
    file = host.file("n0")
    assert file is not None
    assert file.restarts == 1
    host.stop()
    assert not host.running("n0")
    assert not host.running("n1")


def test_a_pid_that_now_belongs_to_another_process_is_not_adopted(host: Host) -> None:
    (host.run_dir / "nodes").mkdir()
    other = os.getpid()
    file = ProcessFile(other, time.time(), 3, (start_ticks(other) or 0) - 1)
    (host.run_dir / "nodes" / "n0.json").write_bytes(msgspec.json.encode(file))
    host.start()
    host.wait_serving(1)
    assert host.running() not in (0, other)
    host.stop()


def test_a_launcher_that_hangs_up_leaves_its_nodes_to_the_next_one(host: Host) -> None:
    host.start(nodes=2)
    pids = host.wait_serving(1), host.wait_serving(1, "n1")
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    assert host.process.wait(12) == 0
    assert (host.running(), host.running("n1")) == pids
    host.start(nodes=2)
    wait_for(lambda: sum(line["event"] == "adopted" for line in host.log()) == 2, "both are adopted")
    assert (host.running(), host.running("n1")) == pids
    os.kill(pids[0], signal.SIGKILL)
    assert host.wait_serving(2) != pids[0]
    host.stop()
    assert not host.running("n1")


def test_sigterm_leaves_nothing(host: Host) -> None:
    host.start("stubborn", nodes=2)
    pids = [host.wait_serving(1, "n0"), host.wait_serving(1, "n1")]
    os.kill(pids[1], signal.SIGSTOP)
    assert 2.5 < host.stop() < 5.0  # they ignore SIGTERM: 3 s of grace, then SIGKILL
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_process_1_of_a_container_it_reaps_what_others_leave_behind(host: Host) -> None:
    host.start("orphaning", prefix=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))
    assert host.process is not None
    wait_for(lambda: (host.run_dir / "orphan").exists(), "there is an orphan")
    (launcher,) = children(host.process.pid)
    wait_for(lambda: len(children(launcher)) == 2, "it belongs to the launcher, like the node")
    node = next(pid for pid in children(launcher) if os.getpgid(pid) == pid)
    (orphan,) = set(children(launcher)) - {node}
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: children(launcher) == [node], "it is reaped")
    os.kill(launcher, signal.SIGTERM)
    assert host.process.wait(12) == 0


def children(pid: int) -> list[int]:
    """Zombies included, as this machine's /proc has them."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(int(p.name)) == pid]


def test_only_one_launcher_runs_in_a_directory(host: Host, tmp_path: Path) -> None:
    host.start()
    host.wait_serving(1)
    command = [sys.executable, "-m", "dataplane.launcher", "--config", str(tmp_path / "cluster.json")]
    second = subprocess.run(
        [*command, "--target", "tests.io.test_launcher:serve"],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert b"another launcher runs" in second.stderr
    assert host.output().count("serves") == 1
    host.stop()


def test_logs_are_bounded(host: Host) -> None:
    host.start("talk")
    log = host.run_dir / "logs" / "n0.log"
    wait_for(lambda: host.running() and log.with_name("n0.log.1").exists(), "the log was cut")
    wait_for(lambda: log.stat().st_size <= LOG_BYTES_MAX, "and is small")
    assert b"n0 serves" in log.with_name("n0.log.1").read_bytes() + log.read_bytes(), "its writer went on"
    host.stop()


def test_a_log_that_is_cut_goes_on_where_it_is_read(tmp_path: Path) -> None:
    log = tmp_path / "n0.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"1" * 100)
        bound_logs([log, tmp_path / "missing.log"], 100)
        assert log.stat().st_size == 100
        writer.write(b"2")
        bound_logs([log], 100)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    assert (tmp_path / "n0.log.1").read_bytes() == b"1" * 100 + b"2"


def test_stop_restart_starts_cold_processes_after_the_reload_time(host: Host) -> None:
    host.start(mode=Mode.STOP_RESTART)
    pid = host.wait_serving(1)
    assert b"preload" in Path(f"/proc/{pid}/cmdline").read_bytes()  # its own program, not a fork
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    host.wait_serving(2)
    assert time.monotonic() - before > 0.3
    host.stop()


def test_stop_restart_puts_the_relay_back_without_that_pause(host: Host) -> None:
    host.start("dataplane.main:run_node", mode=Mode.STOP_RESTART)

    def of_the_relay(event: str) -> list[dict[str, object]]:
        return [line for line in host.log() if line["event"] == event and line["child"] == "relay"]

    wait_for(lambda: of_the_relay("started"), "the relay is started")
    pid = of_the_relay("started")[0]["child_pid"]
    assert isinstance(pid, int)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: of_the_relay("died"), "its death was seen")
    host.stop()
    assert of_the_relay("died")[0]["restart_in_s"] == 0.0


STAND_IN = """
import json, signal
from pathlib import Path
from controlplane.contract.version import code_version, settings_digest
def serve(config, node, take_over=""):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    said = {"version": code_version(), "settings": settings_digest(config)}
    Path(config.run_dir, f"{node}.runs").write_text(json.dumps(said))
    print(f"{node} serves", flush=True)
    signal.sigwait([signal.SIGUSR1])
"""


def test_a_node_runs_what_is_installed_when_it_is_started(host: Host, tmp_path: Path) -> None:
    """Code or settings are changed under a running launcher: it renews itself, and its other nodes do not notice."""
    code = tmp_path / "code"
    for package in ("controlplane", "dataplane", "kernels", "web", "migrations"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("demo"))
    (code / "stand_in.py").write_text(STAND_IN)
    host.start(nodes=2, target="stand_in:serve", cwd=code, python_path=str(code))
    assert host.process is not None

    def runs(node: str) -> dict[str, str]:
        return json.loads((host.run_dir / f"{node}.runs").read_text())

    pids = host.wait_serving(1), host.wait_serving(1, "n1")
    first = runs("n0")
    assert runs("n1") == first
    with (code / "dataplane" / "devices.py").open("a") as file:
        file.write("# another version\n")
    os.kill(pids[0], signal.SIGKILL)
    host.wait_serving(2)
    assert runs("n0")["version"] != first["version"]
    assert runs("n0")["settings"] == first["settings"]
    assert host.running("n1") == pids[1]
    assert host.process.poll() is None, "the same process, for whoever supervises it"

    path = host.run_dir / "cluster.json"
    path.write_text(path.read_text().replace('"cluster":"kevlarflow"', '"cluster":"renamed"'))
    os.kill(pids[1], signal.SIGKILL)  # adopted by its own parent, which reaps it
    host.wait_serving(2, "n1")
    assert not Path(f"/proc/{pids[1]}").exists()
    assert runs("n1")["settings"] != first["settings"]
    assert [line["event"] for line in host.log()].count("a fresh launcher takes over") == 2

    path.write_text("{nonsense")
    os.kill(host.running(), signal.SIGKILL)
    host.wait_serving(3)
    assert runs("n0") == runs("n1"), "settings that cannot be read keep no node down"
    assert host.stop() < 4.0


def test_unknown_nodes_are_refused(host: Host, tmp_path: Path) -> None:
    host.start()
    host.wait_serving(1)
    host.stop()
    command = [
        sys.executable,
        "-m",
        "dataplane.launcher",
        "--config",
        str(tmp_path / "cluster.json"),
        "--nodes",
        "m7",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert result.returncode == 1
    assert b"no such node: m7" in result.stderr


def test_nodes_come_and_go_as_the_group_wants(host: Host) -> None:
    host.start(nodes=2)
    first = host.wait_serving(1), host.wait_serving(1, "n1")
    write_wanted(host.run_dir, Wanted(("n0", "n1", "n2"), ()))
    host.wait_serving(1, "n2")
    write_wanted(host.run_dir, Wanted(("n0", "n2"), ("n1",)))
    wait_for(lambda: host.file("n1") is None, "n1 is gone, and nothing is said of it")
    assert not Path(f"/proc/{first[1]}").exists()
    # The next launcher goes by what was said last.
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    assert host.process.wait(5) == 0
    host.start(nodes=2)
    wait_for(lambda: any(line["event"] == "launcher is up" for line in host.log()[-4:]), "it is up")
    assert host.running() == first[0]
    assert host.file("n1") is None
    assert host.running("n2")
    write_wanted(host.run_dir, Wanted(("n0", "n1", "n2"), ()))
    host.wait_serving(2, "n1")
    assert host.stop() < 4.0


def test_spares_come_after_the_instances() -> None:
    assert all_nodes(ClusterConfig("r", "m", (), instances=1, stages=2, spares=1)) == ["n0", "n1", "n2", "n3"]


def fake_torch(folder: Path, devices: int) -> str:
    """A path to import from, where torch sees so many GPUs."""
    fake = folder / "fake" / "torch.py"
    fake.parent.mkdir()
    fake.write_text(f"class cuda:\n    device_count = staticmethod(lambda: {devices})\n")
    return str(fake.parent)


@pytest.mark.parametrize("devices", [0, 2])
def test_each_node_has_a_gpu_of_its_own_or_a_share_of_one(host: Host, tmp_path: Path, devices: int) -> None:
    host.start("on_device", nodes=3, python_path=fake_torch(tmp_path, devices), device="cuda")
    assert host.process is not None
    if not devices:
        assert host.process.wait(15) != 0
        assert "torch sees no CUDA device on this host" in (host.run_dir / "launcher.log").read_text()
        return
    for node in ("n0", "n1", "n2"):
        host.wait_serving(1, node)
    places = [host.output(node).splitlines()[0] for node in ("n0", "n1", "n2")]
    assert places == ["cuda:0 0.5 of 2", "cuda:1 1.0 of 2", "cuda:0 0.5 of 2"]


@pytest.mark.parametrize("mode", [Mode.REPLICATE, Mode.STOP_RESTART])
def test_a_node_that_comes_back_has_the_gpu_that_is_free(host: Host, tmp_path: Path, mode: Mode) -> None:
    """Whoever came and went meanwhile, and under the next launcher. Where all are taken that is said."""
    target = "on_device" if mode is Mode.REPLICATE else "serve"
    python_path = fake_torch(tmp_path, 3)

    def places() -> dict[str, str]:
        found = json.loads((tmp_path / "nodes-placed.json").read_bytes())
        return {node: place["device"] for node, place in found.items()}

    def start() -> None:
        host.start(target, nodes=3, mode=mode, python_path=python_path, device="cuda")

    start()
    pids = [host.wait_serving(1, node) for node in ("n0", "n1", "n2")]
    write_wanted(host.run_dir, Wanted(("n0", "n2"), ("n1",)))
    wait_for(lambda: host.file("n1") is None, "n1 is gone")
    write_wanted(host.run_dir, Wanted(("n0", "n1", "n2"), ()))
    back = host.wait_serving(2, "n1")
    assert places() == {"n0": "cuda:0", "n2": "cuda:2", "n1": "cuda:1"}

    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    assert host.process.wait(5) == 0
    os.kill(pids[2], signal.SIGKILL)
    write_wanted(host.run_dir, Wanted(("n0", "n2", "n3"), ("n1",)))  # nobody has ended n1 yet
    start()
    host.wait_serving(2, "n2")
    wait_for(lambda: host.file("n1") is None, "n1 is gone")
    assert start_ticks(back) is None
    host.wait_serving(1, "n3")
    assert places() == {"n0": "cuda:0", "n2": "cuda:2", "n3": "cuda:1"}
    assert host.running() == pids[0]

    write_wanted(host.run_dir, Wanted(("n0", "n2", "n3", "n4"), ()))

    def said() -> str:
        file = host.file("n4")
        return file.said if file else ""

    wait_for(said, "n4 cannot be started")
    assert "nothing of its 3 GPUs" in said()
    write_wanted(host.run_dir, Wanted(("n2", "n3", "n4"), ("n0",)))
    host.wait_serving(1, "n4")
    assert places() == {"n2": "cuda:2", "n3": "cuda:1", "n4": "cuda:0"}
    if target == "on_device":
        assert host.output("n4").splitlines()[0] == "cuda:0 1.0 of 3"
    assert host.stop() < 4.0


def test_a_node_of_the_list_that_is_to_end_does_so_under_the_next_launcher(host: Host) -> None:
    """It dropped out of the list and ran on, with nobody to watch it."""
    host.start(nodes=3, only="n0,n1")
    host.wait_serving(1)
    left = host.wait_serving(1, "n1")
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    assert host.process.wait(5) == 0
    write_wanted(host.run_dir, Wanted(("n0", "n2"), ("n1",)))
    host.start(nodes=3, only="n0,n1")
    wait_for(lambda: host.file("n1") is None, "n1 is gone")
    assert start_ticks(left) is None
    assert host.running()
    assert host.file("n2") is None, "another host's"
    host.stop()


def test_a_node_of_the_list_comes_back_when_the_group_wants_it_again(host: Host) -> None:
    """It stayed away until somebody started the launcher; what said so may be old when that happens."""
    host.start(nodes=3, only="n0,n1")
    pid, first = host.wait_serving(1), host.wait_serving(1, "n1")
    write_wanted(host.run_dir, Wanted(("n0", "n2"), ("n1",)))
    wait_for(lambda: host.file("n1") is None, "n1 is gone")
    write_wanted(host.run_dir, Wanted(("n0", "n1", "n2"), ()))
    assert host.wait_serving(2, "n1") != first
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    assert host.process.wait(5) == 0

    write_wanted(host.run_dir, Wanted(("n0", "n2"), ("n1",)))
    host.start(nodes=3, only="n0,n1")
    wait_for(lambda: host.file("n1") is None, "n1 is gone, for all that the launcher knows")
    write_wanted(host.run_dir, Wanted(("n0", "n1", "n2"), ()))
    host.wait_serving(3, "n1")
    assert host.running() == pid
    assert host.file("n2") is None, "another host's"
    host.stop()


def test_nodes_start_while_those_end_that_nobody_wants_any_more(host: Host) -> None:
    """One that takes its time to end kept the launcher from starting the others: it had not imported what they run."""
    host.start("stubborn", nodes=2)
    pids = host.wait_serving(1), host.wait_serving(1, "n1")
    assert host.process is not None
    host.process.kill()
    host.process.wait(5)
    os.kill(pids[0], signal.SIGKILL)
    write_wanted(host.run_dir, Wanted(("n0",), ("n1",)))
    host.start("stubborn", nodes=2)
    host.wait_serving(2)
    wait_for(lambda: host.file("n1") is None, "n1 is gone")
    assert host.process.poll() is None
    host.process.kill()


class Unkillable(Supervisor):
    """SIGKILL ends nobody while `stuck`, as where a node is in a call of a driver that does not return."""

    stuck = True

    def end(self, names: Iterable[str], grace_s: float) -> None:
        if self.stuck:
            for child in map(self._children.__getitem__, names):
                child.leaving, child.due = True, None
            raise KevlarFlowError(f"did not die of SIGKILL: {', '.join(names)}")
        super().end(names, grace_s)


def test_a_node_that_sigkill_does_not_end_keeps_its_name_and_its_gpu_until_it_has_ended(
    tmp_path: Path,
) -> None:
    """Its GPU stayed taken for good; and one that was wanted again was watched twice, and ended the launcher."""
    for folder in ("nodes", "logs"):
        (tmp_path / folder).mkdir()
    config = ClusterConfig(str(tmp_path), "no-model", (), instances=1, stages=2)
    launcher = Launcher(config, tmp_path / "cluster.json", ["n0", "n1"], TARGET)
    children = Unkillable(tmp_path, structlog.get_logger(), pause_first_s=0.1, pause_max_s=1.0)
    launcher._children = children
    launcher._begin = lambda node, log: run_command(["sleep", "60"])(log)  # type: ignore[method-assign]
    launcher._places = Places(tmp_path, 2)
    for node in ("n0", "n1"):
        launcher._add(node)
        launcher._place(node)
    children.turn(0.0)
    first = children.pids()
    try:
        write_wanted(tmp_path, Wanted(("n0",), ("n1",)))
        launcher._follow()
        assert launcher._places.of("n1").device == "cuda:1", "it still computes there"
        write_wanted(tmp_path, Wanted(("n0", "n1"), ()))
        for _ in range(3):
            launcher._follow()
            children.turn(0.0)
        assert children.pids() == first, "its name is taken"
        os.kill(first["n1"], signal.SIGKILL)

        def again() -> bool:
            children.turn(0.01)
            launcher._follow()
            return children.pids().get("n1", first["n1"]) != first["n1"]

        wait_for(again, "a fresh n1")
        assert children.pids()["n0"] == first["n0"]
        write_wanted(tmp_path, Wanted(("n0",), ("n1", "n3")))
        children.stuck = False
        launcher._follow()
        assert children.pids() == {"n0": first["n0"]}
        assert launcher._places.add(["n0", "n2"])["n2"].device == "cuda:1"
    finally:
        children.stuck = False
        children.end(list(children.pids()), 1.0)
        children.close()
