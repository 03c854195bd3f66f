"""Which scheduler runs which request, and what to do when that changes: `step(event, now) -> effects` (pure).

The router holds every live token log. It reacts to the state of the world and not to single events: a request that is
with no scheduler is brought to where it should be (`_settle`), held, or failed, when its time has come or the world has
changed. Nothing is sent that would not be right to send twice: a Submit carries the whole log.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import assert_never

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.requests import Cancel, FinishReason, RefusalCode, Refused, Submit, Token
from controlplane.contract.topology import HOLDER_MODES, Mode, Pipeline, Topology, switched
from web.gateway.routing.balance import LOOKED_AT, Loads
from web.gateway.routing.events import (
    CancelAsked,
    CloseStream,
    Closing,
    Deliver,
    Effect,
    Event,
    Fail,
    FailCode,
    LeaveAsked,
    OpenStream,
    RecallAsked,
    RecallDone,
    RecalledReceived,
    RefusalReceived,
    SendCancel,
    SendSubmit,
    ShutDown,
    StreamDown,
    StreamUp,
    SubmitAsked,
    Tick,
    TokensReceived,
    TopologySeen,
)
from web.gateway.routing.full_pipelines import TRIES_MAX, FullPipelines
from web.gateway.routing.health import troubles
from web.gateway.routing.held_requests import Held
from web.gateway.routing.live_request import LiveRequest
from web.gateway.routing.policy import Policy
from web.gateway.routing.recall import Recalls
from web.gateway.routing.recovery import Recoveries, Wave
from web.gateway.routing.tokenlog import TokenLog, Verdict

TOLD_MAX = 4096
ROUNDING_S = 1e-6  # so that a span of time is over when it is looked at


class Router:
    """All requests of one gateway. Not thread-safe; one per event loop."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.topology: Topology | None = None
        self.counts: Counter[str] = Counter()  # monotonic, by kind: exported as metrics
        self._live: dict[int, LiveRequest] = {}
        self._held = Held()  # those of _live that are with no scheduler
        self._placed: dict[
            Member, dict[int, LiveRequest]
        ] = {}  # ... and the others, by the scheduler that has them
        self._loads = Loads()
        self._again: dict[int, LiveRequest] = {}  # those that wait to ask for missing tokens
        self._pipelines: dict[PipelineId, Pipeline] = {}
        # Those that new requests may go to and that can be reached; None: to be listed anew.
        self._reached: list[Pipeline] | None = None
        # Those that requests may go to, reached or not: one that is closing only if there is no other.
        self._open: frozenset[PipelineId] = frozenset()
        self._full = FullPipelines()
        self._streams: dict[Member, bool] = {}  # wanted streams: is it up?
        self._recalls = Recalls()
        self._wave = Wave()
        self._recoveries: Recoveries | None = None  # where interrupted requests have holders of their own
        self.pipelines_up = 0
        self._down_since: float | None = None  # None: a pipeline is up, or none ever was
        self.closing = False
        self._told: dict[int, None] = {}  # rids whose end was told to a scheduler, newest last, bounded

    @property
    def live(self) -> int:
        return len(self._live)

    def context_of(self, rid: int) -> bytes | None:
        """What goes along with a request that is live; None: it is not, or nothing does."""
        live = self._live.get(rid)
        return live.context if live is not None else None

    @property
    def live_max(self) -> int:
        """Requests that this gateway takes: instances may come while it runs."""
        return max(self.policy.live_max, self.policy.live_each * len(self._pipelines))

    @property
    def restless(self) -> bool:
        """Whether ticks are needed now."""
        return bool(self._held or self._again or self._recalls)

    @property
    def reachable(self) -> int:
        """Pipelines that are up and whose scheduler this gateway has a stream to."""
        return sum(self._reachable(p) for p in self._pipelines.values())

    def troubles(self, now: float) -> list[str]:
        """What is wrong with the service, in words; empty while every pipeline is as it should be."""
        if self.topology is None:
            return ["the topology has not been read from etcd yet"]
        return list(troubles(self._pipelines.values(), self._reachable, self._live.values(), now))

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at `now` (seconds, monotonic); the effects are to be performed in order."""
        out: list[Effect] = []
        match event:
            case TokensReceived():
                self._on_tokens(event, now, out)
            case SubmitAsked():
                self._on_submit(event, now, out)
            case CancelAsked():
                self._on_cancel(event, out)
            case LeaveAsked(rid):
                if self._forget(rid) is not None:
                    self._remember_told(rid)  # what still comes of it is not to be cancelled
            case RecallAsked(rid, limit_s):
                if len(self._recalls) < self.live_max:
                    self._recalls.begin(rid, now + limit_s)
                else:
                    out.append(RecallDone(rid, None, False))
            case RecalledReceived(member, recalled):
                self._recalls.answer(member, recalled)
            case RefusalReceived():
                self._on_refusal(event.member, event.refusal, now, out)
            case TopologySeen():
                self._on_topology(event.topology, now, out)
            case StreamUp():
                if event.member in self._streams:
                    self._streams[event.member] = True
                    self._recalls.changed(event.member, True)
                    self._wake()
            case StreamDown():
                self._on_stream_down(event.member, now)
            case Closing():
                self.closing = True
            case ShutDown():
                self.closing = True
                for rid in list(self._live):
                    self._fail(rid, FailCode.UNAVAILABLE, "the gateway is shutting down", out, retry_s=1)
            case Tick():
                pass
            case _:
                assert_never(event)
        if self._held:
            self._settle(now, out)
        if self._again:
            self._ask_again(now, out)
        if self._recalls:
            self._recalls.settle(now, out)
        return out

    # Events

    def _on_submit(self, event: SubmitAsked, now: float, out: list[Effect]) -> None:
        if self.closing:
            out.append(Fail(event.rid, FailCode.UNAVAILABLE, "the gateway is shutting down", 1))
        elif not self.pipelines_up and not self._just_down(now):
            out.append(Fail(event.rid, FailCode.UNAVAILABLE, "no pipeline is up: try again later", 1))
        elif len(self._live) >= self.live_max and event.rid not in self._live:
            text = f"this gateway has {self.live_max} requests in progress: try again later"
            out.append(Fail(event.rid, FailCode.OVERLOADED, text, 1))
        else:
            self._forget(event.rid)  # taken up again here: the new connection is the one that counts
            self._told.pop(event.rid, None)
            log = TokenLog(event.rid, event.prompt, event.sampling, list(event.emitted))
            how = "resumed" if event.resumed else ""
            live = LiveRequest(
                log,
                event.priority,
                now,
                held_since=now,
                how=how,
                context=event.context,
                reader=event.reader,
                came_at=now - event.reader_age_s,
            )
            home = self._pipelines.get(event.home) if event.home is not None else None
            if home is not None:
                live.pipeline = home.id
                log.rebase(home.epoch)
            self._live[event.rid] = live
            self._loads.count(live)
            self._held.put(live)

    def _just_down(self, now: float) -> bool:
        """Whether the last pipeline went down so short a time ago that new requests wait for its return, as those do
        that it had."""
        return self._down_since is not None and now - self._down_since < self.policy.grace_s

    def _on_cancel(self, event: CancelAsked, out: list[Effect]) -> None:
        live = self._forget(event.rid)
        if live is not None:
            self._send_cancel(live, out)

    def _on_topology(self, topology: Topology, now: float, out: list[Effect]) -> None:
        if self.topology is not None and topology.counter < self.topology.counter:
            return  # an old value, read again after a reconnect
        self.topology = topology
        fixed = topology.mode is Mode.FIXED_NEIGHBOUR
        self._recoveries = Recoveries(self._wave, fixed) if topology.mode in HOLDER_MODES else None
        self._wake()
        old, self._pipelines = self._pipelines, {p.id: p for p in topology.pipelines}
        were_up = self.pipelines_up
        self.pipelines_up = sum(p.scheduler is not None for p in topology.pipelines)
        if self.pipelines_up:
            self._down_since = None
        elif were_up:
            self._down_since = now
        up = [p for p in self._pipelines.values() if p.up]
        self._open = frozenset(p.id for p in up if not p.closing) or frozenset(p.id for p in up)
        hosts = {p.leader_at(0) for p in topology.pipelines} - {None}
        for member in sorted(m for m in hosts if m is not None and m not in self._streams):
            self._streams[member] = False
            self._recalls.changed(member, False)
            out.append(OpenStream(member))
        changed = {p for p in old if p not in self._pipelines or self._pipelines[p].epoch != old[p].epoch}
        for name in changed:
            self._full.has_room(name)
        for live in list(self._live.values()) if changed else ():
            if live.pipeline is not None and live.pipeline in changed:
                self._follow(live, old[live.pipeline], self._pipelines.get(live.pipeline), now, out)
        for member in sorted(m for m in self._streams if m not in hosts):
            del self._streams[member]
            self._recalls.changed(member, None)
            out.append(CloseStream(member))

    def _follow(
        self, live: LiveRequest, old: Pipeline, new: Pipeline | None, now: float, out: list[Effect]
    ) -> None:
        """Its pipeline is `new` now and was `old`, of another epoch."""
        lost = set(old.members()) - set(new.members() if new else ())
        planned = new is None or switched(old, new)  # None: its instance was taken out of service
        had, live.torn = live.sent_to is not None or live.torn, False
        if had and lost and not planned and not live.log.emitted:
            live.deaths += 1
            if live.deaths >= self.policy.deaths_max:
                self.counts["quarantined"] += 1
                text = f"{live.deaths} nodes died in this request's first step: it is not tried again"
                self._send_cancel(live, out)
                return self._fail(live.log.rid, FailCode.QUARANTINED, text, out)
        if new is not None and new.scheduler != live.sent_to:
            # One that goes on has sent its tokens in order, and would send the same again if we refused them.
            live.log.raise_fence(new.epoch)
        if live.sent_to is None:
            if new is not None and new.scheduler != old.scheduler:
                live.retry_at = 0.0  # the one that sent it away has no say any more
            return None
        if new is None or new.scheduler != live.sent_to:
            self._hold(live, now, "resubmitted")
        else:
            live.how = live.how or "continued"
        return None

    def _on_stream_down(self, member: Member, now: float) -> None:
        if member not in self._streams:
            return
        # Nobody who waits gains by it: those that it had are looked at, and the others when their time has come.
        self._streams[member] = False
        self._reached = None
        self._recalls.changed(member, False)
        for live in list(self._placed.get(member, {}).values()):
            self._hold(live, now, "resubmitted")
            live.torn = True

    def _on_refusal(self, member: Member, refusal: Refused, now: float, out: list[Effect]) -> None:
        live = self._live.get(refusal.rid)
        if live is None or live.sent_to != member or live.pipeline != refusal.pipeline:
            self.counts["stale_refusal"] += 1
            return
        match refusal.code:
            case RefusalCode.NOT_HERE:
                self.counts["not_here"] += 1
                self._hold(live, now, live.how)
                live.retry_at = now + self.policy.retry_s
            case RefusalCode.DROPPED:
                self.counts["dropped"] += 1
                self._hold(live, now, "resubmitted")
                live.torn = True
                live.retry_at = now + self.policy.retry_s  # the topology may be on its way to us
            case RefusalCode.OVERLOADED if live.log.emitted or live.how:
                # It was admitted once: it may wait or go elsewhere, but it is not turned away.
                self._hold(live, now, live.how)
                self._refused(live, refusal.pipeline, now)
                if self._refused_by_all(live):
                    live.full.clear()
                    live.retry_at = now + max(self.policy.retry_s, refusal.retry_after_s)
                else:
                    live.pipeline = live.last_member = None
                    self._loads.count(live)
            case RefusalCode.OVERLOADED:
                self._refused(live, refusal.pipeline, now)
                self._hold(live, now, "")
                live.pipeline = live.last_member = None
                self._loads.count(live)
                if self._refused_by_all(live) or self._tried_enough(live, now):
                    retry_s = max(1.0, refusal.retry_after_s)
                    self._fail(refusal.rid, FailCode.OVERLOADED, refusal.message, out, retry_s)
            case RefusalCode.POISONED:
                live.poisoned.add(refusal.node)
                if len(live.poisoned) >= self.policy.poisoned_max:
                    self.counts["quarantined"] += 1
                    self._fail(refusal.rid, FailCode.QUARANTINED, refusal.message, out)
                else:
                    self._hold(live, now, "resubmitted")
            case RefusalCode.INVALID:
                self._fail(refusal.rid, FailCode.INVALID, refusal.message, out)
            case RefusalCode.SUPERSEDED:
                self._on_superseded(live, refusal, now, out)
            case _:
                assert_never(refusal.code)

    def _refused(self, live: LiveRequest, pipeline: PipelineId, now: float) -> None:
        live.full.add(pipeline)
        self._full.refused(pipeline, live.tokens, live.log.sampling, now)

    def _refused_by_all(self, live: LiveRequest) -> bool:
        return len(live.full) >= len(self._open) and self._open <= live.full

    def _tried_enough(self, live: LiveRequest, now: float) -> bool:
        """Whether a new request has been refused so often that it does not ask those that are known to be full, and
        there are no others, nor any that cannot be reached yet."""
        if len(live.full) < TRIES_MAX or len(self._listed()) < len(self._open):
            return False
        return not any(self._fits(live, p) for p in self._full.maybe_open(live.tokens, now))

    def _on_superseded(self, live: LiveRequest, refusal: Refused, now: float, out: list[Effect]) -> None:
        if refusal.reader is not None and refusal.reader <= live.reader:
            # Of a Submit before the last one, which named an earlier reader.
            self.counts["stale_refusal"] += 1
        elif live.overtake(refusal, now):
            self.counts["overtaken"] += 1
            self._hold(live, now, live.how)
        else:
            self._fail(refusal.rid, FailCode.SUPERSEDED, refusal.message, out)

    def _on_tokens(self, event: TokensReceived, now: float, out: list[Effect]) -> None:
        member, pipeline, epoch = event.member, event.tokens.pipeline, event.tokens.epoch
        accepted: dict[int, list[Token]] = {}
        strangers: set[int] = set()
        for rid, holder in event.tokens.holders:
            known = self._live.get(rid)
            if known is not None and known.sent_to == member and known.pipeline == pipeline:
                known.holder = holder
        for item in event.tokens.items:
            live = self._live.get(item.rid)
            if live is None:
                strangers.add(item.rid)
                continue
            if live.sent_to != member or live.pipeline != pipeline:
                self.counts["wrong_member"] += 1
                continue
            if item.finish is FinishReason.ERROR:
                self._fail(item.rid, FailCode.ENGINE, "the engine ended this request with an error", out)
                continue
            match live.log.accept(item, epoch):
                case Verdict.NEXT:
                    accepted.setdefault(item.rid, []).append(item)
                case Verdict.DUPLICATE:
                    self.counts["duplicate"] += 1
                case Verdict.STALE:
                    self.counts["stale_epoch"] += 1
                    if item.position >= len(live.log.emitted):
                        self._miss(live)  # its scheduler thinks that we have it
                case Verdict.GAP:
                    self.counts["gap"] += 1
                    self._miss(live)
                case Verdict.MISMATCH:
                    self.counts["mismatch"] += 1
                    self._deliver(accepted.pop(item.rid, []), live, now, out)
                    self._send_cancel(live, out)
                    text = f"position {item.position} was computed again with another token"
                    self._fail(item.rid, FailCode.MISMATCH, text, out)
        for rid, tokens in accepted.items():
            if rid in self._live:
                self._deliver(tokens, self._live[rid], now, out)
        for rid in strangers - self._told.keys():
            self._tell(member, Cancel(rid, pipeline), out)

    def _deliver(self, tokens: list[Token], live: LiveRequest, now: float, out: list[Effect]) -> None:
        if not tokens:
            return
        gap_s = now - live.last_token_at if live.how else None
        if live.how:
            self.counts[f"recovered_{live.how}"] += 1
        out.append(Deliver(live.log.rid, tuple(tokens), gap_s, live.how))
        live.last_token_at, live.how, live.again_at, live.held_since = now, "", None, None
        live.may_overtake = False
        live.full.clear()
        self._ride_out(live)
        self._loads.count(live)
        if live.log.finish is not None:
            self._forget(live.log.rid)

    # Where requests are

    def _ride_out(self, live: LiveRequest) -> None:
        """It has been computed again where it is, or is not there any more: others may come in its place."""
        if self._wave.ended(live.log.rid):
            self._held.wake()

    def _wake(self) -> None:
        """The world has changed: whoever waits for it is looked at once this event has been taken in."""
        self._reached = None
        self._held.wake()

    def _hold(self, live: LiveRequest, now: float, how: str) -> None:
        """It is with no scheduler (any more)."""
        if live.sent_to is not None:
            # A scheduler that had it for a while had accepted it: only then does its grace start anew.
            if live.held_since is None or now - live.sent_at > 1.0:
                live.held_since = now
            self._take(live)
        if how == "resubmitted":
            live.may_overtake = False  # who had it did not refuse it, and may have accepted it
        live.retry_at, live.again_at, live.how = 0.0, None, how
        self._again.pop(live.log.rid, None)
        self._held.put(live)

    def _take(self, live: LiveRequest) -> None:
        """From the scheduler that has it, if any."""
        if live.sent_to is not None:
            placed = self._placed[live.sent_to]
            del placed[live.log.rid]
            if not placed:
                del self._placed[live.sent_to]
            live.sent_to = None
            self._ride_out(live)

    def _miss(self, live: LiveRequest) -> None:
        """Tokens of a stream went missing: have them sent again, not more often than `again_s`."""
        live.may_overtake = False
        if live.again_at is None:
            live.again_at = live.asked_at + self.policy.again_s
        self._again[live.log.rid] = live

    def _ask_again(self, now: float, out: list[Effect]) -> None:
        for rid, live in list(self._again.items()):
            if live.again_at is None or live.sent_to is None:
                del self._again[rid]
            elif live.again_at <= now:
                live.asked_at, live.again_at = now, None
                self.counts["asked_again"] += 1
                out.append(SendSubmit(live.sent_to, self._submit(live, scratch=False)))
                del self._again[rid]

    def _settle(self, now: float, out: list[Effect]) -> None:
        """Bring held requests to where they should be, or fail them when their grace is over."""
        for live in self._held.due(now):
            held_s = now - (now if live.held_since is None else live.held_since)
            target = self._target(live, held_s, now) if now >= live.retry_at else None
            if target is not None:
                self._send(live, target, now, out)
            elif held_s >= self.policy.grace_s:
                text = f"no pipeline could run this request for {self.policy.grace_s:g} s"
                self._fail(live.log.rid, FailCode.UNAVAILABLE, text, out, retry_s=1)
            else:
                self._held.look(live, self._next_look(live, now))

    def _next_look(self, live: LiveRequest, now: float) -> float:
        """When time alone may change where a held request goes."""
        since = now if live.held_since is None else live.held_since
        policy = self.policy
        spans = (policy.move_after_s, policy.unreachable_s, policy.grace_s)
        moments = [live.retry_at, *(since + span + ROUNDING_S for span in spans)]
        return min((moment for moment in moments if moment > now), default=now + policy.retry_s)

    def _target(self, live: LiveRequest, held_s: float, now: float) -> Pipeline | None:
        """The pipeline that `live` should be sent to now; None: wait."""
        home = self._pipelines.get(live.pipeline) if live.pipeline is not None else None
        if home is not None and self._fit(live, home):
            if self._reachable(home):
                return home
            patience_s = self.policy.unreachable_s if home.up else self.policy.move_after_s
            if held_s < patience_s and (home.up or not (self._from_scratch or self._recoveries)):
                return None
        self._loads.drop(live)
        chosen = self._choose(live, held_s, now)
        self._loads.count(live)
        return chosen

    def _listed(self) -> list[Pipeline]:
        if self._reached is None:
            reached = [p for p in self._pipelines.values() if self._reachable(p)]
            self._reached = [p for p in reached if not p.closing] or reached
            self._full.among(self._reached)
        return self._reached

    def _choose(self, live: LiveRequest, held_s: float, now: float) -> Pipeline | None:
        def fits(pipeline: Pipeline) -> bool:
            return self._fits(live, pipeline)

        listed, places = self._listed(), self.policy.places
        if self._recoveries is not None and live.log.emitted:
            return self._recoveries.choose(live, listed, fits, self._loads, places, held_s)
        if len(live.full) >= TRIES_MAX:
            left = list(islice(filter(fits, self._full.maybe_open(live.tokens, now)), LOOKED_AT))
            if left:
                return self._loads.choose(left, fits, live, places)
        return self._loads.choose(listed, fits, live, places)

    def _send(self, live: LiveRequest, pipeline: Pipeline, now: float, out: list[Effect]) -> None:
        member = pipeline.scheduler
        assert member is not None
        if live.last_member is not None and live.pipeline != pipeline.id:
            self._send_cancel(live, out)
            live.how = "moved"
        scratch = self._from_scratch and live.last_member is not None and live.last_member != member
        if live.pipeline != pipeline.id:
            live.log.rebase(pipeline.epoch)
            live.holder = None
        self._take(live)
        live.pipeline, live.sent_to, live.last_member, live.sent_at = pipeline.id, member, member, now
        self._placed.setdefault(member, {})[live.log.rid] = live
        live.torn = False
        out.append(SendSubmit(member, self._submit(live, scratch)))
        self._held.pop(live.log.rid)
        self._loads.count(live)

    def _submit(self, live: LiveRequest, scratch: bool) -> Submit:
        assert live.pipeline is not None
        return Submit(
            rid=live.log.rid,
            pipeline=live.pipeline,
            prompt=live.log.prompt,
            sampling=live.log.sampling,
            emitted=() if scratch else tuple(live.log.emitted),
            priority=live.priority,
            admitted=bool(live.log.emitted or live.how),
            context=live.context,
            reader=live.reader,
        )

    def _send_cancel(self, live: LiveRequest, out: list[Effect]) -> None:
        """Tell whoever had it last, if it can still be told (a node that is gone needs no telling)."""
        if live.last_member is not None and live.pipeline is not None and self._streams.get(live.last_member):
            self._tell(live.last_member, Cancel(live.log.rid, live.pipeline), out)

    def _tell(self, member: Member, cancel: Cancel, out: list[Effect]) -> None:
        """Once is enough: what is on its way meanwhile is not answered with more of them."""
        out.append(SendCancel(member, cancel))
        self._remember_told(cancel.rid)

    def _remember_told(self, rid: int) -> None:
        self._told[rid] = None
        if len(self._told) > TOLD_MAX:
            del self._told[next(iter(self._told))]

    def _fail(self, rid: int, code: FailCode, message: str, out: list[Effect], retry_s: float = 0.0) -> None:
        live = self._forget(rid)
        if live is not None and code is FailCode.UNAVAILABLE:
            self._send_cancel(live, out)
        out.append(Fail(rid, code, message, retry_s))

    def _forget(self, rid: int) -> LiveRequest | None:
        self._held.pop(rid)
        self._again.pop(rid, None)
        live = self._live.pop(rid, None)
        if live is not None:
            if live.sent_to is not None and live.pipeline is not None:
                self._full.has_room(live.pipeline)
            self._take(live)
            self._loads.drop(live)
        return live

    def _fits(self, live: LiveRequest, pipeline: Pipeline) -> bool:
        return pipeline.id not in live.full and self._fit(live, pipeline)

    def _fit(self, live: LiveRequest, pipeline: Pipeline) -> bool:
        """Whether none of its nodes has spoilt this request's numbers before."""
        return not live.poisoned or live.poisoned.isdisjoint(m.node for m in pipeline.members())

    def _reachable(self, pipeline: Pipeline) -> bool:
        member = pipeline.scheduler
        return member is not None and self._streams.get(member, False)

    @property
    def _from_scratch(self) -> bool:
        return self.topology is not None and self.topology.mode is Mode.STOP_RESTART
