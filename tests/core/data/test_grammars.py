"""Grammars followed by the real library, over the demo model's tokens: a mask is a function of the token log."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from controlplane.contract.requests import GRAMMAR_BYTES_MAX
from controlplane.grammar import Compiler, GrammarError, load_compiler
from dataplane import grammars as grammars_module
from dataplane.core.rules import Rule
from dataplane.demo import model_dir
from dataplane.grammars import COMPILED_MAX, Grammars

VOCAB, WORDS, ENDS = 2048, 64, (1, 2)
LIMIT_S = 20.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["first", "second", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "more": {"$ref": "#/$defs/leaf"},
    },
    "required": ["name", "kind", "sizes", "more"],
    "additionalProperties": False,
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        }
    },
}
GRAMMARS = {
    "schema": json.dumps(
        {"grammars": [{"json_schema": SCHEMA | {"x-guidance": {"whitespace_flexible": False}}}]}
    ),
    "choice": 'start: "yes" | "no" | "perhaps"',
    "regex": r"start: /[a-c]{2,5}(é|日本)?-[0-9]+x/",
}


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return load_compiler(model_dir(), VOCAB, ENDS)


@pytest.fixture
def grammars(compiler: Compiler) -> Iterator[Grammars]:
    made = Grammars(compiler, 2)
    yield made
    made.close()


def begin(grammars: Grammars, text: str, output: list[int], slot: int = 0, masks: Any = None) -> Rule:
    rule = Rule(np.zeros((4, WORDS), np.int32) if masks is None else masks, slot)
    grammars.begin(rule, text, output)
    return rule


def settled(*rules: Rule) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not all(rule.settled for rule in rules):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def allowed(rule: Rule) -> list[int]:
    bits = np.unpackbits(rule.masks[rule.slot].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(
    grammars: Grammars, text: str, seed: int, tokens_max: int = 400
) -> tuple[list[int], list[list[int]]]:
    """An output drawn evenly of what is allowed, until it ends, and what was allowed at each place."""
    rng, rule = random.Random(seed), begin(grammars, text, [])
    settled(rule)
    log: list[int] = []
    masks = []
    while not set(log[-1:]) & set(ENDS):
        assert rule.error == ""
        masks.append(allowed(rule))
        log.append(rng.choice(masks[-1]))
        grammars.advance([(rule, log[-1])])
        grammars.settle()
        assert len(log) < tokens_max
    return log, masks


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_is_a_function_of_the_log(grammars: Grammars, name: str, seed: int) -> None:
    """Whoever takes over at any token finds the mask that the one before would have had."""
    log, masks = walk(grammars, GRAMMARS[name], seed)
    rules = [begin(grammars, GRAMMARS[name], log[:at]) for at in range(len(log))]
    settled(*rules)
    assert [allowed(rule) for rule in rules] == masks
    for at in range(0, len(log), 5):  # and goes on as the one before
        rule = rules[at]
        for token, mask in zip(log[at:], [*masks[at + 1 :], None], strict=True):
            grammars.advance([(rule, token)])
            grammars.settle()
            assert mask is None or allowed(rule) == mask


@pytest.mark.parametrize("seed", range(20))
def test_what_ends_is_of_the_schema(grammars: Grammars, seed: int) -> None:
    log, masks = walk(grammars, GRAMMARS["schema"], seed)
    text = Tokenizer.from_file(str(model_dir() / "tokenizer.json")).decode(log[:-1])
    document = json.loads(text)
    assert list(document) == ["name", "kind", "sizes", "more"]
    assert len(document["name"]) <= 12
    assert document["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
    assert all(isinstance(size, int) and 0 <= size <= 99 for size in document["sizes"])
    assert document["more"] in ({"on": True}, {"on": False})
    assert masks[-1] == list(ENDS), "nothing may follow but an end"
    assert all(not set(mask) & set(ENDS) for mask in masks[:-1]), "it might have ended before"


def test_rows_of_a_step_advance_together_in_several_tables(grammars: Grammars) -> None:
    tables = [np.zeros((4, WORDS), np.int32) for _ in range(2)]
    rules = [begin(grammars, GRAMMARS["regex"], [], slot, table) for table in tables for slot in range(4)]
    settled(*rules)
    for _ in range(2):
        grammars.advance([(rule, 70 + slot % 3) for slot, rule in enumerate(rules)])  # a, b, c
    grammars.settle()
    again = [begin(grammars, GRAMMARS["regex"], [70 + slot % 3] * 2) for slot in range(8)]
    settled(*again)
    assert [allowed(rule) for rule in rules] == [allowed(rule) for rule in again]


def test_a_token_out_of_place_ends_that_request_alone(grammars: Grammars) -> None:
    table = np.zeros((4, WORDS), np.int32)
    wrong, right = (begin(grammars, GRAMMARS["choice"], [], slot, table) for slot in range(2))
    settled(wrong, right)
    token = allowed(right)[0]
    grammars.advance([(wrong, 6), (right, token)])
    grammars.settle()
    assert wrong.error
    assert right.error == ""
    other = begin(grammars, GRAMMARS["choice"], [token])
    settled(other)
    assert allowed(right) == allowed(other)
    grammars.advance([(wrong, token), (right, allowed(right)[0])])  # nothing more comes of it
    grammars.settle()
    assert right.error == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("start: nothing", 'unknown name: "nothing"'),
        ('{"grammars": [{"json_schema": {"not": {}}}]}', 'Unimplemented keys: ["not"]'),
        ('{"grammars": [{"json_schema": {"type": "array", "uniqueItems": true}}]}', "uniqueItems"),
        ('{"grammars": 5}', "invalid type"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_an_error_of_its_request(
    grammars: Grammars, text: str, why: str
) -> None:
    bad = begin(grammars, text, [])
    good = begin(grammars, GRAMMARS["choice"], [])
    settled(bad, good)
    assert why in bad.error
    assert bad.error
    assert "\n" not in bad.error
    assert good.ready
    again = begin(grammars, text, [])
    settled(again)
    assert again.error == bad.error


LONGEST = GRAMMAR_BYTES_MAX // 8
CHAINS = {
    "rules": lambda n: "start:r0\n" + "\n".join(f"r{i}:r{i + 1}" for i in range(n)) + f'\nr{n}:"x"',
    "terminals": lambda n: "start:T0\n" + "\n".join(f"T{i}:T{i + 1}" for i in range(n)) + f'\nT{n}:"x"',
    "references": lambda n: schema_of(
        {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(n)} | {str(n): {}}
    ),
    "properties": lambda n: schema_of(
        {str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(n)}
        | {str(n): {}}
    ),
    "choices": lambda n: schema_of(
        {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}, {"type": "null"}]} for i in range(n)} | {str(n): {}}
    ),
}


def schema_of(definitions: dict[str, Any]) -> str:
    schema = {"$ref": "#/$defs/0", "$defs": definitions}
    return json.dumps({"grammars": [{"json_schema": schema}]}, separators=(",", ":"))


@pytest.mark.parametrize("kind", CHAINS)
def test_the_longest_chain_of_references_ends_no_process(grammars: Grammars, kind: str) -> None:
    """As many as the text that is taken may have: each is a call within the last one."""
    count = LONGEST
    while len(text := CHAINS[kind](count)) > GRAMMAR_BYTES_MAX:
        count -= max(1, (len(text) - GRAMMAR_BYTES_MAX) // 64)
    rule = begin(grammars, text, [])
    settled(rule)
    if rule.ready and (tokens := allowed(rule)):
        grammars.advance([(rule, tokens[0])])
        grammars.settle()


def test_a_log_that_is_not_of_the_grammar_is_an_error(grammars: Grammars) -> None:
    rule = begin(grammars, GRAMMARS["choice"], [6, 6])
    settled(rule)
    assert rule.error


def test_a_slow_grammar_holds_up_neither_masks_nor_others(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is compiled, once for all who brought it."""
    compile_now, go = grammars._compiler.compile, threading.Event()
    compiled: list[str] = []

    def slowly(text: str) -> Any:
        compiled.append(text)
        if text == GRAMMARS["schema"]:
            assert go.wait(LIMIT_S)
        return compile_now(text)

    monkeypatch.setattr(grammars._compiler, "compile", slowly)
    slow = begin(grammars, GRAMMARS["schema"], [])
    other = begin(grammars, GRAMMARS["choice"], [])
    settled(other)
    grammars.advance([(other, allowed(other)[0])])
    grammars.settle()
    assert not slow.settled
    more = begin(grammars, GRAMMARS["schema"], [])
    go.set()
    settled(slow, more)
    assert compiled == [GRAMMARS["schema"], GRAMMARS["choice"]]
    assert allowed(slow) == allowed(more)


