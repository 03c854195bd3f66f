"""The clusters of `bench protection`: emulated A10s whose KV is protected in one way or another, and their load."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cluster import running
from bench.kevlarflow_load import VOCABULARY, Client, Outcome, Request, drive
from controlplane.contract.config import EmulationConfig, EngineConfig, ParityConfig, TimingConfig
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster
from dataplane.demo import model_dir

INSTANCES = 2
# Tokens, 2 MB of KV a stage: each block is five messages when it is restored, and all nodes share this machine's cores
# for them. With 16 tokens a block that is what is measured.
BLOCK_SIZE = 64
POOL_BLOCKS = 4096  # of a node: a quarter of a million positions
MAX_RUNNING = 32
POSITIONS = 32_768  # that the emulated model takes
LINK_BYTES_PER_S = 1.25e9  # of a node's interface: 10 Gbit/s, as hosts with an A10 are let
PROFILE = "a10-llama-8b-quarter"
XOR = ParityConfig("xor", 1)


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to protect KV, as settings of ours. `code`: of parity, as the settings name it."""

    name: str
    mode: Mode
    stages: int = 4
    code: ParityConfig = XOR

    @property
    def share(self) -> float:
        """What parity should take of the memory that copies take: K of N shards."""
        return self.code.parities / self.stages


NONE = Policy("none", Mode.NONE)
REPLICATE = Policy("replicate", Mode.REPLICATE)
REPLICATE8 = Policy("replicate8", Mode.REPLICATE, 8)
XOR41 = Policy("xor41", Mode.PARITY)
RS41 = Policy("rs41", Mode.PARITY, 4, ParityConfig("rs", 1))
RS82 = Policy("rs82", Mode.PARITY, 8, ParityConfig("rs", 2))


@contextmanager
def long_model() -> Iterator[Path]:
    """The demo model's folder as one that takes POSITIONS positions: the oracle reads no weights."""
    with tempfile.TemporaryDirectory(prefix="kf-bench-model-") as scratch:
        folder = Path(scratch) / "kevlar-demo"
        folder.mkdir()
        for path in model_dir().iterdir():
            if path.name != "config.json":
                (folder / path.name).symlink_to(path)
        config = json.loads((model_dir() / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
        yield folder


@contextmanager
def protected(policy: Policy, model: Path) -> Iterator[LocalCluster]:
    engine = EngineConfig(
        executor="oracle",
        block_size=BLOCK_SIZE,
        pool_blocks=POOL_BLOCKS,
        max_batch_tokens=2048,
        max_running=MAX_RUNNING,
        microbatch_rows=MAX_RUNNING,  # the profile's fixed part is that of far more rows
    )
    # A node that is only starved by this machine must not be taken for dead; the killed one is found by its broken
    # links and report stream, at once and whatever these are.
    timing = TimingConfig(suspect_after_s=2.0, dead_after_s=5.0, unavailable_grace_s=60.0)
    with running(
        policy.mode,
        instances=INSTANCES,
        stages=policy.stages,
        engine=engine,
        timing=timing,
        emulation=EmulationConfig(profile=PROFILE, link_bytes_per_s=LINK_BYTES_PER_S),
        parity=policy.code,
        model=model,
        controllers=1,
    ) as cluster:
        yield cluster


def requests_of(count: int, prompt_tokens: int, max_tokens: int, seed: int) -> list[Request]:
    """All at once, of prompts that nobody has seen before: nothing of them is cached. The same arguments give the same
    requests."""
    random = np.random.default_rng(seed)
    return [
        Request(
            0.0,
            tuple(random.integers(VOCABULARY.start, VOCABULARY.stop, prompt_tokens).tolist()),
            max_tokens,
            seed * 1000 + number,
        )
        for number in range(count)
    ]


async def load(cluster: LocalCluster, requests: Sequence[Request]) -> list[Outcome]:
    client = Client(cluster.gateway_url, cluster.api_key, cluster.config.model_name)
    return await drive(client, requests, 1.0, time.monotonic() + 0.05)
