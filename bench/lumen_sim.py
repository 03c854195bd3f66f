"""A discrete-event simulation of many instances, some of which fail: the policies are the ones that serve.

`dataplane.core.holders` places copies and `web.gateway.routing.recovery` says where interrupted requests go on. What is
modelled is an instance: it runs up to `places` requests in batches, computes prompts in chunks beside decodes, and a
step takes a fixed time, and some for each token and for each position of context that it reads. Steps of equal batches
are taken together until somebody comes or ends, so that 1,024 instances need no 1,024 processes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from controlplane.contract.loads import work
from controlplane.contract.topology import Mode
from dataplane.core.holders import CANDIDATES, Holders
from web.gateway.routing.recovery import TAIL_TOKENS, WAVE_LIMIT_S, Option, Wave, destination, looked_at

GOSSIP_S = 0.25  # how often instances say what they have to do
STEPS_AT_ONCE = 32  # of one batch: the context grows meanwhile


@dataclass(frozen=True, slots=True)
class Device:
    """One instance. Defaults: a dense model of 14e9 parameters in 16 bits on two accelerators of about 250 dense
    TFLOP/s reached and 3 TB/s together, 160 KiB of KV a token."""

    fixed_s: float = 0.015
    per_token_s: float = 1.2e-4
    per_context_token_s: float = 5.5e-8
    chunk_tokens: int = 512
    places: int = 48
    copy_s_per_token: float = 1.3e-5  # on its way to a holder: 100 Gbit/s
    take_up_s_per_token: float = 6.5e-6  # from a holder's memory to where it computes: 25 GB/s
    detect_s: float = 0.2  # from a death to the topology that says so


@dataclass(slots=True, eq=False)
class Request:
    rid: int
    at: float
    prompt: int
    output: int
    left: int = 0  # tokens to compute before the next token
    made: int = 0  # tokens of its output in this life
    seen: int = 0  # tokens that its client has
    first_at: float = math.inf
    last_at: float = 0.0
    waits_since: float | None = None  # interrupted, and no token since
    paused_s: float = 0.0
    moved: bool = False

    @property
    def context(self) -> int:
        return self.prompt + self.made


@dataclass(slots=True, eq=False)
class Instance:
    index: int
    holders: Holders
    up: bool = True
    running: dict[int, Request] = field(default_factory=dict)
    waiting: deque[Request] = field(default_factory=deque)
    prompt_tokens: int = 0
    version: int = 0  # of its plan: what ends another one is void
    began: float = 0.0
    step_s: float = 0.0
    steps: int = 0  # planned; 0: it is idle

    @property
    def requests(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def work(self) -> int:
        return work(self.requests, self.prompt_tokens)


class Simulation:
    """`failures`: when which instance dies; it is back `reload_s` later."""

    def __init__(
        self,
        mode: Mode,
        count: int,
        requests: Sequence[Request],
        failures: Sequence[tuple[float, int]],
        reload_s: float,
        device: Device | None = None,
    ) -> None:
        self.mode, self.device, self.reload_s = mode, device or Device(), reload_s
        fixed = mode is Mode.FIXED_NEIGHBOUR
        self.instances = [Instance(i, Holders(1, fixed=fixed)) for i in range(count)]
        self.names = {f"p{i}": i for i in range(count)}
        self.now = 0.0
        self.wave = Wave()
        self.held: deque[tuple[Request, str | None]] = deque()
        self.interrupted: list[Request] = []
        self.at_holder = 0  # interrupted requests that went on at their holder
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._left = len(requests)
        for request in requests:
            self._at(request.at, partial(self._arrive, request))
        for at, index in failures:
            self._at(at, partial(self._die, index))
        if self._copies:
            self._neighbours()
            self._gossip()

    def run(self) -> None:
        while self._left:
            self.now, _, event = heapq.heappop(self._events)
            event()

    @property
    def _copies(self) -> bool:
        return self.mode is not Mode.STOP_RESTART

    def _at(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    # ------------------------------------------------------------------ copies

    def _neighbours(self) -> None:
        count = len(self.instances)
        for instance in self.instances:
            ring = (self.instances[(instance.index + step) % count] for step in range(1, count))
            up = itertools.islice((other for other in ring if other.up), CANDIDATES)
            instance.holders.allow([f"p{other.index}" for other in up])

    def _gossip(self) -> None:
        loads = [instance.work for instance in self.instances]
        for instance in self.instances:
            if instance.up:
                for name in instance.holders._candidates:
                    instance.holders.heard(name, loads[self.names[name]], self.now)
                instance.holders.tick(self.now)
                self._copy(instance)
        self._at(self.now + GOSSIP_S, self._gossip)

    def _copy(self, instance: Instance) -> None:
        """What its stage has been told to copy is on its way."""
        for place in instance.holders.orders():
            request = instance.running.get(place.rid)
            if request is None or not place.holders or place.holders[0] == instance.holders.holder(place.rid):
                continue
            at = self.now + request.context * self.device.copy_s_per_token

            def copied(rid: int = place.rid, holder: str = place.holders[0]) -> None:
                instance.holders.copied(0, rid, holder)

            self._at(at, copied)

    # ------------------------------------------------------------------ requests

    def _least(self, rid: int) -> Instance | None:
        """As the gateway's balance: a free place, few prompt tokens that wait, few requests."""
        up = [i for i in self.instances if i.up] if len(self.instances) <= 16 else None
        if up is None:
            some = (self.instances[(rid * 7919 + step) % len(self.instances)] for step in range(32))
            up = [i for i in some if i.up]
        places = self.device.places
        return min(
            up,
            key=lambda i: (max(0, i.requests + 1 - places), i.prompt_tokens, i.requests, i.index),
            default=None,
        )

    def _arrive(self, request: Request) -> None:
        request.left = request.prompt
        instance = self._least(request.rid)
        if instance is None:
            self._at(self.now + 0.5, lambda: self._arrive(request))
        else:
            self._give(instance, request)

    def _give(self, instance: Instance, request: Request) -> None:
        instance.waiting.append(request)
        instance.prompt_tokens += request.left
        self._interrupt(instance)

    def _die(self, index: int) -> None:
        instance = self.instances[index]
        self._settle_steps(instance, self.now, whole=False)
        instance.up, instance.steps = False, 0
        instance.version += 1
        lost = [(r, instance.holders.holder(r.rid)) for r in (*instance.running.values(), *instance.waiting)]
        for request, _ in lost:
            if request.seen and request.waits_since is None:
                request.waits_since = self.now
                self.interrupted.append(request)
            instance.holders.release(request.rid)
            self.wave.ended(request.rid)
        instance.running.clear()
        instance.waiting.clear()
        instance.prompt_tokens = 0
        if self._copies:
            self._neighbours()

        def moved() -> None:
            for request, holder in lost:
                if self._copies:
                    self.held.append((request, holder))
                else:
                    request.made = 0
                    self._arrive(request)
            self._place_held()

        def back() -> None:
            instance.up = True
            if self._copies:
                self._neighbours()

        self._at(self.now + self.device.detect_s, moved)
        self._at(self.now + self.reload_s, back)

    def _place_held(self) -> None:
        """Interrupted requests, as the gateway's router brings them to where they go on."""
        again: deque[tuple[Request, str | None]] = deque()
        up = [i for i in self.instances if i.up]
        while self.held:
            request, holder = self.held.popleft()
            seen = [up[k] for k in looked_at(request.rid * 7919, len(up))]
            if holder is not None and (there := self.instances[self.names[holder]]).up and there not in seen:
                seen.append(there)
            places = self.device.places
            options = [Option(f"p{i.index}", i.requests, i.prompt_tokens, places) for i in seen]
            tokens = request.context
            fixed = self.mode is Mode.FIXED_NEIGHBOUR
            chosen = destination(options, holder, tokens, fixed=fixed)
            missing = TAIL_TOKENS if chosen == holder else tokens
            since = self.now if request.waits_since is None else request.waits_since + self.device.detect_s
            if chosen is None or not (fixed or self.wave.admits(chosen, missing, self.now - since)):
                again.append((request, holder))
                continue
            self.wave.sent(request.rid, chosen, missing)
            request.left, request.moved = min(missing, tokens), True
            instance = self.instances[self.names[chosen]]
            if chosen == holder:
                self.at_holder += 1
                late_s = tokens * self.device.take_up_s_per_token
                self._at(self.now + late_s, partial(self._take_up, instance, request))
            else:
                self._give(instance, request)
        self.held = again
        if again:
            self._at(self.now + WAVE_LIMIT_S, self._place_held)

    def _take_up(self, instance: Instance, request: Request) -> None:
        if not instance.up:
            self.wave.ended(request.rid)
            self.held.append((request, None))
            self._place_held()
            return
        # Adopted: it runs at once where there is a place, before prompts that wait.
        if len(instance.running) < self.device.places:
            instance.waiting.appendleft(request)
        else:
            request.left = request.context
            instance.waiting.append(request)
        instance.prompt_tokens += request.left
        self._interrupt(instance)

    # ------------------------------------------------------------------ steps

    def _interrupt(self, instance: Instance) -> None:
        """Somebody has come: its steps go on as planned to the end of the one that is under way."""
        if not instance.steps:
            self._plan(instance, self.now)
            return
        done = max(1, math.ceil((self.now - instance.began) / instance.step_s - 1e-9))
        if done < instance.steps:
            instance.steps = done
            self._schedule(instance)

    def _schedule(self, instance: Instance) -> None:
        instance.version += 1
        version, end = instance.version, instance.began + instance.steps * instance.step_s
        self._at(end, lambda: self._ended(instance, version))

    def _ended(self, instance: Instance, version: int) -> None:
        if instance.version == version:
            self._settle_steps(instance, self.now, whole=True)
            instance.steps = 0
            self._plan(instance, self.now)

    def _batch(self, instance: Instance) -> Iterator[tuple[Request, int]]:
        """Who gets how many tokens of prompts computed by the next step. Admits while there are places."""
        room = self.device.chunk_tokens
        while instance.waiting and len(instance.running) < self.device.places:
            request = instance.waiting.popleft()
            instance.running[request.rid] = request
        for request in instance.running.values():
            if request.left and room:
                count = min(room, request.left)
                room -= count
                yield request, count

    def _plan(self, instance: Instance, now: float) -> None:
        chunks = list(self._batch(instance))
        if not instance.running:
            return
        decodes = [r for r in instance.running.values() if not r.left]
        context = sum(r.context for r in decodes) + sum(r.context - r.left + count for r, count in chunks)
        tokens = len(decodes) + sum(count for _, count in chunks)
        device = self.device
        instance.began = now
        instance.step_s = device.fixed_s + tokens * device.per_token_s + context * device.per_context_token_s
        instance.steps = (
            1 if chunks else min(STEPS_AT_ONCE, *(r.output - r.made for r in decodes), STEPS_AT_ONCE)
        )
        self._schedule(instance)

    def _settle_steps(self, instance: Instance, now: float, whole: bool) -> None:
        """What the steps that were planned have brought by now. `whole`: all of them."""
        if not instance.steps:
            return
        steps = instance.steps if whole else int((now - instance.began) / instance.step_s + 1e-9)
        if not steps:
            return
        first, last = instance.began + instance.step_s, instance.began + steps * instance.step_s
        room = self.device.chunk_tokens
        freed = False
        for request in list(instance.running.values()):
            if request.left:
                count = min(room, request.left)
                room -= count
                request.left -= count
                instance.prompt_tokens -= count
                if request.left:
                    continue
                self._token(request, 1, last, last)
                if self._copies:
                    instance.holders.place(request.rid, now)
                freed |= self.wave.ended(request.rid)
            else:
                self._token(request, steps, first, last)
            if request.made >= request.output:
                del instance.running[request.rid]
                instance.holders.release(request.rid)
                self._left -= 1
        if self._copies:
            self._copy(instance)
        if freed and self.held:
            self._place_held()

    def _token(self, request: Request, count: int, first: float, last: float) -> None:
        """Tokens that a client has already are not sent again."""
        request.made += count
        fresh = request.made - request.seen
        if fresh <= 0:
            return
        at = first + (last - first) * (count - fresh) / max(1, count - 1)
        if request.waits_since is not None:
            request.paused_s = max(request.paused_s, at - request.waits_since)
            request.waits_since = None
        request.first_at = min(request.first_at, at)
        request.seen, request.last_at = request.made, last


def poisson(rate: float, seconds: float, lengths: Sequence[tuple[int, int]], seed: int) -> list[Request]:
    """Requests with lengths (prompt, output) drawn from real ones. The same arguments give the same requests."""
    random = np.random.default_rng(seed)
    found: list[Request] = []
    at = 0.0
    while (at := at + float(random.exponential(1.0 / rate))) < seconds:
        prompt, output = lengths[int(random.integers(len(lengths)))]
        found.append(Request(len(found), at, max(1, prompt), max(1, output)))
    return found
