"""Kill a node that holds gigabytes of KV, and see whether the pause grows with them.

A real pipeline of two stages on a CPU, and a spare of each stage that holds its copies. The model has 256 KB of KV a
token (16 layers x 16 heads x 128, float32), so each stage has half of that. When every stream has its prompt computed,
the node of the last stage is killed with SIGKILL, and the spare takes over. Every stream is compared, token by token,
with the same request undisturbed.

`pause` is the wait of a stream for its next token, without the step that brings it: from the kill, or the last token
that came after it, until the scheduler sends the first rows to the stages that it has now. What steps wait for copies
to be checked, beyond the time that they compute, is added. The step itself is left out, since attention reads all KV in
any step: it takes longer with more KV, whatever happened before. The whole pause, the first step and a usual step are
given beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.cluster import generator, running, wait_until
from bench.contract import Result, percentile, progress
from bench.models import MODELS, SEED, checkpoint
from controlplane.contract.config import EngineConfig
from controlplane.contract.events import EventKind
from controlplane.contract.status import ClusterStatus
from controlplane.contract.topology import Mode
from controlplane.kfadmin.client import EventRow
from controlplane.kfadmin.loadgen import Prompt, Stream
from controlplane.kfadmin.local import LocalCluster

STAGES = 2
BLOCK = 16
PROMPT_WORDS = 368  # with its answer exactly 33 blocks
TOKENS = 160  # more than steps pass until the last prompt is computed and copied
WINDOW_S = 30.0
SIZES = {"025gb": 0.25e9, "1gb": 1e9, "3gb": 3e9}  # of KV on the node that dies
COPIES = 2 * STAGES  # nodes that hold as much as the one that dies: both stages, served and copied
ROOM_BYTES = 2 << 30  # left free on the machine
VICTIM, HEIR = "n1", "n3"
SHAPE = MODELS["K"]
# A token.
STAGE_BYTES = SHAPE.num_hidden_layers // STAGES * 2 * SHAPE.num_key_value_heads * SHAPE.head_dim * 4


@dataclass
class Tally:
    pauses: list[float] = field(default_factory=list)  # without the first step
    whole: list[float] = field(default_factory=list)
    first_steps: list[float] = field(default_factory=list)
    usual_steps: list[float] = field(default_factory=list)
    suspected: int = 0
    different: int = 0
    failed: int = 0


def run(quick: bool) -> Result:
    settings: dict[str, object] = {"tokens": TOKENS, "prompt_tokens": PROMPT_WORDS, "quick": quick}
    result = Result("takeover", settings=settings)
    suspected = different = failed = 0
    for name, size in SIZES.items():
        count = streams_of(size)
        if (needed := COPIES * size + ROOM_BYTES) > (free := available_bytes()):
            result.absent[f"pause_p99_s_{name}"] = (
                f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            )
            continue
        settings[f"streams_{name}"] = count
        tally = Tally()
        for _ in range(1 if quick else 3):
            _measure(tally, count)
        result.metrics[f"pause_p99_s_{name}"] = percentile(tally.pauses, 0.99)
        result.metrics[f"pause_p50_s_{name}"] = percentile(tally.pauses, 0.5)
        result.metrics[f"whole_pause_p99_s_{name}"] = percentile(tally.whole, 0.99)
        result.measure(f"first_step_s_{name}", tally.first_steps)
        result.measure(f"usual_step_s_{name}", tally.usual_steps)
        suspected += tally.suspected
        different += tally.different
        failed += tally.failed
    result.metrics |= {"suspected_others": suspected, "tokens_different": different, "streams_failed": failed}
    small, large = (result.metrics.get(f"pause_p99_s_{name}") for name in ("025gb", "3gb"))
    if small is not None and large is not None:
        result.metrics["growth_s_per_gb"] = (large - small) / ((SIZES["3gb"] - SIZES["025gb"]) / 1e9)
    return result


def streams_of(size: float) -> int:
    """So many streams have so much KV on a stage when the last of them begins to answer."""
    return max(1, round(size / ((PROMPT_WORDS + TOKENS / 2) * STAGE_BYTES)))


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def prompts_of(count: int) -> list[Prompt]:
    words = random.Random(SEED)
    return [
        Prompt(
            " ".join(f"w{words.randrange(3, SHAPE.vocab_size)}" for _ in range(PROMPT_WORDS)),
            seed=number,
            max_tokens=TOKENS,
        )
        for number in range(count)
    ]


def _measure(tally: Tally, count: int) -> None:
    blocks = count * -(-(PROMPT_WORDS + TOKENS) // BLOCK)
    engine = EngineConfig(
        block_size=BLOCK,
        pool_blocks=2 * blocks + 64,  # half of it is a pipeline's quota
        max_running=count,
        max_batch_tokens=512,
        step_target_s=2.0,  # prompts come in at full speed: what is measured comes after
    )
    prompts = prompts_of(count)
    model = checkpoint("K", "float32")
    with running(Mode.REPLICATE, instances=1, stages=STAGES, spares=1, engine=engine, model=model) as cluster:
        cluster.hold(VICTIM)
        streams, killed_at, killed_unix = asyncio.run(_kill(cluster, prompts))
        with cluster.admin() as admin:
            rows = [row for row in admin.events(limit=200) if row.event.unix_s >= killed_unix]
            heir = next(node for node in admin.status().nodes if node.node == HEIR)
        _look(tally, rows, streams, (killed_at, killed_unix), heir.counters["copy_check_wait_ms"] / 1000)
        reference = asyncio.run(generator(cluster).streams(prompts))
    for stream, expected in zip(streams, reference, strict=True):
        tally.failed += bool(stream.error)
        tally.different += sum(a != b for a, b in zip(stream.tokens, expected.tokens, strict=False))
        tally.different += abs(len(stream.tokens) - len(expected.tokens))


def _look(
    tally: Tally,
    rows: list[EventRow],
    streams: list[Stream],
    killed: tuple[float, float],  # by the monotonic clock, and by the wall clock
    check_wait_s: float,
) -> None:
    killed_at, killed_unix = killed
    recovered = next(row.event for row in rows if row.event.kind is EventKind.RECOVERED)
    phases = {name: float(recovered.details[f"{name}_s"]) for name in ("connect", "restore", "first_token")}
    seen_s = float(recovered.details["seen_unix_s"]) - killed_unix
    begun_at = killed_at + seen_s + phases["connect"] + phases["restore"]
    for stream in streams:
        whole = stream.longest_pause_s(killed_at, WINDOW_S)
        if whole is not None:
            tally.whole.append(whole)
            last = max((at for at in stream.times if at <= begun_at), default=killed_at)
            tally.pauses.append(begun_at - max(last, killed_at) + check_wait_s)
    after = [[at for at in s.times if at > begun_at] for s in streams]
    usual = [later - earlier for times in after for earlier, later in itertools.pairwise(times)]
    tally.first_steps.append(phases["first_token"])
    tally.usual_steps.append(percentile(usual, 0.5))
    shown = ", ".join(f"{name} {seconds:.3f}" for name, seconds in {"seen": seen_s, **phases}.items())
    shown += f", checks waited for {check_wait_s:.3f}"
    progress(f"  {len(streams)} streams paused {max(tally.whole):.3f} s at most: {shown}")
    for row in rows:
        if row.event.kind in (EventKind.SUSPECTED, EventKind.DIED) and row.event.subject != VICTIM:
            tally.suspected += 1
            progress(f"  {row.event.kind.value}: {row.event.message}")


async def _kill(cluster: LocalCluster, prompts: list[Prompt]) -> tuple[list[Stream], float, float]:
    """Once all streams answer and their copies are with the spares."""
    streams = [Stream(prompt) for prompt in prompts]
    began = time.monotonic()
    load = asyncio.create_task(generator(cluster).streams(prompts, streams))
    while not all(len(stream.tokens) > 1 for stream in streams):
        if load.done():
            await load
            raise RuntimeError("the streams ended before the kill")
        await asyncio.sleep(0.02)
    await asyncio.to_thread(wait_until, cluster, "copies that have caught up", _copied)
    if any(stream.done for stream in streams):
        raise RuntimeError("streams ended before the kill")
    progress(f"  {len(streams)} prompts computed and copied after {time.monotonic() - began:.1f} s")
    killed_at, killed_unix = time.monotonic(), time.time()
    cluster.kill(VICTIM)
    return await load, killed_at, killed_unix


def _copied(status: ClusterStatus) -> bool:
    """All but what the streams compute meanwhile: a block each at most."""
    return all(
        0 <= stage.lag_tokens <= pipeline.running * BLOCK
        for pipeline in status.pipelines
        for stage in pipeline.stages
    )
