"""What a scheduler has asked the stages of its pipeline: how much KV they hold of which requests."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.contract.ids import PipelineId
from controlplane.contract.repair import Computing
from dataplane.core.events import Ask
from dataplane.core.messages import Fence, HeldMeta, RejoinMeta
from dataplane.core.recovery import HeldCollector
from dataplane.core.request import Request

UNKNOWN = Computing()
OPEN_MAX = 8  # questions about re-submitted requests at a time: all that come meanwhile share the next one


class Questions:
    """Those of one fence: `void` ends them all."""

    def __init__(self, pipeline: PipelineId, num_stages: int) -> None:
        self.open: dict[int, HeldCollector] = {}
        self.joining: list[int] = []  # re-submitted requests that are not asked about yet
        self._pipeline = pipeline
        self._stages = num_stages
        self._next = 0

    def __len__(self) -> int:
        return len(self.open)

    @property
    def adopting(self) -> bool:
        """Whether requests wait for an answer to go on."""
        return any(question.adopts for question in self.open.values())

    def ask(
        self,
        fence: Fence,
        requests: Sequence[Request],
        now: float,
        *,
        complete: bool = False,
        adopts: bool = True,
        kept: bool = False,
        computing: Computing = UNKNOWN,
    ) -> Ask:
        """Of every stage; see RejoinMeta and HeldCollector."""
        number, self._next = self._next, self._next + 1
        rids = tuple(request.rid for request in requests)
        self.open[number] = HeldCollector(number, rids, set(range(self._stages)), now, adopts)
        names = tuple(b"".join(request.names) for request in requests)
        return Ask(RejoinMeta(self._pipeline, fence, number, rids, complete, names, kept, adopts, computing))

    def next_joining(self) -> list[int]:
        """The re-submitted requests that are to be asked about now."""
        if len(self.open) >= OPEN_MAX:
            return []
        joining, self.joining = self.joining, []
        return joining

    def answer(self, meta: HeldMeta, now: float) -> tuple[HeldCollector | None, list[int]]:
        """A stage's answer: its question, if that is open, and the requests of which every stage has been heard now.
        A stage that will say more is waited for anew."""
        question = self.open.get(meta.ask)
        if question is None:
            return None, []
        heard = question.answer(meta.stage, meta.held, meta.kept, meta.more)
        if question.complete:
            del self.open[meta.ask]
        elif meta.more:
            question.since = now
        return question, heard

    def gone(self, names: Sequence[bytes]) -> None:
        """Stages are told to keep these no longer, or one has said that it does not: an answer may still name them, one
        that is on its way or that a stage gives once it has restored other blocks."""
        for question in self.open.values():
            question.gone.update(names)

    def void(self) -> None:
        self.open.clear()
        self.joining.clear()

    def oldest(self, now: float) -> float:
        """When the one that has been waited for longest was asked; `now` if there is none."""
        return min((question.since for question in self.open.values()), default=now)

    def waited_for(self) -> HeldCollector | None:
        """Of those that requests wait for, the oldest."""
        adopting = [question for question in self.open.values() if question.adopts]
        return min(adopting, key=lambda question: question.since, default=None)
