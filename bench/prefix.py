"""Prefix caching: how much it finds, against an ideal cache; what a cached prompt gains, and what others pay.

Hit rates: prompts of Mooncake's conversation trace in their order, at 1/32 of their length: each of the trace's blocks
of 512 tokens becomes one KV block of 16 tokens of its own. The ideal cache is one of as many blocks as a pipeline may
use, that evicts the least recently used, of one prompt the last block first. Two pipelines behind one gateway, two
prompts at a time, are compared with one ideal cache of twice the size: the gateway decides which of them is asked. Real
processes, executor `oracle`.

Time to first token: model S on the CPU, prompts of 1,024 tokens. A prompt is sent, then sent again. What the cache
costs prompts that miss it: two nodes of one pipeline each, one of them with `prefix_caching` off, asked in turns."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec

from bench.cluster import running
from bench.contract import Result, progress
from bench.models import MODELS, checkpoint
from controlplane.contract.config import EngineConfig, GatewayConfig
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

TRACE = "mooncake_conversation.jsonl"
TRACE_BLOCK = 512  # tokens
BLOCK = 16
CACHE_BLOCKS = 4096  # of a pipeline
AT_ONCE = 2  # over two pipelines
PROMPT_TOKENS = 1024
LIMIT_S = 60.0


class TraceRequest(msgspec.Struct):
    input_length: int
    hash_ids: list[int]


def run(quick: bool) -> Result:
    count, rounds = (1_000, 15) if quick else (6_000, 60)
    settings: dict[str, object] = {
        "prompts": count, "cache_blocks": CACHE_BLOCKS, "block_size": BLOCK, "at_once": AT_ONCE,
        "prompt_tokens": PROMPT_TOKENS, "rounds": rounds, "quick": quick,
    }  # fmt: skip
    result = Result("prefix", settings)
    _hit_rates(result, count)
    _first_tokens(result, rounds)
    return result


# ---------------------------------------------------------------------- hit rates


def _hit_rates(result: Result, count: int) -> None:
    trace = trace_file()
    if trace is None:
        result.absent["hit_rate"] = f"the trace was not found: set KF_MOONCAKE_TRACE to {TRACE}"
        return
    prompts = list(itertools.islice(scaled(trace), count))
    for name, instances, at_once in (("hit_rate", 1, 1), ("hit_rate_two", 2, AT_ONCE)):
        engine = EngineConfig(
            executor="oracle", block_size=BLOCK, pool_blocks=CACHE_BLOCKS, max_batch_tokens=4096
        )
        with running(
            Mode.NONE,
            instances=instances,
            stages=1,
            engine=engine,
            gateway=GatewayConfig(prompt_tokens_details=True),
            model=checkpoint("T", "float32"),
            controllers=1,
        ) as cluster:
            cached = asyncio.run(
                _cached(cluster, [tokens_of(ids, length) for ids, length in prompts], at_once)
            )
        shareable = sum((length - 1) // BLOCK for _, length in prompts)
        result.metrics[name] = sum(cached) / BLOCK / shareable
        result.metrics[f"{name}_ideal"] = ideal_hits(prompts, instances * CACHE_BLOCKS) / shareable
        result.ratios[name] = result.metrics[name] / result.metrics[f"{name}_ideal"]
        progress(f"  {name}: {result.metrics[name]:.4f}, ideal {result.metrics[f'{name}_ideal']:.4f}")


def trace_file() -> Path | None:
    given = os.environ.get("KF_MOONCAKE_TRACE")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data" / TRACE
    return path if path.is_file() else None


def scaled(trace: Path) -> Iterator[tuple[list[int], int]]:
    """Of each prompt its blocks' ids and its length, in tokens of ours."""
    with trace.open("rb") as lines:
        for line in lines:
            request = msgspec.json.decode(line, type=TraceRequest)
            length = request.input_length * BLOCK // TRACE_BLOCK
            yield request.hash_ids, max(1, min(length, BLOCK * len(request.hash_ids)))


