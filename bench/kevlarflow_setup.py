"""The published set-up, as settings of ours: scenes, devices, network, failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.cluster import running
from controlplane.contract.config import EmulationConfig, EngineConfig, TimingConfig
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster

STAGES = 4
RELOAD_S = 600.0  # emulated: an instance that lost a node is back after this, and so is a replaced node
FAIL_AT_S = 30.0  # emulated, after the first arrival
# Requests in batches, per instance. In the published Table 1, KevlarFlow's p99 TTFT in scene 1, whose two instances
# serve all the time, grows from 401 s at 5 requests per second to 1,004 s at 8: by 201 s for each one more. With
# arrivals over 600 s that is the queue in front of 2.98 requests per second, 1.49 for each instance; at 390 tokens
# of 163 ms that is 95 requests at a time.
MAX_RUNNING = 95
# Emulated: a fresh scheduler asks its stages what they hold of each request that comes within it.
GRACE_S = 10.0
# One-way seconds between four sites of the United States: Chicago, New York, Dallas, San Jose. An instance is in one
# site, its peers in others, so that copies and borrowed nodes are always behind a wide-area link.
SITE_LATENCY_S = (
    (0.0002, 0.010, 0.012, 0.025),
    (0.010, 0.0002, 0.018, 0.035),
    (0.012, 0.018, 0.0002, 0.020),
    (0.025, 0.035, 0.020, 0.0002),
)
LINK_BYTES_PER_S = 1e9 / 8


@dataclass(frozen=True, slots=True)
class Scene:
    number: int
    instances: int
    victims: tuple[str, ...]  # killed at the same moment
    rates: tuple[float, ...]  # requests per second, where none is given
    title: str

    @property
    def nodes(self) -> int:
        return self.instances * STAGES


SCENES = {
    1: Scene(1, 2, ("n2",), (1, 2, 3, 4), "8 nodes, one fails"),
    2: Scene(2, 4, ("n2",), (2, 4, 6, 8), "16 nodes, one fails"),
    3: Scene(3, 4, ("n2", "n5"), (2, 4, 7, 10), "16 nodes, two fail in two instances"),
}


@contextmanager
def scene_cluster(scene: Scene, mode: Mode, time_scale: float) -> Iterator[LocalCluster]:
    engine = EngineConfig(
        executor="oracle",
        pool_blocks=16384,
        block_size=16,
        # The longest prompt goes in as many chunks as microbatches are free beside decodes; two chunks are one pass of
        # a shared node (`light_tokens` of the profile is 750).
        max_batch_tokens=280,
        max_running=MAX_RUNNING,
        max_waiting=20_000,  # the baseline's queues must not overflow: the published ones did not
        microbatches=STAGES,
        microbatch_rows=MAX_RUNNING,  # the profile's fixed part is that of 750 rows: not split while there are places
    )
    emulation = EmulationConfig(
        time_scale=time_scale,
        profile="a10-llama-8b-quarter",
        link_bytes_per_s=LINK_BYTES_PER_S,
        sites=tuple(number // STAGES for number in range(scene.nodes)),
        latency_s=SITE_LATENCY_S,
    )
    # A node that is only starved by this machine must not be taken for dead: the baseline would lose an instance more.
    # The killed one is found by its broken links and report stream, at once and whatever these are.
    timing = TimingConfig(
        reload_s=RELOAD_S / time_scale,
        orphan_grace_s=GRACE_S / time_scale,
        suspect_after_s=2.0,
        dead_after_s=5.0,
        unavailable_grace_s=60.0,
    )
    with running(
        mode,
        instances=scene.instances,
        stages=STAGES,
        engine=engine,
        timing=timing,
        emulation=emulation,
        controllers=1,
    ) as cluster:
        yield cluster
