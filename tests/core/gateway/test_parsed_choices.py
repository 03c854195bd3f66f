"""Choices whose output is told apart: the same in any batches, with log probabilities, and taken up anywhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from controlplane.contract.requests import FinishReason, Token
from dataplane.demo import model_dir
from tests.core.gateway.test_parsers import KINDS, NAMES, TEXTS, WEATHER
from web.gateway.text.choice_decoder import ChoiceDecoder, Piece, TextRules
from web.gateway.text.output_format import output_format
from web.gateway.text.parsers.output import OutputRules, ToolFormat
from web.gateway.text.parsers.reasoning import MISTRAL_THINK, THINK

EOS = 1


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


def tokens_of(ids: list[int], finish: FinishReason) -> list[Token]:
    last = len(ids) - 1
    return [Token(7, k, i, -0.5, (), finish if k == last else None) for k, i in enumerate(ids)]


def run(
    tokens: list[Token],
    rules: TextRules,
    prompt: list[int],
    batch: int = 1,
    resume_at: int = -1,
    replayed: int = 3,
) -> tuple[Piece, ChoiceDecoder]:
    """With `resume_at`, another gateway goes on after that event, with the tokens that its client has."""
    choice, whole, events = ChoiceDecoder(tokenizer(), prompt, rules), Piece(), 0
    at = have = 0
    while at < len(tokens) and not choice.finished:
        piece = choice.push(tokens[at : at + batch])
        at += batch
        have += len(piece.tokens)
        if not (piece.text or piece.reasoning or piece.calls or piece.finish):
            continue  # no event: the client does not hear of it
        whole.add(piece)
        events += 1
        if events == resume_at and not choice.finished:
            choice = ChoiceDecoder(tokenizer(), prompt, rules)
            for first in range(0, have, replayed):
                assert choice.restore(tokens[first : min(first + replayed, have)]).silent
            at = have
    return whole, choice


def told(whole: Piece, choice: ChoiceDecoder) -> Any:
    calls = [(c.index, c.name, c.arguments) for c in whole.calls]
    return whole.text, whole.reasoning, calls, whole.finish, choice.tokens, choice.reasoning_tokens


@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    kind=KINDS,
    reasoning=st.booleans(),
    calls_max=st.sampled_from([None, 1]),
    stops=st.sampled_from([(), ("add",), ('"', "</tool"), ("\n",)]),
    inside=st.booleans(),
    finish=st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]),
    data=st.data(),
)
def test_batches_and_resumptions(
    text: str,
    kind: ToolFormat | None,
    reasoning: bool,
    calls_max: int | None,
    stops: tuple[str, ...],
    inside: bool,
    finish: FinishReason,
    data: Any,
) -> None:
    ids = [*tokenizer().encode(text, add_special_tokens=False).ids, EOS]
    tokens = tokens_of(ids, finish)
    prompt = tokenizer().encode("Hello <think>\n" if inside else "Hello", add_special_tokens=False).ids
    output = OutputRules(THINK if reasoning else None, kind, NAMES, calls_max)
    plain = TextRules(stops=stops, output=output)
    want = told(*run(tokens, plain, prompt))
    for rules in (plain, TextRules(stops=stops, output=output, spans=True)):
        alone = told(*run(tokens, rules, prompt))
        assert alone[:3] == want[:3], "log probabilities change nothing of what is said"
        for batch in (2, 5):
            assert told(*run(tokens, rules, prompt, batch)) == alone
        at = data.draw(st.integers(1, len(ids)))
        replayed = data.draw(st.sampled_from([1, 2, 3, 7, 256]))
        assert told(*run(tokens, rules, prompt, 1, at, replayed)) == alone


def test_the_reason_to_finish() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    ids = [*tokenizer().encode(call).ids, EOS]
    for rules, finish, end in [
        (OutputRules(None, ToolFormat.HERMES, NAMES), FinishReason.STOP, "tool_calls"),
        (OutputRules(None, ToolFormat.HERMES, NAMES), FinishReason.LENGTH, "length"),
        (OutputRules(None, ToolFormat.HERMES, NAMES, 1, named=True), FinishReason.STOP, "stop"),
        (OutputRules(None, ToolFormat.LLAMA_JSON, NAMES), FinishReason.STOP, "stop"),
    ]:
        whole, _ = run(tokens_of(ids, finish), TextRules(output=rules), [])
        assert whole.finish == end


def test_marks_that_are_special_tokens_are_seen() -> None:
    """Others stay hidden."""
    made = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    made.add_special_tokens(
        [AddedToken("<tool_call>", special=True), AddedToken("</tool_call>", special=True)]
    )
    text = f'Hm.<|user|><tool_call>{{"name": "get_weather", "arguments": {WEATHER}}}</tool_call>'
    tokens = tokens_of([*made.encode(text, add_special_tokens=False).ids, EOS], FinishReason.STOP)
    marks = frozenset(
        i for mark in ("<tool_call>", "</tool_call>") if (i := made.token_to_id(mark)) is not None
    )
    output = OutputRules(None, ToolFormat.HERMES, NAMES)
    seen = ChoiceDecoder(made, [], TextRules(output=output, shown=marks)).push(tokens)
    assert (seen.text, [(c.name, c.arguments) for c in seen.calls]) == ("Hm.", [("get_weather", WEATHER)])
    blind = ChoiceDecoder(made, [], TextRules(output=output)).push(tokens)
    assert not blind.calls


@pytest.mark.parametrize(
    "prompt", ["<|assistant|><think>", "<|assistant|><think>\n", "<|assistant|><think>\n\n"]
)
def test_reasoning_that_the_prompt_opens(prompt: str) -> None:
    """By a template that has no other mark: the output has only the second one."""
    source = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    rules = TextRules(output=OutputRules(output_format(source).reasoning))
    tokens = tokens_of([*tokenizer().encode("Hm.\n</think>\n\nYes.").ids, EOS], FinishReason.STOP)
    for batch in (1, 2, 5, len(tokens)):
        whole, choice = run(tokens, rules, tokenizer().encode(prompt).ids, batch)
        assert (whole.reasoning, whole.text) == ("Hm.", "Yes.")
        assert choice.reasoning_tokens


@pytest.mark.parametrize(
    ("source", "tools", "reasoning"),
    [
        ("{{ messages }}", None, None),
        ('"<tool_call>\\n{\\"name\\": <function-name>"', ToolFormat.HERMES, None),
        ("<tool_call> ... content.split('</think>')[-1]", ToolFormat.HERMES, THINK),
        ("<tool_call>\n<function=example>", None, None),
        (
            """'Respond in the format {"name": function name, "parameters": dictionary of'""",
            ToolFormat.LLAMA_JSON,
            None,
        ),
        ("{{- '<|python_tag|>' + tool_call.name }}", ToolFormat.LLAMA_JSON, None),
        ("[func_name1(params_name1=params_value1)] {{ '<|python_start|>' }}", ToolFormat.PYTHONIC, None),
        ('{{- "[TOOL_CALLS] [" }}', ToolFormat.MISTRAL, None),
        ('{{- "[TOOL_CALLS][" }}', ToolFormat.MISTRAL, None),
        ("{{- '[TOOL_CALLS]' + name + args }}", ToolFormat.MISTRAL_NAMED, None),
        ("{{- '[TOOL_CALLS]' + name + '[ARGS]' + args }}[/THINK]", ToolFormat.MISTRAL_ARGS, MISTRAL_THINK),
        ("<think>\n' }}{{ '</think>' }}", None, THINK),
        ("{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}", None, THINK),
        ("{% if add_generation_prompt %}<|assistant|>[THINK]{% endif %}", None, MISTRAL_THINK),
    ],
)
def test_formats_by_template(source: str, tools: ToolFormat | None, reasoning: Any) -> None:
    found = output_format(source)
    assert (found.tools, found.reasoning) == (tools, reasoning)
    off = output_format(source, "none", "none")
    assert (off.tools, off.reasoning, off.marks) == (None, None, ())
    own = output_format(source, "mistral_named", "think")
    assert (own.tools, own.reasoning) == (ToolFormat.MISTRAL_NAMED, THINK)