def tokens_of(ids: Iterable[int], length: int) -> list[int]:
    """Each block's tokens are a function of its id."""
    tokens: list[int] = []
    for number in ids:
        tokens += random.Random(number).choices(range(3, MODELS["T"].vocab_size), k=BLOCK)
    return tokens[:length]


def ideal_hits(prompts: Sequence[tuple[list[int], int]], capacity: int) -> int:
    """Blocks that are found in a cache of so many; a prompt's last token is always computed."""
    cache, hits = OrderedDict[int, None](), 0
    for ids, length in prompts:
        hits += sum(1 for _ in itertools.takewhile(cache.__contains__, ids[: (length - 1) // BLOCK]))
        for number in reversed(ids[: length // BLOCK]):
            cache[number] = None
            cache.move_to_end(number)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


async def _cached(cluster: LocalCluster, prompts: Sequence[list[int]], at_once: int) -> list[int]:
    """How many tokens of each prompt were cached, as its usage says."""
    found = [0] * len(prompts)
    coming = iter(enumerate(prompts))
    async with client(cluster) as http:

        async def ask_on() -> None:
            for index, tokens in coming:
                answer = await http.post("completions", json=body(cluster, tokens))
                answer.raise_for_status()
                found[index] = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(ask_on())
    return found


# ---------------------------------------------------------------------- times to first token


def _first_tokens(result: Result, rounds: int) -> None:
    model, numbers = checkpoint("S", "bfloat16"), random.Random(1)
    hit: list[float] = []
    miss: list[float] = []
    miss_off: list[float] = []
    with ExitStack() as stack:
        clusters = [
            stack.enter_context(
                running(
                    Mode.NONE,
                    instances=1,
                    stages=1,
                    engine=EngineConfig(threads=2, prefix_caching=caching),
                    model=model,
                    controllers=1,
                )
            )
            for caching in (True, False)
        ]
        for number in range(rounds + 1):
            prompt = [numbers.randrange(3, MODELS["S"].vocab_size) for _ in range(PROMPT_TOKENS)]
            order = (True, False) if number % 2 else (False, True)
            times = {caching: asyncio.run(_ttft(clusters[not caching], prompt)) for caching in order}
            again = asyncio.run(_ttft(clusters[0], prompt))
            if number:  # the first one warms up
                miss.append(times[True])
                miss_off.append(times[False])
                hit.append(again)
    result.measure("ttft_hit_s", hit)
    result.measure("ttft_miss_s", miss)
    result.measure("ttft_miss_off_s", miss_off, into="baseline")
    costs = [on / off - 1 for on, off in zip(miss, miss_off, strict=True)]
    result.metrics["miss_cost"] = statistics.median(costs)
    result.spread["metrics.miss_cost"] = (min(costs), max(costs))
    gains = [cold / warm for cold, warm in zip(miss, hit, strict=True)]
    result.ratios["ttft"] = statistics.median(gains)
    result.spread["ratios.ttft"] = (min(gains), max(gains))


async def _ttft(cluster: LocalCluster, tokens: list[int]) -> float:
    async with client(cluster) as http:
        await http.get("models")  # the connection is there
        sent = time.perf_counter()
        async with http.stream(
            "POST", "completions", json=body(cluster, tokens) | {"stream": True}
        ) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    return time.perf_counter() - sent
    raise RuntimeError("a stream ended without a token")


def client(cluster: LocalCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{cluster.gateway_url}/v1/",
        headers={"Authorization": f"Bearer {cluster.api_key}"},
        timeout=LIMIT_S,
    )


def body(cluster: LocalCluster, tokens: list[int]) -> dict[str, object]:
    return {
        "model": cluster.config.model_name,
        "prompt": tokens,
        "max_tokens": 1,
        "seed": 1,
        "ignore_eos": True,
    }
