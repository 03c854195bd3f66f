"""Real clusters for benches: started in a directory of their own, on free ports, stopped at the end."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bench.contract import progress
from controlplane.contract.config import (
    ClusterConfig,
    EmulationConfig,
    EngineConfig,
    GatewayConfig,
    ParityConfig,
    TimingConfig,
)
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.contract.topology import Mode
from controlplane.kfadmin.loadgen import LoadGenerator, Prompt, Stream
from controlplane.kfadmin.local import LocalCluster
from dataplane.demo import model_dir

SETTLE_LIMIT_S = 90.0


class NotSettled(KevlarFlowError):
    """The cluster did not reach the state that a measurement begins with."""


@contextmanager
def running(
    mode: Mode,
    *,
    instances: int = 2,
    stages: int = 4,
    spares: int = 0,
    engine: EngineConfig | None = None,
    timing: TimingConfig | None = None,
    model: Path | None = None,
    controllers: int = 2,
    emulation: EmulationConfig | None = None,
    gateway: GatewayConfig | None = None,
    parity: ParityConfig | None = None,
    transport: Literal["auto", "ucx", "sockets"] = "auto",
    secure: bool = False,
) -> Iterator[LocalCluster]:
    """A cluster on a checkpoint directory; on the demo model if none is named. `secure`: with certificates."""
    with tempfile.TemporaryDirectory(prefix="kf-bench-") as run_dir:
        config = ClusterConfig(
            run_dir=run_dir,
            model=str(model or model_dir()),
            etcd=(),
            instances=instances,
            stages=stages,
            spares=spares,
            mode=mode,
            gateway_port=0,
            admin_port=0,
            engine=engine or EngineConfig(),
            timing=timing or TimingConfig(),
            emulation=emulation or EmulationConfig(),
            gateway=gateway or GatewayConfig(),
            parity=parity or ParityConfig(),
            transport=transport,
        )
        cluster = LocalCluster(config, controllers=controllers, secure=secure)
        started = time.monotonic()
        cluster.start()
        try:
            progress(f"{mode.value} {instances}x{stages}: up after {time.monotonic() - started:.1f} s")
            wait_settled(cluster)
            yield cluster
        finally:
            cluster.stop()


def wait_until(cluster: LocalCluster, what: str, holds: Callable[[ClusterStatus], bool]) -> ClusterStatus:
    """Poll the status until it holds. Raises NotSettled after SETTLE_LIMIT_S."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    with cluster.admin() as admin:
        while True:
            status = admin.status()
            if holds(status):
                return status
            if time.monotonic() > deadline:
                states = {p.id: p.state.value for p in status.pipelines}
                raise NotSettled(f"waited {SETTLE_LIMIT_S} s for {what}; pipelines are {states}")
            time.sleep(0.05)


def all_home(status: ClusterStatus) -> bool:
    """Every pipeline is served by its own nodes, and every node is green."""
    return (
        bool(status.pipelines)
        and all(p.state is PipelineState.UP for p in status.pipelines)
        and all(n.state is NodeState.GREEN for n in status.nodes)
    )


def wait_settled(cluster: LocalCluster) -> ClusterStatus:
    return wait_until(cluster, "every pipeline at home", all_home)


def generator(cluster: LocalCluster) -> LoadGenerator:
    return LoadGenerator(
        cluster.gateway_url, cluster.api_key, cluster.config.model_name, ca=cluster.endpoints.ca
    )


def run_streams(cluster: LocalCluster, prompts: Sequence[Prompt]) -> list[Stream]:
    """All prompts at once, to their ends."""
    return asyncio.run(generator(cluster).streams(prompts))
