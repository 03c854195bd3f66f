"""The relay of a host fails while streams run: nobody is suspected, and no client sees anything."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from controlplane.contract.events import Event, EventKind
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming

PROMPTS = sample_prompts(16, 192)


def events_after(cluster: Cluster, newest: int) -> list[Event]:
    with cluster.local.admin() as admin:
        return [row.event for row in admin.events(limit=200, after=newest)]


def newest_event(cluster: Cluster) -> int:
    with cluster.local.admin() as admin:
        return max((row.id for row in admin.events(limit=1)), default=0)


def senders(cluster: Cluster) -> list[int]:
    """How many streams of reports each controller has."""
    counts, headers = [], {"authorization": f"Bearer {cluster.local.admin_token}"}
    for url in cluster.local.endpoints.admin:
        lines = httpx.get(
            f"{url}/metrics", headers=headers, trust_env=False, verify=False, timeout=5
        ).text.splitlines()
        line = next(line for line in lines if line.startswith("kevlarflow_report_senders "))
        counts.append(int(float(line.split()[1])))
    return counts


async def until_relayed(cluster: Cluster) -> None:
    """Every controller hears several nodes on one stream. All are on it, unless the machine is so busy that the relay
    was late for some."""
    nodes = len(cluster.local.node_pids())
    async with asyncio.timeout(120):
        while not all(0 < n < nodes for n in await asyncio.to_thread(senders, cluster)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


HARM = (EventKind.SUSPECTED, EventKind.DIED, EventKind.LEFT, EventKind.EPOCH, EventKind.UNAVAILABLE)


def disturb(cluster: Cluster, act: Callable[[], Awaitable[None]]) -> list[str]:
    """Streams run, their nodes report through the relay, and then `act`. What is on record of nodes and pipelines."""
    asyncio.run(cluster.references(PROMPTS))
    asyncio.run(until_relayed(cluster))
    newest, before = newest_event(cluster), cluster.local.node_pids()

    async def acting(streams: list[Stream]) -> None:
        await until(lambda: sum(len(s.tokens) for s in streams) >= 8 * len(streams), "8 tokens a stream")
        await act()

    streams = asyncio.run(while_streaming(cluster, PROMPTS, acting))
    asyncio.run(cluster.expect_equal(streams))
    assert cluster.local.node_pids() == before
    return [event.message for event in events_after(cluster, newest) if event.kind in HARM]


def test_a_killed_relay_is_nobodys_death(home: Cluster) -> None:
    killed: list[int] = []

    async def kill() -> None:
        killed.append(home.local.kill("relay"))
        await until(lambda: home.local.pids().get("relay", killed[0]) != killed[0], "there is a new relay")

    assert disturb(home, kill) == []


def test_a_stopped_relay_is_nobodys_death(home: Cluster) -> None:
    async def stop() -> None:
        home.kill("relay", signal.SIGSTOP)
        try:
            own = len(home.local.node_pids())
            await asyncio.sleep(3.0)  # the length of the fault
            counts = await asyncio.to_thread(senders, home)
            assert all(count > own for count in counts), f"one of each node beside the relay's: {counts}"
        finally:
            home.kill("relay", signal.SIGCONT)

    assert disturb(home, stop) == []


def test_a_launcher_that_starts_again_brings_a_fresh_relay(home: Cluster) -> None:
    relay, launcher = home.local.pids()["relay"], home.local.pids()["launcher"]

    async def restart() -> None:
        home.kill("launcher")
        # It imports torch first.
        await until(lambda: home.local.pids().get("launcher", launcher) != launcher, "a new launcher", 60.0)
        await until(lambda: home.local.pids().get("relay", relay) != relay, "a new relay", 60.0)

    assert disturb(home, restart) == []


@pytest.mark.parametrize("victim", ["n2", "n4"])
def test_a_killed_node_is_found_at_once_behind_a_relay(home: Cluster, victim: str) -> None:
    asyncio.run(until_relayed(home))
    newest = newest_event(home)
    home.kill(victim)

    async def died() -> Event:
        async with asyncio.timeout(20):
            while True:
                for event in await asyncio.to_thread(events_after, home, newest):
                    if event.kind is EventKind.DIED and event.subject == victim:
                        return event
                await asyncio.sleep(0.05)

    event = asyncio.run(died())
    assert "its process has ended" in event.message, event.message
    asyncio.run(home.wait_all_home(60.0))


def test_the_socket_is_for_its_owner_only(home: Cluster) -> None:
    socket = Path(home.local.config.run_dir, "relay.sock")
    assert socket.stat().st_mode & 0o777 == 0o600
