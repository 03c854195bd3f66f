"""Phases of traced requests as spans: one a phase, whatever happens in whatever order, and pauses with their causes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.requests import FinishReason, Sampling, Submit, Token
from dataplane.core.spans import STEPS_MAX, TRACED_MAX, Span, Spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SAMPLING = Sampling(max_tokens=8, seed=1)


def submit(rid: int, trace: str = PARENT, emitted: tuple[int, ...] = ()) -> Submit:
    return Submit(rid, "p0", (1, 2, 3), SAMPLING, emitted, trace=trace)


def names(spans: list[Span]) -> list[str]:
    return [span.name for span in spans]


def test_a_request_has_a_span_for_each_phase_and_none_for_a_token() -> None:
    spans = Spans()
    spans.submitted(submit(1), 7, 10.0)
    (queue,), parents = spans.issued([1, 2], 11.0)
    assert (queue.name, queue.began, queue.ended, queue.parent) == ("queue", 10.0, 11.0, PARENT)
    assert parents == (PARENT,)
    assert spans.issued([1], 11.5) == ([], (PARENT,))  # the next chunk of its prompt
    (prefill,) = spans.delivered([Token(1, 0, 5, cached=2)], 12.0)
    assert (prefill.name, prefill.began, prefill.ended) == ("prefill", 11.0, 12.0)
    assert prefill.told["gen_ai.usage.input_tokens"] == 3
    assert prefill.told["gen_ai.usage.cache_read.input_tokens"] == 2
    assert spans.issued([1], 12.5) == ([], ())  # stages are told of prompts only
    assert spans.delivered([Token(1, 1, 5), Token(1, 2, 5)], 13.0) == []
    (decode,) = spans.delivered([Token(1, 3, 5, finish=FinishReason.LENGTH)], 14.0)
    assert (decode.name, decode.began, decode.ended) == ("decode", 12.0, 14.0)
    assert decode.told["gen_ai.usage.output_tokens"] == 4
    assert not spans


def test_a_long_prompt_has_a_bounded_number_of_steps() -> None:
    spans = Spans()
    spans.submitted(submit(1), 7, 10.0)
    told = [parents for _ in range(STEPS_MAX + 5) for parents in spans.issued([1], 11.0)[1]]
    assert told == [PARENT] * STEPS_MAX


def test_what_befell_a_pipeline_is_a_pause_until_the_next_token() -> None:
    spans = Spans()
    spans.submitted(submit(1), 7, 10.0)
    spans.issued([1], 10.0)
    spans.delivered([Token(1, 0, 5)], 11.0)
    spans.stopped("p1", "another one's", 11.1)
    spans.stopped("p0", "failure of p0", 11.2)
    spans.stopped("p0", "its scheduler asks", 11.3)
    spans.stopped("p0", "failure of p0", 11.4)
    assert spans.delivered([Token(1, 0, 5)], 11.5) == []  # told again: it is no news
    (pause,) = spans.delivered([Token(1, 1, 5)], 12.0)
    assert (pause.name, pause.began, pause.ended) == ("pause", 11.0, 12.0)
    assert pause.told["kevlarflow.cause"] == "failure of p0; its scheduler asks"
    assert spans.delivered([Token(1, 2, 5)], 13.0) == []


def test_a_stream_that_comes_from_elsewhere_goes_on_behind_what_its_client_has() -> None:
    spans = Spans()
    spans.submitted(submit(1, emitted=(8, 9)), 7, 1.0)
    (queue,), _ = spans.issued([1], 2.0)
    assert queue.told["kevlarflow.emitted_tokens"] == 2
    assert spans.delivered([Token(1, 0, 8), Token(1, 1, 9)], 3.0) == []
    assert names(spans.delivered([Token(1, 2, 5)], 4.0)) == ["prefill"]


def test_only_its_readers_word_ends_a_span_and_only_refusals_are_errors() -> None:
    spans = Spans()
    spans.submitted(submit(1), 7, 1.0)
    spans.submitted(submit(1), 8, 1.5)  # its client came back through another gateway
    assert spans.gone(1, "superseded", 2.0, session=7) == []
    (queue,) = spans.gone(1, "cancelled by its gateway", 2.0, session=8)
    assert (queue.began, queue.error, queue.told["kevlarflow.end"]) == (1.0, "", "cancelled by its gateway")
    spans.submitted(submit(2), 7, 3.0)
    (refused,) = spans.gone(2, "no room", 4.0, session=7, error=True)
    assert refused.error == "no room"
    assert spans.gone(2, "no room", 4.0) == []


def test_what_is_not_traced_costs_nothing_and_what_is_has_a_bound() -> None:
    spans = Spans()
    spans.submitted(submit(1, trace=""), 7, 1.0)
    assert not spans
    for rid in range(TRACED_MAX + 3):
        spans.submitted(submit(rid), 7, 1.0)
    assert spans.left_out == 3
    assert len(spans.ended("p0", "scheduled elsewhere", 2.0)) == TRACED_MAX
    assert not spans


EVENTS = st.lists(st.tuples(st.sampled_from("sitxcge"), st.integers(0, 2)), max_size=60)


@given(EVENTS)
def test_phases_follow_each_other_without_a_gap_whatever_happens(events: list[tuple[str, int]]) -> None:
    spans, told = Spans(), dict[int, list[Span]]()
    position = dict.fromkeys(range(3), 0)
    for at, (kind, rid) in enumerate(events):
        now, found = float(at), list[Span]()
        parent = PARENT[:-3] + f"-{rid:02x}"
        match kind:
            case "s":
                spans.submitted(submit(rid, parent, (4,) * position[rid]), 7, now)
            case "i":
                found, _ = spans.issued([rid], now)
            case "t":
                found = spans.delivered([Token(rid, position[rid], 5)], now)
                position[rid] += 1
            case "x":
                found = spans.delivered([Token(rid, position[rid], 5, finish=FinishReason.STOP)], now)
                position[rid] += 1
            case "c":
                spans.stopped("p0", f"cause {at}", now)
            case "g":
                found = spans.gone(rid, "gone", now)
            case "e":
                found = spans.ended("p0", "elsewhere", now)
        for span in found:
            told.setdefault(int(span.parent[-2:], 16), []).append(span)
    for rid, its in told.items():
        assert all(span.began <= span.ended for span in its)
        phases = [span for span in its if span.name != "pause"]
        for before, after in itertools.pairwise(phases):
            assert before.ended <= after.began
            if after.name == "queue":
                continue  # it came again
            assert (before.name, after.name) in (
                ("queue", "prefill"),
                ("queue", "decode"),
                ("prefill", "decode"),
            )
            assert before.ended == after.began
        assert len(its) <= 4 * sum(event in (("s", rid), ("c", 0), ("c", 1), ("c", 2)) for event in events)
