"""The router's limits and waiting times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless the name says otherwise."""

    live_max: int = 1536  # requests; more are refused ...
    live_each: int = 0  # ... unless the group has more pipelines: so many for each of them
    places: int = 256  # requests that a pipeline runs at a time; more wait there
    grace_s: float = 5.0  # a stream with no scheduler is held this long
    retry_s: float = 0.02  # after NOT_HERE: topology reaches nodes and gateways at different moments
    move_after_s: float = 0.5  # its pipeline is down and another one is up
    unreachable_s: float = 2.5  # its scheduler cannot be reached, yet the topology says that it serves
    again_s: float = 0.1  # between two re-submits for missing tokens
    # Deaths are charged to every request in its first step then. Two faults in quick succession must not
    # fail innocent ones, so it takes one more than the two that a poison request would need.
    deaths_max: int = 3
    poisoned_max: int = 2  # nodes on which its numbers were not finite: here the blame is exact
