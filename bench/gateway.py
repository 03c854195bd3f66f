"""What the gateway costs: CPU of its process for a streamed token, tokens/s through one of them, what it adds to TTFT.

A real kf-gateway with a real etcd; `gateway_node.py` in place of a scheduler, and clients that only read bytes. Every
token is an event of its own, as `tokens_per_write` shows, but for clients that come late to read theirs. `paced`: steps
of 20 ms; `full`: as fast as the gateway takes them.

The figures are of a gateway as a secure cluster has it: HTTPS, mutual TLS to the node and to etcd, and an API key of
the key store, hashed and with limits. In turns with it, under `baseline`, one that speaks plain HTTP and has one key in
the clear; `ratios.tls` is the tokens/s of the first against the second. Streams come on connections of their own,
handshake included. First tokens are timed on a connection that is kept, and `ttft_added_fresh_p50_s` on a new one for
each. `added` is all that passes: the client, its connection, the gateway, gRPC and the node's process, whose model
takes no time. `ttft_direct_p50_s` is what a client waits that speaks gRPC with the node itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.contract import Result, percentile, progress
from bench.gateway_node import NODE, PIPELINE
from bench.gateway_probe import at_the_node, in_turn
from bench.kevlarflow_load import Client, Outcome, Request
from controlplane.contract.api_keys import KeyLimits, changing, make_key
from controlplane.contract.auth import create_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import NodeRecord
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from controlplane.etcd.server import etcd_command, find_etcd_binary
from controlplane.keyspace.connect import etcd_client
from controlplane.kfadmin.rundir import free_port
from controlplane.kfadmin.secure import certify, etcd_healthy, etcd_tls
from dataplane.demo import model_dir

PLAIN_KEY = "sk-bench"
# Each is counted, and none is reached.
LIMITS = KeyLimits(
    requests_per_minute=1 << 30,
    tokens_per_minute=1 << 40,
    streams=1 << 20,
    memory_bytes=1 << 40,
    priority_floor=0,
)
ETCD, ADMIN = ProcessName(ProcessRole.ETCD, "etcd0"), ProcessName(ProcessRole.ADMIN, "bench")
CERTIFIED = (ETCD, ADMIN, ProcessName(ProcessRole.NODE, NODE), ProcessName(ProcessRole.GATEWAY, "g1"))
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


QUICK = Load(streams=64, rounds=5, waves=2, probes=100)
FULL = Load(streams=200, rounds=9, waves=3, probes=300)


@dataclass(frozen=True, slots=True)
class Gateway:
    url: str
    pid: int
    key: str
    tls: ssl.SSLContext | None
    config: ClusterConfig
    node_address: str

    def client(self) -> Client:
        return Client(self.url, self.key, model_dir().name, self.tls)

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
def running(secure: bool) -> Iterator[Gateway]:
    """etcd, node and gateway; until the gateway is ready. Raises NotServed."""
    with tempfile.TemporaryDirectory(prefix="kf-bench-") as run_dir, contextlib.ExitStack() as stack:
        folder, taken = Path(run_dir), set[int]()
        ports = [free_port("127.0.0.1", taken) for _ in range(3)]
        endpoint = f"127.0.0.1:{ports[0]}"
        config = ClusterConfig(
            run_dir=run_dir, model=str(model_dir()), etcd=(endpoint,), gateway_port=ports[2]
        )
        if secure:
            tls = certify(folder / "certs", config, CERTIFIED)
            config = msgspec.structs.replace(config, tls=msgspec.structs.replace(tls, https_cert=tls.cert))
        settings = folder / "cluster.json"
        settings.write_bytes(encode(config))
        create_secret(config.secret_file)
        key = _make_key(config, secure)
        member = etcd_tls(config, ETCD)
        etcd = etcd_command(
            find_etcd_binary(os.environ), ETCD.name, folder / "etcd", ports[0], ports[1], tls=member
        )
        stack.enter_context(started(etcd, folder, "etcd"))
        command = [sys.executable, "-m", "bench.gateway_node", str(settings), str(EPOCH)]
        node = stack.enter_context(started(command, folder, "node"))
        assert node.stdout is not None
        address = node.stdout.readline().strip()
        _until(lambda: etcd_healthy(endpoint, member), "etcd answers")
        asyncio.run(_publish(config, address))
        command = [sys.executable, "-m", "web.gateway.main", "--config", str(settings)]
        gateway = stack.enter_context(started(command, folder, "gateway"))
        url = f"{'https' if secure else 'http'}://127.0.0.1:{ports[2]}"
        context = ssl.create_default_context(cafile=config.tls.ca) if secure else None
        _until(lambda: _answers(f"{url}/readyz", context), "the gateway is ready")
        yield Gateway(url, gateway.pid, key, context, config, address)


def _make_key(config: ClusterConfig, secure: bool) -> str:
    """An API key: of the key store, or one in the clear."""
    if not secure:
        config.api_keys_file.write_text(f"{PLAIN_KEY}\n")
        return PLAIN_KEY
    text, record = make_key("bench", "", int(time.time()), 0, LIMITS)
    with changing(config.keys_file) as keys:
        keys.append(record)
    return text


async def _publish(config: ClusterConfig, node_address: str) -> None:
    """What a leader and a node would have written."""
    keys, member = Keys.of(config), Member(NODE, "i0")
    identity = Identity.of(config, ADMIN.role, ADMIN.name)
    record = NodeRecord(
        member=member, group=config.group, stage=0, num_stages=1, link_address="127.0.0.1:1", pid=1,
        rpc_address=node_address, weights_digest="none", pool_blocks=1, block_size=16,
    )  # fmt: skip
    pipelines = (Pipeline(PIPELINE, EPOCH, (Stage((NODE,), (member,)),)),)
    async with asyncio.timeout(START_LIMIT_S), etcd_client(config, identity) as etcd:
        await etcd.put(keys.node(NODE), encode(record))
        topology = Topology(config.group, EPOCH, Mode.REPLICATE, pipelines)
        await etcd.put(keys.topology(config.group), encode(topology))


def _answers(url: str, tls: ssl.SSLContext | None) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0, context=tls) as answer:
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
    client = gateway.client()
    cpu_s, began = gateway.cpu_s(), time.monotonic()
    for _ in range(load.waves):
        requests = [Request(0.0, PROMPT, TOKENS, step_us) for _ in range(load.streams)]
        _checked(await asyncio.gather(*(client.run(request, time.monotonic()) for request in requests)))
    seconds, tokens = time.monotonic() - began, load.waves * load.streams * TOKENS
    return Sample(tokens / seconds, (gateway.cpu_s() - cpu_s) / tokens * 1e6, tokens / client.pieces)


async def first_tokens(gateway: Gateway, load: Load, *, fresh: bool) -> float:
    """Seconds from sending a request to its first token, which the node sends at once; one after the other, p50.

    `fresh`: each on a connection of its own, from before it is made."""
    client, request = gateway.client(), Request(0.0, PROMPT, 1, 0)
    if fresh:
        outcomes = [await client.run(request, time.monotonic()) for _ in range(load.probes)]
    else:
        outcomes = await in_turn(client, [request] * load.probes)
    return percentile([outcome.ttft_s for outcome in _checked(outcomes)], 0.5)


def measure(gateway: Gateway, load: Load, found: dict[str, list[float]], name: str) -> None:
    """One round: its figures are added to `found`."""
    for fresh, what in ((False, "ttft_added_p50_s"), (True, "ttft_added_fresh_p50_s")):
        found.setdefault(what, []).append(asyncio.run(first_tokens(gateway, load, fresh=fresh)))
    direct = asyncio.run(at_the_node(gateway.config, gateway.node_address, PROMPT, load.probes))
    found.setdefault("ttft_direct_p50_s", []).append(percentile(direct, 0.5))
    for pace, step_us in (("full", 0), ("paced", STEP_US)):
        sample = asyncio.run(streams(gateway, load, step_us))
        found.setdefault(f"cpu_us_per_token_{pace}", []).append(sample.cpu_us)
        found.setdefault(f"tokens_per_write_{pace}", []).append(sample.per_write)
        if pace == "full":
            found.setdefault("tokens_per_s", []).append(sample.tokens_per_s)
        progress(
            f"  {name:<7}{pace:<6}{sample.tokens_per_s:8.0f} tokens/s{sample.cpu_us:7.1f} us of CPU a token,"
            f" {sample.per_write:.2f} tokens a write; first token {found['ttft_added_p50_s'][-1] * 1e3:.2f} ms"
        )


def run(*, quick: bool) -> Result:
    load = QUICK if quick else FULL
    result = Result(
        "gateway", settings={"streams": load.streams, "tokens": TOKENS, "step_us": STEP_US, "quick": quick}
    )
    found: dict[str, dict[str, list[float]]] = {"secure": {}, "plain": {}}
    with running(secure=True) as secure, running(secure=False) as plain:
        gateways = {"secure": secure, "plain": plain}
        for gateway in gateways.values():
            asyncio.run(streams(gateway, Load(load.streams, 1, 1, 1), 0))  # warms up
        for number in range(load.rounds):
            progress(f"round {number + 1}/{load.rounds}")
            # The order changes from round to round, so that a drift of the machine favours nobody.
            for name in sorted(gateways, reverse=number % 2 == 0):
                measure(gateways[name], load, found[name], name)
    for into, name in (("metrics", "secure"), ("baseline", "plain")):
        for figure, values in found[name].items():
            result.measure(figure, values, into)
    pairs = zip(found["secure"]["tokens_per_s"], found["plain"]["tokens_per_s"], strict=True)
    ratios = [with_tls / without for with_tls, without in pairs]
    result.ratios["tls"] = statistics.median(ratios)
    result.spread["ratios.tls"] = (min(ratios), max(ratios))
    return result
