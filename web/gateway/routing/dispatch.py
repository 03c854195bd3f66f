"""The router's shell: feeds it events and performs its effects, in order."""

from __future__ import annotations

import asyncio
import time
from typing import assert_never

import structlog

from controlplane.contract.identity import PLAIN, Identity
from controlplane.contract.ids import Member
from controlplane.contract.requests import Log, RefusalCode
from web.gateway.lives import Lives
from web.gateway.metrics import Metrics
from web.gateway.routing.delivery_queue import DeliveryQueue, Leaving, Readers
from web.gateway.routing.events import (
    CancelAsked,
    CloseStream,
    Closing,
    Deliver,
    Event,
    Fail,
    FailCode,
    LeaveAsked,
    OpenStream,
    RecallAsked,
    RecallDone,
    RefusalReceived,
    SendCancel,
    SendRecall,
    SendSubmit,
    ShutDown,
    StreamDown,
    SubmitAsked,
    Tick,
    TopologySeen,
)
from web.gateway.routing.policy import Policy
from web.gateway.routing.router import Router
from web.gateway.routing.scheduler_streams import Links

logger = structlog.get_logger()

TICK_S = 0.02
GIVEN_UP = {  # refusals of what was accepted before, in words
    RefusalCode.DROPPED: "its node serves that stage no more",
    RefusalCode.POISONED: "a node's numbers were not finite",
}


class Dispatcher:
    """All live requests of one gateway process. Belongs to one event loop."""

    def __init__(self, policy: Policy, token: str, metrics: Metrics, identity: Identity = PLAIN) -> None:
        self.router = Router(policy)
        self.links = Links(token, self._heard, identity)
        self.readers = Readers()
        self.lives = Lives()
        self._metrics = metrics
        self._sinks: dict[int, tuple[DeliveryQueue, int]] = {}
        self._recalls: dict[int, asyncio.Future[tuple[Log | None, bool]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return self.router.live

    def submit(self, queue: DeliveryQueue, index: int, asked: SubmitAsked) -> None:
        """Start a request whose tokens, or failure, arrive on `queue` as choice `index`.

        If another queue waits for the same request, its client has come back: that one ends.
        """
        if (old := self._sinks.get(asked.rid)) is not None:
            text = "another connection reads this stream now"
            old[0].put((old[1], Fail(asked.rid, FailCode.SUPERSEDED, text)))
        self._sinks[asked.rid] = (queue, index)
        self.feed(asked)

    def cancel(self, rid: int, queue: DeliveryQueue) -> None:
        """`queue` waits for it no more: free it everywhere. Idempotent."""
        if self._release(rid, queue):
            self.feed(CancelAsked(rid))

    def leave(self, rid: int, queue: DeliveryQueue) -> None:
        """`queue` waits for it no more, but its client goes on at another gateway."""
        if self._release(rid, queue):
            self.feed(LeaveAsked(rid))

    async def recall(self, rid: int, limit_s: float) -> tuple[Log | None, bool]:
        """What a scheduler knows of a request, and whether all have answered; takes `limit_s` at most."""
        waiting = self._recalls.get(rid)
        if waiting is None:
            waiting = self._recalls[rid] = asyncio.get_running_loop().create_future()
            self.feed(RecallAsked(rid, limit_s))
        return await asyncio.shield(waiting)

    def hand_over(self) -> None:
        """Take no new requests, and send the clients of all streams to other gateways; the rest may finish."""
        self.feed(Closing())
        for queue in {queue for queue, _ in self._sinks.values()}:
            queue.put(Leaving())

    def shut_down(self) -> None:
        """End every live request with an error; new ones fail at once."""
        self.feed(ShutDown())

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self.links.aclose()

    def _heard(self, event: Event) -> None:
        """From a scheduler. What it brings for clients leaves at once: nothing of ours is under way here."""
        with self.readers.gathering():
            self.feed(event)

    def feed(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        effects = self.router.step(event, loop.time())
        self._tell_lives(event)
        for effect in effects:
            match effect:
                case Deliver():
                    self._deliver(effect)
                case SendSubmit(member, submit):
                    self.lives.sent(submit.rid, member, submit.pipeline, time.time())
                    self.links.send(member, submit)
                case SendCancel(member, cancel):
                    self.links.send(member, cancel)
                case SendRecall(member, recall):
                    self.links.send(member, recall)
                case RecallDone(rid, log, sure):
                    self._recalls.pop(rid).set_result((log, sure))
                case Fail():
                    self._fail(effect)
                case OpenStream(member):
                    self.links.open(member)
                case CloseStream(member):
                    self.links.close(member)
                case _:
                    assert_never(effect)
        if self._timer is None and self.router.restless:
            self._timer = loop.call_later(TICK_S, self._tick)

    def _tell_lives(self, event: Event) -> None:
        match event:
            case TopologySeen(topology) if topology is self.router.topology:
                self.lives.topology(topology, time.time())
            case StreamDown(member):
                self.lives.broke(member, time.time())
            case RefusalReceived(member, refusal) if refusal.code in GIVEN_UP:
                self.lives.turned_down(member, refusal.pipeline, GIVEN_UP[refusal.code], time.time())

    def _release(self, rid: int, queue: DeliveryQueue) -> bool:
        sink = self._sinks.get(rid)
        if sink is None or sink[0] is not queue:
            return False
        del self._sinks[rid]
        return True

    def locate(self, member: Member, address: str) -> None:
        self.links.locate(member, address)

    def _deliver(self, effect: Deliver) -> None:
        if effect.gap_s is not None:
            self._metrics.failover_gap.labels(effect.how).observe(effect.gap_s)
            self.lives.paused(effect.rid, effect.gap_s, effect.how, time.time())
        sink = self._sinks.get(effect.rid)
        if sink is not None:
            queue, index = sink
            queue.put((index, effect))
            if effect.tokens[-1].finish is not None:
                del self._sinks[effect.rid]

    def _fail(self, effect: Fail) -> None:
        if effect.code not in (
            FailCode.OVERLOADED,
            FailCode.SUPERSEDED,
        ):  # the former come in floods, and are counted
            logger.warning("request failed", rid=effect.rid, code=effect.code.value, reason=effect.message)
        sink = self._sinks.pop(effect.rid, None)
        if sink is not None:
            queue, index = sink
            queue.put((index, effect))

    def _tick(self) -> None:
        self._timer = None
        self.feed(Tick())
