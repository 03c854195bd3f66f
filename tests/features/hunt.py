"""When a fault comes: so that in few runs each place is hit once.

A place is a choice, a number of tokens that it has, and the stage that dies then. All choices of a run are hit
together, each at its own number of tokens, so places are counted and not planned. With drafts several tokens come in
one result, and there is no moment at which a choice has all but the last of them: those places are not reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Mapping
from functools import partial

from tests.features.cells import STAGES, Fault
from tests.features.line import Line

Place = tuple[int, int, int]  # a stage (0 where only the moment counts), the seed of a choice, tokens
SHARE_FIRST, SHARE_LAST = 0.8, 0.02  # of the choices that have places left, how many a strike has to bring
RUNS_MAX = 8  # times as many as the longest answer has tokens


class Hunt:
    """Strikes of the runs of one cell."""

    def __init__(self, fault: Fault, tokens: Mapping[int, int]) -> None:
        """`tokens`: of each choice, by its seed."""
        self._fault = fault
        stages = range(STAGES if fault is Fault.KILL else 1)
        self._left = {(s, seed, n) for s in stages for seed, count in tokens.items() for n in range(count)}
        self.wanted = len(self._left)
        self._runs, self._runs_max = 0, RUNS_MAX * max(tokens.values(), default=0)
        self._share = SHARE_FIRST
        self._stages: list[int] = []  # that are still to be hit in this run
        self._struck: list[str] = []

    def goes_on(self) -> bool:
        """Called before each run."""
        if self._runs and not self._struck:
            self._share /= 2
        return bool(self._left) and self._share > SHARE_LAST and self._runs < self._runs_max

    def open(self, seeds: Container[int]) -> bool:
        """Whether one of these choices has places left."""
        return any(seed in seeds for _, seed, _ in self._left)

    @property
    def hit(self) -> int:
        return self.wanted - len(self._left)

    @property
    def copies(self) -> bool:
        """Whether nodes have copies of each other's KV in this run."""
        return self._fault is Fault.MOVE or self._runs // 2 % 2 == 0

    @property
    def said(self) -> str:
        """What happened in this run, in words."""
        return f"run {self._runs}: " + (", ".join(self._struck) or "nothing happened")

    def begin(self, line: Line) -> None:
        self._runs += 1
        self._struck = []
        self._stages = list(range(STAGES)) if self._fault is Fault.KILL else [0]
        line.looks = partial(self._look, line)

    def _look(self, line: Line, had: dict[int, int]) -> None:
        by_gain = sorted(((len(self._places(stage, had)), -stage) for stage in self._stages), reverse=True)
        if not by_gain or by_gain[0][0] < max(1.0, self._share * self._open(-by_gain[0][1])):
            return
        stage = -by_gain[0][1]
        self._stages.remove(stage)
        self._left -= self._places(stage, had)
        self._struck.append(f"{self._what(stage)} at token {max(had.values(), default=0)}")
        # At once: a token that the scheduler knows is lost with it. Or when it is on its way.
        act = partial(self._act(line), stage)
        if self._fault is Fault.KILL and self._runs % 2:
            act()
        else:
            asyncio.get_running_loop().call_soon(act)

    def _places(self, stage: int, had: dict[int, int]) -> set[Place]:
        return {(stage, seed, count) for seed, count in had.items()} & self._left

    def _open(self, stage: int) -> int:
        """Choices that have places left."""
        return len({seed for s, seed, _ in self._left if s == stage})

    def _act(self, line: Line) -> Callable[[int], None]:
        match self._fault:
            case Fault.KILL:
                return line.kill
            case Fault.MOVE:
                return lambda _: line.move(self._runs % STAGES)
            case Fault.GATEWAY:
                return lambda _: line.end_gateway(kindly=self._runs % 2 == 1)

    def _what(self, stage: int) -> str:
        match self._fault:
            case Fault.KILL:
                return f"kill of stage {stage}, {'with' if self.copies else 'without'} copies"
            case Fault.MOVE:
                return f"move of stage {self._runs % STAGES}"
            case Fault.GATEWAY:
                return f"gateway {'told to stop' if self._runs % 2 else 'killed'}"
