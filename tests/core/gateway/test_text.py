"""Tokens to text, stop strings, chat templates: functions of the token log and of the messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from controlplane.contract.errors import ConfigError, RequestError
from controlplane.contract.requests import FinishReason, Token
from web.gateway.text.choice_decoder import ChoiceDecoder, TextRules
from web.gateway.text.detok import REPLACEMENT, Detokenizer, StopFinder
from web.gateway.text.template import ChatTemplate
from web.gateway.text.vocabulary import Vocabulary


def byte_tokenizer() -> Tokenizer:
    """Every token is one byte: the worst case for characters that span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """Like Llama 2 and Mistral: word pieces with a leading mark, single bytes for the rest."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁cat": 257, "s": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES = byte_tokenizer()
FALLBACK = fallback_tokenizer()
NUMBER = {Vocabulary(BYTES).raw(i): i for i in range(256)}
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def ids(data: bytes) -> list[int]:
    return [NUMBER[bytes([byte])] for byte in data]


@given(st.text(), st.text())
def test_text_survives_byte_by_byte(prompt: str, text: str) -> None:
    detok = Detokenizer(BYTES, ids(prompt.encode()))
    pieces = [detok.push(token) for token in ids(text.encode())]
    assert "".join(pieces) + detok.finish() == text.removesuffix(REPLACEMENT) or REPLACEMENT in text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.binary(max_size=300))
def test_any_bytes_decode_as_a_whole_would(data: bytes) -> None:
    detok = Detokenizer(BYTES, [])
    text = "".join(detok.push(token) for token in ids(data))
    whole = data.decode(errors="replace")
    assert whole.startswith(text)
    assert len(whole) - len(text) <= 4  # held back: at most what four tokens can say
    assert text + detok.finish() in (whole, whole.removesuffix(REPLACEMENT))


def test_an_incomplete_end_is_dropped() -> None:
    detok = Detokenizer(BYTES, [])
    data = "née 🎉".encode()
    text = "".join(detok.push(token) for token in ids(data[:-1])) + detok.finish()
    assert text == "née "


def test_byte_fallback_and_leading_spaces() -> None:
    detok = Detokenizer(FALLBACK, [257])
    tokens = [257, 258, 256, *"你🎉".encode(), 257]
    assert "".join(detok.push(token) for token in tokens) == " cats 你🎉 cat"
    assert Vocabulary(FALLBACK).raw(0xE4) == b"\xe4"


@given(STOPS, st.lists(st.text("abcd", max_size=5), max_size=20), st.booleans())
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str], include: bool) -> None:
    finder = StopFinder(stops, include)
    shown, matched = "", None
    for piece in pieces:
        text, matched = finder.push(piece)
        shown += text
        if matched is not None:
            break
    else:
        shown += finder.finish()
    whole = "".join(pieces)
    found = [(whole.find(stop), len(stop)) for stop in stops if stop in whole]
    assert (matched is not None) == bool(found)
    if matched is None:
        assert shown == whole
    else:
        cut = shown.removesuffix(matched) if include else shown
        assert whole.startswith(cut + matched)
        assert not any(stop in cut for stop in stops)


def test_nothing_that_may_become_a_stop_string_is_shown() -> None:
    finder = StopFinder(["END"])
    assert [finder.push(piece)[0] for piece in ("xE", "N", "EN", "D!")] == ["x", "", "EN", ""]


def generate(text: str, rules: TextRules, batch: int, finish: FinishReason) -> tuple[str, str | None, int]:
    choice = ChoiceDecoder(BYTES, (), rules)
    data = text.encode()
    tokens = [Token(1, n, NUMBER[bytes([byte])]) for n, byte in enumerate(data)]
    tokens[-1] = Token(1, len(data) - 1, tokens[-1].token, finish=finish)
    out, reason = "", None
    for at in range(0, len(tokens), batch):
        piece = choice.push(tokens[at : at + batch])
        out += piece.text
        reason = piece.finish or reason
    return out, reason, choice.tokens


@given(st.integers(1, 30), STOPS, st.integers(0, 10))
def test_choices_do_not_depend_on_batching(batch: int, stops: list[str], min_tokens: int) -> None:
    rules = TextRules(stops=tuple(stops), min_tokens=min_tokens)
    text = "é a b abc aabbcc 你 end"
    assert generate(text, rules, batch, FinishReason.LENGTH) == generate(text, rules, 1, FinishReason.LENGTH)


def test_stop_details() -> None:
    assert generate("one two three", TextRules(stops=("two",)), 4, FinishReason.LENGTH) == ("one ", "stop", 7)
    rules = TextRules(stops=("two",), include_stop=True)
    assert generate("one two three", rules, 4, FinishReason.LENGTH) == ("one two", "stop", 7)
    rules = TextRules(stops=("o",), min_tokens=7)
    assert generate("one two three", rules, 4, FinishReason.LENGTH) == ("one two three", "length", 13)
    assert generate("abc$", TextRules(), 4, FinishReason.STOP) == ("abc", "stop", 4)
    assert generate("abc$", TextRules(include_stop=True), 4, FinishReason.STOP) == ("abc$", "stop", 4)
    assert generate("abE", TextRules(stops=("EN",)), 1, FinishReason.LENGTH) == ("abE", "length", 3)


# Templates


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"}, chars_max=1000)


def test_template_renders() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}{% if tools %}T{% endif %}"
    )
    messages = [{"role": "user", "content": " hi "}]
    assert template(source).render(messages) == "<s>[user]hi>"
    assert template(source).render(messages, add_generation_prompt=False) == "<s>[user]hi"
    assert (
        template("{{ thinking }}{{ {'a': 'é<'} | tojson }}").render(messages, True, {"thinking": 1})
        == '1{"a": "é<"}'
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0] %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}xxxxxxxxxxxxxxxxx{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 9 ** 60 ** 9 }}",
        "{{ (9 ** 60) ** 60 }}",
        "{{ 'x' ** 2 }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ messages[0].content.foo.bar }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_refuses(source: str) -> None:
    with pytest.raises(RequestError):
        template(source).render([{"role": "user", "content": "hi"}])


def test_template_must_be_valid() -> None:
    with pytest.raises(ConfigError):
        template("{% for %}")
