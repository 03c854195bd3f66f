"""The router's shell: feeds it events and performs its effects, in order."""

from __future__ import annotations

import asyncio
from typing import assert_never

import structlog

from controlplane.contract.ids import Member, new_rid
from controlplane.contract.requests import Sampling
from web.gateway.channel import Channel
from web.gateway.client import Links
from web.gateway.events import (
    CancelAsked,
    CloseStream,
    Deliver,
    Event,
    Fail,
    FailCode,
    OpenStream,
    SendCancel,
    SendSubmit,
    ShutDown,
    SubmitAsked,
    Tick,
)
from web.gateway.live import Policy
from web.gateway.metrics import Metrics
from web.gateway.router import Router

log = structlog.get_logger()

TICK_S = 0.02


class Dispatcher:
    """All live requests of one gateway process. Belongs to one event loop."""

    def __init__(self, policy: Policy, token: str, metrics: Metrics) -> None:
        self.router = Router(policy)
        self.links = Links(token, self.feed)
        self._metrics = metrics
        self._sinks: dict[int, tuple[Channel, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def submit(
        self, channel: Channel, index: int, prompt: tuple[int, ...], sampling: Sampling, priority: int
    ) -> int:
        """Start a request whose tokens, or failure, arrive on `channel` as choice `index`; its rid."""
        rid = new_rid()
        self._sinks[rid] = (channel, index)
        self.feed(SubmitAsked(rid, prompt, sampling, priority))
        return rid

    def cancel(self, rid: int) -> None:
        """Nobody waits for it any more: free it everywhere. Idempotent."""
        if self._sinks.pop(rid, None) is not None:
            self.feed(CancelAsked(rid))

    def shut_down(self) -> None:
        """End every live request with an error; new ones fail at once."""
        self.feed(ShutDown())

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self.links.aclose()

    def feed(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        for effect in self.router.step(event, loop.time()):
            match effect:
                case Deliver():
                    self._deliver(effect)
                case SendSubmit(member, submit):
                    self.links.send(member, submit)
                case SendCancel(member, cancel):
                    self.links.send(member, cancel)
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

    def locate(self, member: Member, address: str) -> None:
        self.links.locate(member, address)

    def _deliver(self, effect: Deliver) -> None:
        if effect.gap_s is not None:
            self._metrics.failover_gap.labels(effect.how).observe(effect.gap_s)
        sink = self._sinks.get(effect.rid)
        if sink is not None:
            channel, index = sink
            channel.put((index, effect))
            if effect.tokens[-1].finish is not None:
                del self._sinks[effect.rid]

    def _fail(self, effect: Fail) -> None:
        if effect.code is not FailCode.OVERLOADED:  # those come in floods, and are counted
            log.warning("request failed", rid=effect.rid, code=effect.code.value, reason=effect.message)
        sink = self._sinks.pop(effect.rid, None)
        if sink is not None:
            channel, index = sink
            channel.put((index, effect))

    def _tick(self) -> None:
        self._timer = None
        self.feed(Tick())
