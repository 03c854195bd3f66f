"""What the gateway costs: CPU of its process for a streamed token, tokens/s through one of them, what it adds to TTFT.

A real kf-gateway with a real etcd; `gateway_node.py` in place of a scheduler, and clients that only read bytes. Every
token is an event of its own, as `tokens_per_write` shows, but for clients that come late to read theirs. `paced`:
steps of 20 ms; `full`: as fast as the gateway takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.contract import Result, percentile, progress
from bench.gateway_node import PIPELINE
from bench.kevlarflow_load import Client, Outcome, Request
from controlplane.contract.auth import create_secret, derive
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import NodeRecord
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.server import etcd_command, find_etcd_binary
from controlplane.kfadmin.rundir import free_port
from dataplane.demo import model_dir

API_KEY = "sk-bench"
EPOCH = 1
TOKENS = 200  # of a stream
PROMPT = tuple(range(300, 400))
STEP_US = 20_000  # paced
START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class NotServed(KevlarFlowError):
    """The gateway did not start, or a stream was not what it should be."""


@dataclass(frozen=True, slots=True)
class Load:
    streams: int
    rounds: int
    waves: int  # of all streams, in one measurement
    probes: int


QUICK = Load(streams=64, rounds=5, waves=3, probes=100)
FULL = Load(streams=200, rounds=9, waves=3, probes=300)


@dataclass(frozen=True, slots=True)
class Gateway:
    url: str
    pid: int

    def cpu_s(self) -> float:
        """Of all its threads, until now."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S


@dataclass(frozen=True, slots=True)
class Sample:
    tokens_per_s: float
    cpu_us: float  # a token
    per_write: float  # tokens


@contextlib.contextmanager
def started(command: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if name == "node" else log,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_LIMIT_S)


@contextlib.contextmanager
def running() -> Iterator[Gateway]:
    """etcd, node and gateway; until the gateway is ready. Raises NotServed."""
    with tempfile.TemporaryDirectory(prefix="kf-bench-") as run_dir, contextlib.ExitStack() as stack:
        folder, taken = Path(run_dir), set[int]()
        ports = [free_port("127.0.0.1", taken) for _ in range(3)]
        config = ClusterConfig(
            run_dir=run_dir, model=str(model_dir()), etcd=(f"127.0.0.1:{ports[0]}",), gateway_port=ports[2]
        )
        (folder / "cluster.json").write_bytes(encode(config))
        config.api_keys_file.write_text(f"{API_KEY}\n")
        token = derive(create_secret(config.secret_file), "grpc")
        etcd = etcd_command(find_etcd_binary(os.environ), "etcd0", folder / "etcd", ports[0], ports[1])
        stack.enter_context(started(etcd, folder, "etcd"))
        command = [sys.executable, "-m", "bench.gateway_node", token, str(EPOCH)]
        node = stack.enter_context(started(command, folder, "node"))
        assert node.stdout is not None
        address = node.stdout.readline().strip()
        _until(lambda: _answers(f"http://127.0.0.1:{ports[0]}/health"), "etcd answers")
        asyncio.run(_publish(config, address))
        command = [sys.executable, "-m", "web.gateway.main", "--config", str(folder / "cluster.json")]
        gateway = stack.enter_context(started(command, folder, "gateway"))
        url = f"http://127.0.0.1:{ports[2]}"
        _until(lambda: _answers(f"{url}/readyz"), "the gateway is ready")
        yield Gateway(url, gateway.pid)


async def _publish(config: ClusterConfig, node_address: str) -> None:
    """What a leader and a node would have written."""
    keys, member = Keys.of(config), Member("n0", "i0")
    record = NodeRecord(
        member=member, group=config.group, stage=0, num_stages=1, link_address="127.0.0.1:1", pid=1,
        rpc_address=node_address, weights_digest="none", pool_blocks=1, block_size=16,
    )  # fmt: skip
    pipelines = (Pipeline(PIPELINE, EPOCH, (Stage(("n0",), (member,)),)),)
    async with asyncio.timeout(START_LIMIT_S), EtcdClient(config.etcd) as etcd:
        await etcd.put(keys.node("n0"), encode(record))
        topology = Topology(config.group, EPOCH, Mode.REPLICATE, pipelines)
        await etcd.put(keys.topology(config.group), encode(topology))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise NotServed(f"not within {START_LIMIT_S:g} s: {what}")
        time.sleep(0.05)


def _checked(outcomes: list[Outcome]) -> list[Outcome]:
    for outcome in outcomes:
        if outcome.error or len(outcome.tokens) != outcome.request.max_tokens:
            raise NotServed(outcome.error or f"{len(outcome.tokens)} tokens")
    return outcomes


async def streams(gateway: Gateway, load: Load, step_us: int) -> Sample:
    """`load.waves` times all streams at once."""
    client = Client(gateway.url, API_KEY, model_dir().name)
    cpu_s, began = gateway.cpu_s(), time.monotonic()
    for _ in range(load.waves):
        requests = [Request(0.0, PROMPT, TOKENS, step_us) for _ in range(load.streams)]
        _checked(await asyncio.gather(*(client.run(request, time.monotonic()) for request in requests)))
    seconds, tokens = time.monotonic() - began, load.waves * load.streams * TOKENS
    return Sample(tokens / seconds, (gateway.cpu_s() - cpu_s) / tokens * 1e6, tokens / client.pieces)


async def first_tokens(gateway: Gateway, load: Load) -> list[float]:
    """Seconds from sending a request to its first token, which the node sends at once; one after the other."""
    client = Client(gateway.url, API_KEY, model_dir().name)
    request = Request(0.0, PROMPT, 1, 0)
    outcomes = [await client.run(request, time.monotonic()) for _ in range(load.probes)]
    return [outcome.ttft_s for outcome in _checked(outcomes)]


def run(*, quick: bool) -> Result:
    load = QUICK if quick else FULL
    result = Result(
        "gateway", settings={"streams": load.streams, "tokens": TOKENS, "step_us": STEP_US, "quick": quick}
    )
    found: dict[str, list[Sample]] = {"paced": [], "full": []}
    added: list[float] = []
    with running() as gateway:
        asyncio.run(streams(gateway, Load(load.streams, 1, 1, 1), 0))  # warms up
        for number in range(load.rounds):
            added.append(percentile(asyncio.run(first_tokens(gateway, load)), 0.5))
            for name, step_us in (("paced", STEP_US), ("full", 0)):
                sample = asyncio.run(streams(gateway, load, step_us))
                found[name].append(sample)
                progress(
                    f"round {number + 1}/{load.rounds}: {name:<6}{sample.tokens_per_s:8.0f} tokens/s"
                    f"{sample.cpu_us:7.1f} us of CPU a token, {sample.per_write:.2f} tokens a write"
                )
    result.measure("tokens_per_s", [s.tokens_per_s for s in found["full"]])
    result.measure("ttft_added_p50_s", added)
    for name, samples in found.items():
        result.measure(f"cpu_us_per_token_{name}", [s.cpu_us for s in samples])
        result.measure(f"tokens_per_write_{name}", [s.per_write for s in samples])
    return result
