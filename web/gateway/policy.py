"""The router's limits and waiting times, as a group's settings say."""

from __future__ import annotations

from controlplane.contract.config import ClusterConfig
from web.gateway.routing.policy import Policy


def policy_of(config: ClusterConfig) -> Policy:
    engine, timing = config.engine, config.timing
    return Policy(
        live_max=(engine.max_running + engine.max_waiting) * config.instances,
        live_each=engine.max_running + engine.max_waiting,
        places=engine.max_running,
        grace_s=timing.unavailable_grace_s,
        unreachable_s=2 * timing.dead_after_s,
    )
