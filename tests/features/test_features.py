"""A sample of `python -m tests.features`: some requests of one cell, under each fault, at a few tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.core.messages import Admit
from dataplane.core.request import Request, pack_tokens
from tests.features import record
from tests.features.cells import Cell, Engine, Fault, cells
from tests.features.outcome import Outcome, merged
from tests.features.play import Player, Result
from tests.features.requests import FEATURES, alone, pairs
from tests.features.schemas import Documents, schema_of, write
from tests.features.table import page

PLAYED = (
    (Engine(), Fault.KILL),
    (Engine(drafts="ngram"), Fault.KILL),
    (Engine(drafts="draft", cache="warm"), Fault.MOVE),
    (Engine(weights="int8"), Fault.GATEWAY),
)


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    with Player() as made:
        yield made


@pytest.mark.parametrize(("engine", "fault"), PLAYED)
def test_a_fault_changes_no_answer(player: Player, engine: Engine, fault: Fault) -> None:
    """Some requests with one feature or none, and some with two."""
    chance = random.Random(1414)
    some = [*chance.sample(alone(), 3), *chance.sample(pairs(), 4)]
    cell = Cell(engine, "sample", tuple(some), fault)
    result = player.play(cell, runs_max=3)
    assert result.problems == []
    assert result.indices > 0
    assert bool(result.drafts) or engine.drafts == "off"


def test_documents_of_random_schemas_are_valid() -> None:
    """A sample of `python -m tests.features.schemas`."""
    documents = Documents()
    write(range(5000, 5012), documents, tokens=160)
    assert documents.invalid == {}
    assert documents.whole >= 8


def test_an_invalid_document_is_found() -> None:
    documents = Documents()
    assert schema_of(1)["type"] == "object"
    for text in ('{"ok"', "[]"):
        choice = {"delta": {"content": text}, "finish_reason": "stop"}
        documents.add(len(documents.invalid), {"choices": {0: choice}})
    assert sorted(documents.invalid) == [0, 1]


def test_every_feature_is_played_alone_and_in_pairs() -> None:
    played = {asked.name for cell in cells() if cell.engine == Engine() for asked in cell.requests}
    assert played == {asked.name for asked in (*alone(), *pairs())}
    assert {feature.name for feature in FEATURES} < played
    assert len({cell.name for cell in cells()}) == len(cells())
    seeds = [seed for cell in cells()[:1] for asked in cell.requests for seed in asked.seeds]
    assert len(set(seeds)) == len(seeds)


def test_a_changed_token_is_found(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new scheduler is told of the log decides what comes."""
    asked = next(asked for asked in alone() if asked.name == "penalties")
    cell = Cell(Engine(), "one", (asked,), Fault.KILL)
    assert player.play(cell, runs_max=1).problems == []

    def forgetful(request: Request) -> Admit:
        """The stage is told that all of the log is prompt: penalties of frequency forget the output."""
        return Admit(request.rid, request.sampling, pack_tokens(request.ids), b"")

    monkeypatch.setattr(Request, "admit", forgetful)
    assert player.play(cell, runs_max=4).problems


def test_a_record_goes_on_where_it_ended(tmp_path: Path) -> None:
    file, first = tmp_path / "record", cells()[0].name
    record.begin(file)
    record.add(file, Result(first, runs=3, indices=9, indices_all=9))
    record.add(file, Result(cells()[1].name, problems=["regex, run 1: other"]))
    record.begin(file)
    record.add(file, Result(cells()[2].name, runs=5, indices=4, indices_all=9), cut=True)
    results = record.results(file)
    assert [cell.name for cell in record.missing(results)] == [cell.name for cell in cells()[1:]]
    assert cells()[2] not in record.missing(results, cut=True)
    text = page(results)
    assert "3 played, 2 passed, 1 of these to their end" in text
    assert "| plain | alone 1 (23) | passes: 9 of 9 |" in text
    assert "passes so far: 4 of 9" in text
    assert "- " + cells()[1].name + ": regex, run 1: other" in text
    file.write_text("something else")
    with pytest.raises(ValueError, match="name another file"):
        record.begin(file)


def test_deltas_are_put_together() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "go", "arguments": '{"a"'}}
    first = {"index": 0, "delta": {"content": "He", "tool_calls": [call]}, "finish_reason": None}
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    then = {"index": 0, "delta": {"content": " said", "tool_calls": [more]}, "finish_reason": "stop"}
    whole = merged(merged(None, first), then)
    assert whole["delta"]["content"] == "He said"
    assert whole["delta"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert whole["finish_reason"] == "stop"


def test_events_are_read_with_their_ids() -> None:
    outcome = Outcome()
    outcome.event('id: s.1\ndata: {"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": null}')
    outcome.event("event: reconnect\nretry: 100\ndata: {}")
    assert (outcome.last_id, outcome.done) == ("s.1", False)
    outcome.event("data: [DONE]")
    assert outcome.answer == {"choices": {0: {"index": 0, "delta": {"content": "a"}}}, "usage": None}
