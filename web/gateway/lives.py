"""What this gateway remembers of its requests' lives (pure): those that run, and the last ones that ended.

The dispatcher tells of what happens to a request, seldom: when it is sent, when tokens come after something befell it,
when the cluster changes. Nothing is done for a token of a stream that flows.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.lives import CAUSE_CHARS_MAX, PAUSES_MAX, PLACES_MAX, Life, Pause, Place
from controlplane.contract.topology import Pipeline, Topology, change_of
from controlplane.contract.trace_context import context_of, root_span

ENDED_MAX = 4096  # about a kilobyte each, and ten if it had a hard life
CHANGES_MAX = 256
FOUND_MAX = 16  # connections of one request
LOOK_BACK_S = 5.0  # what befalls a stream is known a while after its last token
SLOW_S = 1.0  # a wait that nothing explains is told from here on
LEFT = 499
UNKNOWN = "not known here: it came from another gateway"


@dataclass(slots=True)
class OpenLife:
    """A life while it is lived. Times are unix seconds; the request's own are after `began`."""

    lives: Lives | None
    request: str
    kind: str
    key: str
    model: str
    stream: bool
    resumed: bool
    rids: tuple[int, ...]
    prompt_tokens: int
    began: float
    sent_s: float | None = None
    first_token_s: float | None = None
    places: list[Place] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    left_out: int = 0
    pause_max_s: float = 0.0
    finishes: dict[int, str] = field(default_factory=dict)
    failed: str = ""
    trace: str = ""
    status: int = 0

    @property
    def example(self) -> dict[str, str] | None:
        """What leads from a value of a histogram to the trace; None: nobody keeps it. Without a client that has one a
        trace is kept where this gateway makes it."""
        if not self.trace and not (self.lives is not None and self.lives.traces):
            return None
        context = context_of(self.request, self.trace)
        kept = context.sampled and bool(context.parent or (self.lives is not None and self.lives.traces))
        return {"trace_id": context.trace} if kept else None

    def first_token(self, after_s: float) -> None:
        """`after_s`: the request began."""
        if self.first_token_s is None:
            self.first_token_s = after_s

    def waited(self, choice: int, lasted_s: float, now: float) -> None:
        """A token came after so long; for those that waited `SLOW_S` or more."""
        last = next((pause for pause in reversed(self.pauses) if pause.choice == choice), None)
        if last is not None and now - self.began - last.at_s < lasted_s:
            return  # it is known, and why
        place = next((one for one in reversed(self.places) if one.choice == choice), None)
        pipeline, epoch = (place.pipeline, place.epoch) if place is not None else ("", 0)
        cause = "nothing befell it: its pipeline took so long"
        self.pause(
            Pause(round(now - self.began, 4), round(lasted_s, 4), choice, "slow", pipeline, epoch, cause)
        )

    def pause(self, pause: Pause) -> None:
        self.pause_max_s = max(self.pause_max_s, pause.lasted_s)
        if len(self.pauses) < PAUSES_MAX:
            self.pauses.append(pause)
        else:
            self.left_out += 1

    def place(self, place: Place) -> None:
        if self.sent_s is None:
            self.sent_s = place.at_s
        if len(self.places) < PLACES_MAX:
            self.places.append(place)
        else:
            self.left_out += 1

    def fail(self, status: int, message: str) -> None:
        """How it ends, unless something was said before."""
        if not self.status:
            self.status, self.failed = status, message[:CAUSE_CHARS_MAX]

    def open(self) -> None:
        """From now on what befalls its requests is told."""
        if self.lives is not None:
            self.lives.opened(self)

    def end(self, tokens: int, now: float) -> None:
        """Once is enough."""
        if self.lives is not None:
            self.lives.ended(self, tokens, now)
            self.lives = None

    def told(self, gateway: str, tokens: int = 0, lasted_s: float | None = None) -> Life:
        status, end = 0, ""
        if lasted_s is not None:
            known = bool(self.finishes) or self.resumed  # what had ended elsewhere does not end here again
            status = self.status or (200 if known else LEFT)
            end = (
                self.failed
                or ", ".join(dict.fromkeys(self.finishes.values()))
                or ("" if known else "cut off")
            )
        return Life(
            self.request, gateway, self.kind, self.key, self.model, self.stream, self.resumed, len(self.rids),
            self.prompt_tokens, self.began, self.sent_s, self.first_token_s, lasted_s, tokens, status, end,
            tuple(self.places), tuple(self.pauses), self.left_out, self.pause_max_s, self.trace,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """Something that befell a pipeline, or a scheduler."""

    at: float
    text: str
    pipeline: PipelineId | None = None
    member: Member | None = None


class Lives:
    """All of one gateway. Times are unix seconds."""

    def __init__(self, gateway: str = "", ended_max: int = ENDED_MAX) -> None:
        self.gateway = gateway
        self.listeners: list[Callable[[Life], None]] = []  # they hear of each that has ended
        self.traces = False  # whether one of them makes spans
        self._ended_max = ended_max
        self._open: dict[int, tuple[OpenLife, int]] = {}  # rid -> and which choice
        self._ended: OrderedDict[int, Life] = OrderedDict()
        self._by_request: dict[str, list[int]] = {}  # request -> numbers of _ended
        self._number = 0
        self._changes: deque[Change] = deque(maxlen=CHANGES_MAX)
        self._pipelines: dict[PipelineId, Pipeline] = {}

    # ---- requests

    def opened(self, life: OpenLife) -> None:
        for choice, rid in enumerate(life.rids):
            self._open[rid] = (life, choice)

    def ended(self, life: OpenLife, tokens: int, now: float) -> None:
        for rid in life.rids:
            # Else its client has come back.
            if (found := self._open.get(rid)) is not None and found[0] is life:
                del self._open[rid]
        told = life.told(self.gateway, tokens, round(now - life.began, 4))
        self._number += 1
        self._ended[self._number] = told
        self._by_request.setdefault(told.request, []).append(self._number)
        if len(self._ended) > self._ended_max:
            number, oldest = self._ended.popitem(last=False)
            numbers = self._by_request[oldest.request]
            numbers.remove(number)
            if not numbers:
                del self._by_request[oldest.request]
        for listener in self.listeners:
            listener(told)

    def turned_away(self, request: str, kind: str, key: str, status: int, now: float) -> None:
        """It never began. Why is not told: the words may have something of the request in them."""
        life = Life(request, self.gateway, kind, key, "", False, False, 0, 0, now, lasted_s=0.0)
        for listener in self.listeners:
            listener(msgspec.structs.replace(life, status=status, end="refused"))

    def example(self, rid: int) -> dict[str, str] | None:
        """See OpenLife."""
        found = self._open.get(rid)
        return found[0].example if found is not None else None

    def trace(self, rid: int) -> str:
        """For `Submit.trace`; "": nobody keeps its spans."""
        if (found := self._open.get(rid)) is None:
            return ""
        life, _ = found
        context = context_of(life.request, life.trace)
        span = root_span(life.request, self.gateway, life.began)
        return context.below(span) if context.sampled else ""

    def find(self, request: str) -> list[Life]:
        """The newest connections of a request, oldest first."""
        ended = [self._ended[number] for number in self._by_request.get(request, [])]
        running = {id(life): life for life, _ in self._open.values() if life.request == request}
        return [*ended, *(life.told(self.gateway) for life in running.values())][-FOUND_MAX:]

    # ---- what befalls them

    def sent(self, rid: int, member: Member, pipeline: PipelineId, now: float) -> None:
        """It goes to the scheduler of a pipeline."""
        if (found := self._open.get(rid)) is not None:
            life, choice = found
            life.place(
                Place(round(now - life.began, 4), choice, pipeline, member.node, self._epoch(pipeline))
            )

    def paused(self, rid: int, lasted_s: float, how: str, now: float) -> None:
        """The first tokens after something befell it have come."""
        if (found := self._open.get(rid)) is None:
            return
        life, choice = found
        mine = [place for place in life.places if place.choice == choice]
        pipeline = mine[-1].pipeline if mine else ""
        before = max(
            (life.began + one.at_s for one in life.pauses if one.choice == choice), default=life.began
        )
        since = max(life.began, now - lasted_s - LOOK_BACK_S)
        # What came before the last pause ended is that one's cause, unless there is nothing else.
        cause = self._cause(mine[-2:], max(since, before)) or self._cause(mine[-2:], since) or UNKNOWN
        at_s, epoch = round(now - life.began, 4), self._epoch(pipeline)
        life.pause(Pause(at_s, round(lasted_s, 4), choice, how, pipeline, epoch, cause[:CAUSE_CHARS_MAX]))

    def broke(self, member: Member, now: float) -> None:
        """The connection to a scheduler did."""
        text = f"the connection to the scheduler on {member.node} broke"
        self._changes.append(Change(now, text, member=member))

    def turned_down(self, member: Member, pipeline: PipelineId, why: str, now: float) -> None:
        """A scheduler gave a request up that it had accepted."""
        self._changes.append(
            Change(now, f"the scheduler on {member.node} gave it up: {why}", pipeline, member)
        )

    def topology(self, topology: Topology, now: float) -> None:
        """The newest one."""
        old, self._pipelines = self._pipelines, {one.id: one for one in topology.pipelines}
        for name, was in old.items():
            new = self._pipelines.get(name)
            if new is None or new.epoch != was.epoch:
                self._changes.append(Change(now, change_of(was, new), name))

    def _epoch(self, pipeline: PipelineId) -> int:
        found = self._pipelines.get(pipeline)
        return found.epoch if found is not None else 0

    def _cause(self, places: Sequence[Place], since: float) -> str:
        pipelines = {place.pipeline for place in places}
        nodes = {place.node for place in places}
        told = [
            change.text
            for change in self._changes
            if change.at >= since
            and (change.pipeline in pipelines or (change.member is not None and change.member.node in nodes))
        ]
        return "; ".join(dict.fromkeys(told))
