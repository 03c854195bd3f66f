"""Whatever arrives, in whatever order: the stream is a gap-free, duplicate-free prefix of the right one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.requests import FinishReason, Sampling, Token
from web.gateway.routing.tokenlog import TokenLog, Verdict

LENGTH = 12


def right(position: int) -> Token:
    finish = FinishReason.LENGTH if position == LENGTH - 1 else None
    return Token(1, position, 100 + position * 7, finish=finish)


def log(fence: int = 3) -> TokenLog:
    return TokenLog(1, (1, 2), Sampling(max_tokens=LENGTH, seed=0), fence=fence)


@given(st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 6)), max_size=200))
def test_any_interleaving_yields_a_prefix(deliveries: list[tuple[int, int]]) -> None:
    stream = log()
    taken = []
    for position, epoch in deliveries:
        before = len(stream.emitted)
        verdict = stream.accept(right(position), epoch)
        if verdict is Verdict.NEXT:
            taken.append(position)
        assert (verdict is Verdict.STALE) == (epoch < 3)
        assert len(stream.emitted) == before + (verdict is Verdict.NEXT)
        assert verdict is not Verdict.MISMATCH
    assert taken == list(range(len(taken)))
    assert stream.emitted == [right(p).token for p in taken]
    assert (stream.finish is not None) == (len(taken) == LENGTH)


@given(st.permutations(range(LENGTH)), st.integers(0, 5))
def test_repeating_all_of_it_completes_the_stream(order: list[int], extra: int) -> None:
    stream = log()
    for _ in range(LENGTH + extra):
        for position in order:
            stream.accept(right(position), 3)
    assert stream.emitted == [right(p).token for p in range(LENGTH)]
    assert stream.outstanding == 0


def test_a_repeated_position_must_be_the_same() -> None:
    stream = log()
    assert stream.accept(right(0), 3) is Verdict.NEXT
    assert stream.accept(Token(1, 0, 5), 3) is Verdict.MISMATCH
    assert stream.accept(Token(1, 0, 5), 2) is Verdict.STALE
    assert stream.emitted == [right(0).token]


def test_fences() -> None:
    stream = log(fence=9)
    assert stream.accept(right(0), 8) is Verdict.STALE
    stream.rebase(2)  # another pipeline, whose last change was long ago
    assert stream.accept(right(0), 2) is Verdict.NEXT
    stream.raise_fence(5)
    stream.raise_fence(4)
    assert stream.accept(right(1), 4) is Verdict.STALE
    assert stream.accept(right(1), 7) is Verdict.NEXT  # its scheduler heard of epoch 7 before us
    assert stream.accept(right(2), 6) is Verdict.NEXT
    assert stream.accept(right(3), 4) is Verdict.STALE


def test_nothing_follows_the_last_token() -> None:
    stream = log()
    stream.accept(Token(1, 0, 5, finish=FinishReason.STOP), 3)
    assert stream.accept(right(1), 3) is Verdict.DUPLICATE
    assert stream.emitted == [5]
