"""Hosts that have a relay: who reports to which, and how it sees that a process has ended. What befalls relays is in
schedule.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from controlplane.contract.ids import Member
from tests.sim.schedule import Shape
from tests.sim.world import Process, World

TOLD_S = 0.004  # a relay gets to know it within so long: before connections break, or after
UNTOLD = 0.2  # of so many it does not


def names(shape: Shape) -> list[str]:
    return [f"r{k + 1}" for k in range(shape.relays)]


def relay_address(name: str) -> str:
    """A relay's, where it listens for the nodes of its host."""
    return f"unix:{name}"


def address_for(node: str, shape: Shape) -> str:
    """Of the relay on the host of a node; empty if there is none."""
    return relay_address(names(shape)[int(node[1:]) % shape.relays]) if shape.relays else ""


class Lifelines:
    """In place of dataplane/lifeline.py: the world is the kernel."""

    def __init__(self, world: World, relay: Process, on_end: Callable[[Member], None]) -> None:
        self._world, self._relay, self._on_end = world, relay, on_end
        self._followed: set[Member] = set()

    def follow(self, member: Member) -> None:
        process = next((p for p in self._world.processes if p.alive and repr(p) == str(member)), None)
        if member in self._followed or process is None or self._world.random.random() < UNTOLD:
            return
        self._followed.add(member)
        process.at_end.append(lambda: self._tell(member))

    def close(self) -> None:
        self._followed.clear()

    def _tell(self, member: Member) -> None:
        delay_s = self._world.random.random() * TOLD_S
        self._world.post(delay_s, self._relay, self._ended, member)

    def _ended(self, member: Member) -> None:
        if member in self._followed:
            self._followed.discard(member)
            self._on_end(member)


def lifelines_of(
    world: World, current: Callable[[], Process]
) -> Callable[[Path, Callable[[Member], None]], Lifelines]:
    return lambda _run_dir, on_end: Lifelines(world, current(), on_end)
