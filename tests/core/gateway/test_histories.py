"""Any history: what a client gets is a prefix, and each request ends at most once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.ids import Member
from controlplane.contract.requests import RefusalCode
from controlplane.contract.topology import Mode
from tests.core.gateway.routing import LENGTH, A, B, Bench, C, pipeline, right
from web.gateway.routing.events import CancelAsked, Fail, SendCancel, SendSubmit, StreamDown, StreamUp, Tick
from web.gateway.routing.policy import Policy

HEADS = (A, B, C)
MOVES = st.one_of(
    st.tuples(st.just("place"), st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 0, 1, 2])),
    st.tuples(st.just("up"), st.integers(0, 2)),
    st.tuples(st.just("down"), st.integers(0, 2)),
    st.tuples(st.just("emit"), st.integers(0, 2), st.integers(0, 1), st.integers(-1, 1)),
    st.tuples(st.just("refuse"), st.integers(0, 2), st.integers(0, 1), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.1, 0.7, 3.0])),
    st.tuples(st.just("cancel"), st.integers(1, 3)),
    st.tuples(st.just("replay"), st.integers(0, 2), st.integers(0, 1), st.integers(0, LENGTH - 1)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=60), st.sampled_from([Mode.REPLICATE, Mode.STOP_RESTART]))
def test_any_history_gives_prefixes(moves: list[tuple[object, ...]], mode: Mode) -> None:
    bench = Bench(replace(Policy(), deaths_max=1000))
    world = World(bench, mode)
    for rid in (1, 2, 3):
        bench.submit(rid)
    for move in moves:
        world.apply(move)
        world.check()
    # Let all be well again: every request that has not failed ends with the right tokens.
    world.apply(("place", 0, 1))
    for member in HEADS:
        bench.do(StreamUp(member))
    for _ in range(60):
        bench.do(Tick(), 0.05)
        world.apply(("emit", 0, 0, 0))
        world.apply(("emit", 1, 1, 0))
        world.check()
    for rid in (1, 2, 3):
        done = bench.streams.get(rid, []) == [right(rid, p).token for p in range(LENGTH)]
        assert done or rid in bench.failed or rid in world.cancelled
    assert bench.router.live == 0
    assert not bench.router.restless


class World:
    """Schedulers that do what Submit says, and a topology."""

    def __init__(self, bench: Bench, mode: Mode) -> None:
        self.bench = bench
        self.mode = mode
        self.epochs = {"p0": 1, "p1": 1}
        self.heads: dict[str, Member | None] = {"p0": A, "p1": B}
        self.cursor: dict[tuple[Member, str, int], int] = {}
        self.seen = 0
        self.cancelled: set[int] = set()
        bench.topology(pipeline("p0", A, 1), pipeline("p1", B, 1), mode=mode)
        bench.do(StreamUp(A))
        bench.do(StreamUp(B))

    def apply(self, move: tuple[object, ...]) -> None:
        bench = self.bench
        match move:
            case ("place", a, b):
                counter = bench.router.topology.counter + 1 if bench.router.topology else 1
                for name, where in (("p0", a), ("p1", b)):
                    head = HEADS[where] if isinstance(where, int) else None
                    if head != self.heads[name] or head is None:
                        self.heads[name], self.epochs[name] = head, counter
                parts = [pipeline(n, self.heads[n], self.epochs[n]) for n in ("p0", "p1")]
                bench.topology(*parts, mode=self.mode)
            case ("up", int(n)):
                bench.do(StreamUp(HEADS[n]))
            case ("down", int(n)):
                bench.do(StreamDown(HEADS[n]))
            case ("wait", float(seconds)):
                bench.do(Tick(), seconds)
            case ("cancel", int(rid)):
                self.cancelled.add(rid)
                bench.do(CancelAsked(rid))
            case ("refuse", int(n), int(p), int(rid)):
                code = RefusalCode.DROPPED if rid == 3 else RefusalCode.NOT_HERE
                bench.refuse(HEADS[n], f"p{p}", code, rid)
                self.cursor.pop((HEADS[n], f"p{p}", rid), None)
            case ("replay", int(n), int(p), int(position)):
                for rid in (1, 2, 3):
                    bench.tokens(HEADS[n], f"p{p}", self.epochs[f"p{p}"], position, rid=rid)
            case ("emit", int(n), int(p), int(shift)):
                self.emit(HEADS[n], f"p{p}", shift)
        self.read_effects()

    def emit(self, member: Member, name: str, shift: int) -> None:
        for (holder, of, rid), position in list(self.cursor.items()):
            if (holder, of) == (member, name) and position < LENGTH:
                self.cursor[holder, of, rid] = position + 1
                self.bench.tokens(member, name, self.epochs[name] + shift, position, rid=rid)
                self.read_effects()

    def read_effects(self) -> None:
        for effect in self.bench.effects[self.seen :]:
            if isinstance(effect, SendSubmit):
                key = (effect.member, effect.submit.pipeline, effect.submit.rid)
                self.cursor[key] = len(effect.submit.emitted)
            if isinstance(effect, SendCancel):
                self.cursor.pop((effect.member, effect.cancel.pipeline, effect.cancel.rid), None)
        self.seen = len(self.bench.effects)

    def check(self) -> None:
        for rid, tokens in self.bench.streams.items():
            assert tokens == [right(rid, p).token for p in range(len(tokens))]
        fails = [effect.rid for effect in self.bench.effects if isinstance(effect, Fail)]
        assert len(fails) == len(set(fails))
