"""What the map compares: nodes of ours in real clusters, and the peers. All answer the same question the same way."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bench.cluster import running
from bench.contract import progress
from bench.frontdoor import FrontDoor
from bench.models import four_bits
from bench.peers.client import PEERS, Kind, PeerAbsent, PeerProcess
from bench.peers.protocol import Answer, Setup, peak_bytes
from controlplane.contract.config import EngineConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

OURS = {"node": 1, "pipeline4": 4, "node_int8": 1, "node_int4": 1}  # stages
# Of bfloat16 checkpoints, on CPUs. int4: the layers; what is not in four bits has eight there.
QUANTISED = ("node_int8", "node_int4")
BLOCK_SIZE = 16
CUDA_PEERS = ("transformers",)
PROBE_ROWS, PROBE_PROMPT, PROBE_TOKENS = 8, 32, 24


class System(Protocol):
    """One engine with the model loaded."""

    name: str
    load_s: float  # from the start of its processes until it has answered

    @property
    def peak_bytes(self) -> int: ...  # most resident memory so far, of all its engine processes

    def generate(self, prompts: list[list[int]], tokens: int) -> Answer: ...


class OurSystem:
    """One pipeline of a cluster that does nothing else."""

    def __init__(self, name: str, cluster: LocalCluster, load_s: float) -> None:
        self.name, self.cluster, self.load_s = name, cluster, load_s
        self.front = FrontDoor(cluster)
        self.generate = self.front.generate

    @property
    def peak_bytes(self) -> int:
        return sum(map(peak_bytes, self.cluster.node_pids().values()))

    def idle_cpu_share(self, seconds: float) -> float:
        """Share of one core that all processes of the cluster use while nothing is asked of it."""
        pids = list(self.cluster.pids().values())
        before = sum(map(_cpu_s, pids))
        time.sleep(seconds)
        return (sum(map(_cpu_s, pids)) - before) / seconds


@contextmanager
def started(
    setup: Setup,
    wanted: Callable[[str], bool],
    absent: dict[str, str],
    precisions: Mapping[str, str] | None = None,
    tried: dict[str, dict[str, float | str]] | None = None,
) -> Iterator[dict[str, System]]:
    """Every system that is wanted and can run, by name; the reasons of the others go into `absent`. Peers may choose
    among `precisions` (see fastest_peer; without it they have the setup's), ours has the setup's."""
    precisions, tried = precisions or {setup.dtype: setup.model}, {} if tried is None else tried
    kinds = [k for k in PEERS if wanted(k.name) and (setup.device == "cpu" or k.name in CUDA_PEERS)]
    systems: dict[str, System] = {}
    with ExitStack() as stack:
        for name, stages in OURS.items():
            if name in QUANTISED and (setup.device != "cpu" or setup.dtype != "bfloat16"):
                continue
            if wanted(name) and (setup.device == "cpu" or stages == 1):
                systems[name] = stack.enter_context(_ours(name, stages, setup))
        for kind in kinds:
            try:
                systems[kind.name] = stack.enter_context(fastest_peer(kind, setup, precisions, tried))
            except PeerAbsent as error:
                absent[kind.name] = str(error)
                progress(f"absent: {kind.name}: {error}")
        yield systems


@contextmanager
def _ours(name: str, stages: int, setup: Setup) -> Iterator[OurSystem]:
    blocks = setup.batch_max * -(-setup.context_max // BLOCK_SIZE) + 64
    engine = EngineConfig(
        block_size=BLOCK_SIZE,
        pool_blocks=2 * blocks,  # half of a pool is one pipeline's
        threads=setup.threads,
        device="cuda" if setup.device == "cuda" else "cpu",
        weights="int8" if name in QUANTISED else "model",
    )
    model = Path(setup.model)
    if name == "node_int4":
        model = four_bits(model)
    begun = time.monotonic()
    try:
        with running(
            Mode.NONE, instances=1, stages=stages, engine=engine, model=model, controllers=1
        ) as cluster:
            system = OurSystem(name, cluster, 0.0)
            system.generate([[3] * 16], 2)
            system.load_s = time.monotonic() - begun
            yield system
    except KevlarFlowError as error:
        raise RuntimeError(f"our own {name} could not be measured: {error}") from error


@contextmanager
def fastest_peer(
    kind: Kind, setup: Setup, precisions: Mapping[str, str], tried: dict[str, dict[str, float | str]]
) -> Iterator[PeerProcess]:
    """The peer in the precision in which it decodes fastest here, of those that it runs in at all. `precisions`: the
    same weights' checkpoint by dtype. What was found goes to `tried`: seconds of a probe, or why there are none.

    Raises PeerAbsent if it runs in none."""
    found = tried.setdefault(kind.name, {})
    setups = {dtype: replace(setup, dtype=dtype, model=model) for dtype, model in precisions.items()}
    if len(setups) > 1:
        for dtype, one in setups.items():
            try:
                with _peer(kind, one) as peer:
                    found[dtype] = probe_s(peer, one)
            except PeerAbsent as error:
                found[dtype] = str(error)
        seconds = {dtype: value for dtype, value in found.items() if isinstance(value, float)}
        if not seconds:
            raise PeerAbsent("; ".join(f"{dtype}: {reason}" for dtype, reason in found.items()))
        best = min(seconds, key=lambda dtype: seconds[dtype])
        progress(f"{kind.name}: {best} is the fastest: {found}")
        setups = {best: setups[best]}
    with _peer(kind, *setups.values()) as peer:
        yield peer


def probe_s(system: System, setup: Setup) -> float:
    """Seconds of some decode steps of a small batch, the better of two times."""
    rows = min(PROBE_ROWS, setup.batch_max)
    prompts = [[3 + row, *range(3, 3 + PROBE_PROMPT)] for row in range(rows)]
    seconds = []
    for _ in range(2):
        times = system.generate(prompts, PROBE_TOKENS).times
        seconds.append(max(row[-1] for row in times) - min(row[0] for row in times))
    return min(seconds)


@contextmanager
def _peer(kind: Kind, setup: Setup) -> Iterator[PeerProcess]:
    scratch = Path(tempfile.mkdtemp(prefix=f"kf-bench-{kind.name}-"))
    try:
        peer = PeerProcess.start(kind, replace(setup, scratch=str(scratch)))
        try:
            progress(f"{kind.name}: up after {peer.load_s:.1f} s")
            yield peer
        finally:
            peer.close()
    finally:
        shutil.rmtree(scratch)


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100
