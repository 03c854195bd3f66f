"""The text of a stream is a function of all ids, whatever tokenizer, prompt, batches and gateways they come from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from controlplane.contract.requests import FinishReason, Token
from tests.core.gateway.tokenizers_of_kinds import KINDS, SPECIAL, Kind, byte_fallback
from web.gateway.text.choice_decoder import ChoiceDecoder, Piece, TextRules
from web.gateway.text.detok import Detokenizer, StopFinder, text_of
from web.gateway.text.vocabulary import vocabulary_of

FALLBACK = KINDS["byte fallback"].tokenizer
ONLY_BY_LIBRARY = byte_fallback(order="by pattern")  # its tokens are FALLBACK's
FALLBACKS = [FALLBACK, KINDS["byte fallback, then the mark"].tokenizer, ONLY_BY_LIBRARY]
OK, FINE, DONE, HELLO, S, A = (FALLBACK.token_to_id(t) for t in ("▁ok", "▁fine", "▁done", "▁Hello", "s", "A"))
BOS, EOS = FALLBACK.token_to_id("<s>"), FALLBACK.token_to_id("</s>")


def of_bytes(data: bytes) -> list[int]:
    return [FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in data]


def draw_ids(data: st.DataObject, kind: Kind, size: int) -> list[int]:
    """Any ids; often those of real text, so that characters become whole."""
    text = "".join(
        data.draw(st.lists(st.sampled_from(["é", "你", "🎉", "ก", " a", "x", "\ufffd"]), max_size=4))
    )
    by_byte = [kind.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    real = kind.tokenizer.encode(text).ids if None in by_byte else by_byte
    any_id = st.integers(0, kind.size - 1)
    return (data.draw(st.lists(any_id, max_size=size)) + real + data.draw(st.lists(any_id, max_size=size)))[
        data.draw(st.integers(0, 3)) :
    ]


def tokens_of(ids: Sequence[int], finish: FinishReason | None) -> list[Token]:
    last = len(ids) - 1
    return [
        Token(1, n, token, -0.5, ((token, -0.5),), finish if n == last else None)
        for n, token in enumerate(ids)
    ]


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_stream_says_what_all_ids_say(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    skip = data.draw(st.booleans())
    prompt, ids = draw_ids(data, kind, 4), draw_ids(data, kind, 8)
    detok = Detokenizer(kind.tokenizer, prompt, skip)
    pieces = [detok.push(token) for token in ids]
    echo, begun = text_of(kind.tokenizer, prompt, skip)
    whole = kind.whole(kind.tokenizer, [*prompt, *ids], skip)
    said = echo + "".join(pieces) + detok.finish()
    # A character that is not whole is left out; nothing else is.
    assert said == whole or said + "�" == whole.removesuffix("�") + "�"
    assert whole.startswith(said)
    if not begun:
        assert kind.whole(kind.tokenizer, prompt, skip) == echo


def test_a_prompt_that_ends_within_a_character() -> None:
    for prompt in ([BOS, HELLO], [HELLO], [BOS]):
        emoji = of_bytes("🎉".encode())
        detok = Detokenizer(FALLBACK, [*prompt, *emoji[:3]])
        assert "".join(map(detok.push, [emoji[3], OK, FINE, DONE])) == "🎉 ok fine done"
    assert text_of(FALLBACK, [BOS, HELLO, *emoji[:3]], True)[0] == "Hello"


def test_thai_by_bytes() -> None:
    ids = of_bytes("กข".encode())
    for count, text in [(1, ""), (2, ""), (3, "ก"), (4, "ก"), (5, "ก"), (6, "กข")]:
        choice = ChoiceDecoder(FALLBACK, [BOS], TextRules())
        assert choice.push(tokens_of(ids[:count], FinishReason.LENGTH)).text == text
    detok = Detokenizer(FALLBACK, [])
    assert [detok.push(token) for token in [*ids[:4], OK]] == ["", "", "ก", "", "� ok"]


def test_where_the_librarys_stream_is_not_right() -> None:
    """It takes back what it has said of a run of bytes: its own stream gives up. Elsewhere both say the same."""
    ids = [*of_bytes("ก".encode()), *of_bytes(b"\xff"), OK]
    library = DecodeStream([HELLO], True)
    with pytest.raises(Exception, match="Invalid prefix"):
        [library.step(FALLBACK, token) for token in ids]
    assert FALLBACK.decode([HELLO, *ids]) == "Hello���� ok"
    detok = Detokenizer(FALLBACK, [HELLO])
    assert "".join(map(detok.push, ids)) == "ก� ok"
    for kind in KINDS.values():
        text = kind.tokenizer.encode("the cats").ids
        library, detok = DecodeStream(text, True), Detokenizer(kind.tokenizer, text)
        assert [detok.push(t) for t in text] == [library.step(kind.tokenizer, t) or "" for t in text]


@pytest.mark.parametrize("tokenizer", FALLBACKS)
def test_bytes_whatever_the_decoders_order(tokenizer: Tokenizer) -> None:
    emoji, thai = of_bytes("🎉".encode()), of_bytes("กข".encode())
    for prompt, ids, text in [
        ([BOS, HELLO, *emoji[:3]], [emoji[3], OK, FINE, DONE], "🎉 ok fine done"),
        ([HELLO, *thai[:3], thai[3]], [*thai[4:], OK], "ข ok"),
        ([HELLO, thai[0]], thai[1:3], "ก"),
        ([HELLO, thai[0]], [OK], "� ok"),
        ([HELLO, *of_bytes(b"\xff"), thai[0]], thai[1:3], "ก"),
        ([HELLO], [*thai[:3], EOS, thai[0], OK, BOS, FINE], "ก� ok fine"),
        ([HELLO], [*thai[:3], *thai[:1] * 40, OK], "ก" + "�" * 40 + " ok"),
        ([BOS], [OK, FINE, *emoji[:2]], "ok fine"),
    ]:
        detok = Detokenizer(tokenizer, prompt)
        assert "".join(map(detok.push, ids)) + detok.finish() == text, (prompt, ids)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_what_only_the_library_can_decode_is_never_an_error(data: st.DataObject) -> None:
    """Of whole characters it says the same; stray bytes are U+FFFD, a few more of them or fewer."""
    kind = Kind(ONLY_BY_LIBRARY, KINDS["byte fallback"].whole)
    skip = data.draw(st.booleans())
    prompt, ids = draw_ids(data, kind, 4), draw_ids(data, kind, 8)
    detok = Detokenizer(kind.tokenizer, prompt, skip)
    text = "".join(map(detok.push, ids)) + detok.finish()
    whole, before = kind.whole(FALLBACK, [*prompt, *ids], skip), kind.whole(FALLBACK, prompt, skip)
    if "�" not in whole + before:
        assert text == whole[len(before) :]


@pytest.mark.parametrize("prompt", [[], [BOS], [BOS, HELLO]])
def test_only_the_first_token_that_counts_loses_its_space(prompt: list[int]) -> None:
    detok = Detokenizer(FALLBACK, prompt)
    assert "".join(map(detok.push, [BOS, FINE, DONE])) == (" fine done" if HELLO in prompt else "fine done")


# Log probabilities


def shown(pieces: Sequence[Piece]) -> tuple[str, list[int], list[bytes], list[int]]:
    return (
        "".join(piece.text for piece in pieces),
        [token.token for piece in pieces for token in piece.tokens],
        [span.raw for piece in pieces for span in piece.spans],
        [span.offset for piece in pieces for span in piece.spans],
    )


def run(
    kind: Kind,
    prompt: list[int],
    tokens: list[Token],
    rules: TextRules,
    batch: int,
    resume_at: int | None = None,
) -> list[Piece]:
    """All pieces; with `resume_at`, another gateway goes on after that piece, with what its client has."""
    choice, pieces = ChoiceDecoder(kind.tokenizer, prompt, rules), []
    for at in range(0, len(tokens), batch):
        pieces.append(choice.push(tokens[at : at + batch]))
        if choice.finished:
            break
        if resume_at == len(pieces):
            have = sum(len(piece.tokens) for piece in pieces)
            choice = ChoiceDecoder(kind.tokenizer, prompt, rules)
            for first in range(0, have, 3):
                piece = choice.restore(tokens[first : min(first + 3, have)])
                assert piece.silent
            tail = tokens[have:]
            for first in range(0, len(tail), batch):
                if choice.finished:
                    break
                pieces.append(choice.push(tail[first : first + batch]))
            break
    return pieces


STOPS = st.lists(st.sampled_from(["ok f", "e", "好", "🎉", "ne d", " fine done", "cats", "s"]), max_size=2)


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_tokens_and_text_leave_together(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    words = data.draw(st.lists(st.sampled_from([" ok", " fine", " done", "你好", "🎉", " cats"]), max_size=4))
    ids = (kind.tokenizer.encode("".join(words)).ids + draw_ids(data, kind, 4))[:14] or [0]
    prompt = draw_ids(data, kind, 2)
    finish = data.draw(st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]))
    plain = TextRules(
        stops=tuple(data.draw(STOPS)),
        include_stop=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 3)),
    )
    rules = TextRules(
        plain.stops, plain.include_stop, plain.skip_special_tokens, plain.min_tokens, spans=True
    )
    tokens = tokens_of(ids, finish)
    text, known, raws, offsets = shown(run(kind, prompt, tokens, rules, 1))
    without = run(kind, prompt, tokens, plain, 1)
    assert text == "".join(piece.text for piece in without), "log probabilities do not change the text"
    assert known == [token.token for piece in without for token in piece.tokens]
    said = Detokenizer(kind.tokenizer, prompt, plain.skip_special_tokens).pending + b"".join(raws)
    assert said.decode(errors="replace") == text or not (text or any(raws)), (
        "the bytes of the tokens are those of the text"
    )
    assert sorted(offsets) == offsets
    assert all(0 <= offset <= len(text) for offset in offsets)
    for offset, raw in zip(offsets, raws, strict=True):
        try:
            own = raw.decode()
        except UnicodeDecodeError:
            continue  # a part of a character
        assert text[offset : offset + len(own)] == own
    for batch in (2, 5):
        assert shown(run(kind, prompt, tokens, rules, batch)) == (text, known, raws, offsets)
    for at in range(1, len(tokens)):
        assert shown(run(kind, prompt, tokens, rules, 1, at)) == (text, known, raws, offsets), at
        again = run(kind, prompt, tokens, plain, 1, at)
        assert "".join(piece.text for piece in again) == text


def test_offsets_and_bytes_of_words() -> None:
    choice = ChoiceDecoder(FALLBACK, [BOS, HELLO], TextRules(spans=True))
    piece = choice.push(tokens_of([FINE, DONE, EOS], FinishReason.STOP))
    assert (piece.text, [span.offset for span in piece.spans]) == (" fine done", [0, 5, 10])
    assert [span.raw for span in piece.spans] == [b" fine", b" done", b""]
    names = [vocabulary_of(FALLBACK).text(token.token) for token in piece.tokens]
    assert names == [" fine", " done", "</s>"]


def test_a_character_of_many_tokens_has_one_offset() -> None:
    choice = ChoiceDecoder(FALLBACK, [BOS, HELLO], TextRules(spans=True))
    ids = [FINE, *of_bytes("🎉".encode()), DONE, *of_bytes(b"\xe0\xe0"), OK, *of_bytes(b"\xe0\xb8")]
    pieces = [choice.push([token]) for token in tokens_of(ids, FinishReason.LENGTH)]
    text, _, raws, offsets = shown(pieces)
    assert text == " fine🎉 done�� ok"
    assert offsets == [0, 5, 5, 5, 5, 6, 11, 12, 13, 16, 16]
    assert raws[-2:] == [b"", b""], "what is left out of the text is left out of the bytes"
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 0, 0, 4, 1, 0, 0, 3, 0, 2]


def test_names_of_tokens_differ() -> None:
    names = vocabulary_of(FALLBACK)
    assert names.text(of_bytes(b"\xe0")[0]) == "bytes:\\xe0"
    assert names.text(of_bytes(b"\n")[0]) == "\n"
    assert names.text(FINE, first=True) == "fine"
    assert names.text(10**6) == "token_id:1000000"
    assert [names.raw(token) for token in (A, *of_bytes(b"A"))] == [b"A", b"A"]
    assert all(names.text(FALLBACK.token_to_id(name)) == name for name in SPECIAL)


def test_what_was_shown_is_not_looked_at_again() -> None:
    finder = StopFinder(["abc"])
    assert finder.push("xab")[0] == "x"
    finder.finish()
    assert finder.push("c") == ("c", None)