def test_a_closed_rule_writes_no_mask(grammars: Grammars) -> None:
    """Its slot may be another request's by now."""
    table = np.zeros((4, WORDS), np.int32)
    rule = begin(grammars, GRAMMARS["choice"], [], 0, table)
    settled(rule)
    rule.closed = True
    table[:] = 0
    grammars.advance([(rule, allowed(begin_and_wait(grammars))[0])])
    grammars.settle()
    assert not table.any()


def begin_and_wait(grammars: Grammars) -> Rule:
    rule = begin(grammars, GRAMMARS["choice"], [])
    settled(rule)
    return rule


def test_what_is_kept_compiled_is_bounded(grammars: Grammars) -> None:
    settled(*(begin(grammars, f'start: "{number}"', []) for number in range(COMPILED_MAX + 40)))
    assert len(grammars._compiled) == COMPILED_MAX
    long = "x" * 200_000  # a comment: it has the length of a grammar and takes no time
    for number in range(40):
        settled(begin(grammars, f'start: "x" // {number} {long}', []))
    assert sum(size for size, _ in grammars._compiled.values()) <= 4 << 20


def test_a_panic_at_a_step_costs_who_caused_it(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.zeros((4, WORDS), np.int32)
    bad, good = (begin(grammars, GRAMMARS["choice"], [], slot, table) for slot in range(2))
    settled(bad, good)
    fill = grammars_module.fill_next_token_bitmask_par

    def panics(executor: Any, places: Any, masks: Any) -> None:
        if any(slot == bad.slot for _, slot in places):
            raise KeyboardInterrupt("index out of bounds")
        fill(executor, places, masks)

    monkeypatch.setattr(grammars_module, "fill_next_token_bitmask_par", panics)
    token = allowed(good)[0]
    grammars.advance([(bad, token), (good, token)])
    grammars.settle()
    assert "index out of bounds" in bad.error
    assert good.error == ""
    monkeypatch.undo()
    settled(other := begin(grammars, GRAMMARS["choice"], [token]))
    assert allowed(good) == allowed(other)


def test_a_panic_of_the_library_costs_its_request(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Panic(BaseException):
        pass

    def panic(_text: str) -> Any:
        raise Panic("index out of bounds")

    compile_now = grammars._compiler.compile
    monkeypatch.setattr(grammars._compiler, "compile", panic)
    bad = begin(grammars, GRAMMARS["choice"], [])
    settled(bad)
    assert "index out of bounds" in bad.error
    monkeypatch.setattr(grammars._compiler, "compile", compile_now)
    settled(good := begin(grammars, GRAMMARS["regex"], []))
    assert good.ready


@pytest.mark.parametrize(
    ("tokenizer", "ends", "why"),
    [("{}", ENDS, "tokenizer"), (None, (), "no token that ends"), (None, (9999,), "tokenizer")],
)
def test_a_tokenizer_that_cannot_be_used_says_so(
    tokenizer: str | None, ends: tuple[int, ...], why: str
) -> None:
    text = (model_dir() / "tokenizer.json").read_text() if tokenizer is None else tokenizer
    with pytest.raises(GrammarError, match=why):
        Compiler(text, VOCAB, ends)


def test_a_model_without_named_ends_has_its_tokenizers(compiler: Compiler) -> None:
    """As gateways have it: kevlar-demo's tokenizer_config.json names <|eos|>."""
    rule = begin(grammars := Grammars(load_compiler(model_dir(), VOCAB, ())), 'start: "a"?', [])
    settled(rule)
    assert 1 in allowed(rule)
    assert 2 not in allowed(rule)
    grammars.close()
