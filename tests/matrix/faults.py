"""Begins a fault, holds it, and ends it: in the network between the hosts, their processes and disks, and etcd."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import assert_never

from tests.e2e.faults import frozen_thread, thread_state, threads_named
from tests.matrix.cells import Cut, Direction, DiskFull, Fault, Hang, Kill, Refusal, Refuse, Slow, Stop, Twin
from tests.matrix.etcd import EtcdOperator
from tests.matrix.hosts import CLIENT, CONTROLLERS, ETCD, GATEWAYS, INSTANCES, HostCluster
from tests.matrix.namespaces import Way

FLAP_CUT_S, FLAP_HEAL_S = 0.3, 0.7


class Faults:
    """The faults of one cluster."""

    def __init__(self, cluster: HostCluster) -> None:
        self._cluster = cluster
        self._etcd = EtcdOperator({name: cluster.network.address(name) for name in ETCD})
        size = len(cluster.nodes) // INSTANCES
        self._groups = {
            "nodes": cluster.nodes, "controllers": CONTROLLERS, "gateways": GATEWAYS, "etcd": ETCD, "client": (CLIENT,),
            "all": cluster.servers, **{f"p{k}": cluster.nodes[k * size : (k + 1) * size] for k in range(INSTANCES)},
        }  # fmt: skip

    def resolve(self, whom: str) -> tuple[str, ...]:
        """Hosts, by what they are at this moment. Raises AssertionError if nobody is that."""
        if "+" in whom:
            return tuple(name for each in whom.split("+") for name in self.resolve(each))
        if whom in self._groups:
            return self._groups[whom]
        if whom in ("leader", "candidate"):
            leader = self._cluster.status().leader
            assert leader, "nobody leads"
            return tuple(name for name in CONTROLLERS if (name == leader) == (whom == "leader"))
        if whom in ("etcd leader", "etcd follower"):
            leader = self._etcd.leader()
            return tuple(name for name in ETCD if (name == leader) == (whom == "etcd leader"))[:1]
        return (whom,)

    async def play(self, fault: Fault) -> set[str]:
        """From its beginning to its end; whatever happens, it is over afterwards. Returns who gets a fresh process by
        it. Raises AssertionError if it did not bite."""
        whom = await asyncio.to_thread(self.resolve, fault.whom)
        match fault:
            case Cut():
                await self._cut(fault, ways(whom, self.resolve(fault.others), fault.direction))
            case Slow():
                await self._slow(fault, ways(whom, self.resolve(fault.others), Direction.BOTH))
            case Kill():
                self._signal(whom, signal.SIGKILL)
                return set(whom)
            case Stop():
                await self._stop(fault, whom)
            case DiskFull():
                await self._fill(fault, whom)
            case Hang():
                await self._hang(fault, whom)
                return set(whom) if fault.thread else set()
            case Twin():
                await self._twin(fault, whom)
            case Refuse():
                killed = await asyncio.to_thread(self.resolve, fault.kills) if fault.kills else ()
                await self._refuse(fault, killed)
                return set(killed)
            case _:
                assert_never(fault)
        return set()

    # ---- of the network

    async def _cut(self, fault: Cut, lost: Sequence[Way]) -> None:
        network, deadline = self._cluster.network, time.monotonic() + fault.hold_s
        network.touched()
        try:
            if not fault.flaps:
                network.cut(lost)
                await asyncio.sleep(fault.hold_s)  # the length of the fault
            while time.monotonic() < deadline:
                network.cut(lost)
                await asyncio.sleep(FLAP_CUT_S)
                network.cut([])
                await asyncio.sleep(FLAP_HEAL_S)
        finally:
            network.cut([])
        assert network.touched() > 0, "not a packet was dropped"

    async def _slow(self, fault: Slow, held: Sequence[Way]) -> None:
        network = self._cluster.network
        network.touched()
        try:
            network.hold(held, delay_s=fault.delay_s, loss=fault.loss)
            await asyncio.sleep(fault.hold_s)  # the length of the fault
        finally:
            network.hold([])
        assert network.touched() > 0, "not a packet was held"

    # ---- of processes and disks

    def _signal(self, whom: Sequence[str], number: int) -> None:
        for name in whom:
            self._cluster.signal(name, number)

    async def _stop(self, fault: Stop, whom: Sequence[str]) -> None:
        pids = [self._cluster.pid(name) for name in whom]
        try:
            self._signal(whom, signal.SIGSTOP)
            await asyncio.sleep(fault.hold_s)  # the length of the fault
        finally:
            self._signal(whom, signal.SIGCONT)
        assert pids == [self._cluster.pid(name) for name in whom]

    async def _fill(self, fault: DiskFull, whom: Sequence[str]) -> None:
        try:
            for name in whom:
                await asyncio.to_thread(self._cluster.fill_disk, name)
            await asyncio.sleep(fault.hold_s)  # the length of the fault
        finally:
            for name in whom:
                self._cluster.free_disk(name)

    async def _hang(self, fault: Hang, whom: Sequence[str]) -> None:
        frozen: list[tuple[int, int]] = []
        with contextlib.ExitStack() as stack:
            for name in whom:
                pid = self._cluster.pid(name)
                thread = threads_named(pid, fault.thread)[0] if fault.thread else pid
                stack.enter_context(frozen_thread(pid, thread))
                frozen.append((pid, thread))
            assert [thread_state(*each) for each in frozen] == ["t"] * len(whom), "a thread runs on"
            await asyncio.sleep(fault.hold_s)  # the length of the fault
            # A node whose computation hangs is ended meanwhile; its thread stays dead until its tracer lets go of it.
            ends = {"t", "Z", "X", ""} if fault.thread else {"t"}
            assert {thread_state(*each) for each in frozen} <= ends, "a thread went on"

    async def _twin(self, fault: Twin, whom: Sequence[str]) -> None:
        (name,) = whom
        with self._cluster.twin(name) as logs:
            await asyncio.sleep(fault.hold_s)  # the length of the fault
            said = "".join(file.read_text() for file in logs.iterdir())
        assert f"/{name} is taken" in said, f"the second {name} did not find its name taken: {said}"

    # ---- of etcd

    async def _refuse(self, fault: Refuse, killed: Sequence[str]) -> None:
        switch = {Refusal.NO_SPACE: self._etcd.alarm, Refusal.NO_RIGHTS: self._etcd.password}[fault.why]
        await asyncio.to_thread(switch, True)
        try:
            assert not await asyncio.to_thread(self._etcd.writes), "etcd takes writes"
            self._signal(killed, signal.SIGKILL)
            await asyncio.sleep(fault.hold_s)  # the length of the fault
            if killed or fault.why is Refusal.NO_SPACE:  # else nobody had to write
                troubles = (await asyncio.to_thread(self._cluster.status)).troubles
                assert any("etcd" in trouble for trouble in troubles), f"nobody is told: {troubles}"
        finally:
            await asyncio.to_thread(switch, False)


def ways(whom: Sequence[str], others: Sequence[str], direction: Direction) -> list[Way]:
    """From whom to whom no packet, or every packet late; nobody is cut from itself."""
    sent = [(a, b) for a in whom for b in others if a != b]
    match direction:
        case Direction.FROM:
            chosen = sent
        case Direction.TO:
            chosen = [(b, a) for a, b in sent]
        case Direction.BOTH:
            chosen = sent + [(b, a) for a, b in sent]
        case _:
            assert_never(direction)
    return list(dict.fromkeys(chosen))
