"""Hosts that have a relay: who reports to which. What befalls relays is in schedule.py."""

from __future__ import annotations

from tests.sim.schedule import Shape


def names(shape: Shape) -> list[str]:
    return [f"r{k + 1}" for k in range(shape.relays)]


def relay_address(name: str) -> str:
    """A relay's, where it listens for the nodes of its host."""
    return f"unix:{name}"


def address_for(node: str, shape: Shape) -> str:
    """Of the relay on the host of a node; empty if there is none."""
    return relay_address(names(shape)[int(node[1:]) % shape.relays]) if shape.relays else ""
