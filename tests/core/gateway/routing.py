"""A router, its clock and its streams, for the tests of it."""

from __future__ import annotations

from typing import TypeVar

from controlplane.contract.ids import Member
from controlplane.contract.requests import FinishReason, RefusalCode, Refused, Sampling, Submit, Token, Tokens
from controlplane.contract.topology import Mode, Move, Pipeline, Stage, Topology
from web.gateway.routing.events import (
    Deliver,
    Effect,
    Event,
    Fail,
    RefusalReceived,
    SendSubmit,
    StreamUp,
    SubmitAsked,
    TokensReceived,
    TopologySeen,
)
from web.gateway.routing.policy import Policy
from web.gateway.routing.router import Router

A, B, C, TAIL = (Member(name, "1") for name in "abct")
PROMPT = (5, 6, 7)
LENGTH = 8
E = TypeVar("E", bound=Effect)


def pipeline(name: str, head: Member | None, epoch: int, move: Move | None = None) -> Pipeline:
    ranks = (head,) if head else ()
    return Pipeline(name, epoch, (Stage(("h",), ranks), Stage(("t",), (TAIL,))), move)


def topology(counter: int, *pipelines: Pipeline, mode: Mode = Mode.REPLICATE) -> Topology:
    return Topology("default", counter, mode, pipelines)


class Bench:
    """A router, its clock, and everything it has asked for."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.router = Router(policy or Policy())
        self.now = 100.0
        self.effects: list[Effect] = []
        self.streams: dict[int, list[int]] = {}
        self.failed: dict[int, Fail] = {}

    def do(self, event: Event, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        effects = self.router.step(event, self.now)
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Deliver):
                self.streams.setdefault(effect.rid, []).extend(t.token for t in effect.tokens)
            if isinstance(effect, Fail):
                self.failed[effect.rid] = effect
        return effects

    def topology(self, *pipelines: Pipeline, mode: Mode = Mode.REPLICATE) -> list[Effect]:
        counter = (self.router.topology.counter if self.router.topology else 0) + 1
        return self.do(TopologySeen(topology(counter, *pipelines, mode=mode)))

    def two_up(self) -> None:
        self.topology(pipeline("p0", A, 1), pipeline("p1", B, 1))
        self.do(StreamUp(A))
        self.do(StreamUp(B))

    def submit(
        self, rid: int = 1, max_tokens: int = LENGTH, prompt: tuple[int, ...] = PROMPT
    ) -> list[Effect]:
        return self.do(SubmitAsked(rid, prompt, Sampling(max_tokens, seed=0)))

    def tokens(
        self, member: Member, name: str, epoch: int, *positions: int, rid: int = 1, add: int = 0
    ) -> list[Effect]:
        items = tuple(right(rid, position, add) for position in positions)
        return self.do(TokensReceived(member, Tokens(name, epoch, items)))

    def refuse(self, member: Member, name: str, code: RefusalCode, rid: int = 1) -> list[Effect]:
        return self.do(RefusalReceived(member, Refused(rid, name, code, "no", 3.0)))

    def poison(self, member: Member, name: str, node: str, rid: int = 1) -> list[Effect]:
        refused = Refused(rid, name, RefusalCode.POISONED, "no", node=node)
        return self.do(RefusalReceived(member, refused))


def right(rid: int, position: int, add: int = 0) -> Token:
    finish = FinishReason.LENGTH if position == LENGTH - 1 else None
    return Token(rid, position, rid * 1000 + position * 3 + add, finish=finish)


def only(effects: list[Effect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(effects: list[Effect]) -> list[tuple[Member, Submit]]:
    return [(effect.member, effect.submit) for effect in only(effects, SendSubmit)]
