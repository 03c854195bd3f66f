"""From tokens to text, one token at a time: a function of the token log (pure).

The text after k tokens does not depend on how the tokens were batched, by whom they were computed, or how
often the stream was moved.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from tokenizers import Tokenizer

from web.gateway.text.held_back import possible_start
from web.gateway.text.vocabulary import Kind, Table, Vocabulary, vocabulary_of

REPLACEMENT = "\ufffd"
CHAR_BYTES_MAX = 4
ENDING_TOKENS = 4  # of white space
CONTEXT_TOKENS = 64  # of the prompt, for what only the library can decode: some words
HELD_TOKENS_MAX = 16  # there: a character has fewer


class Detokenizer:
    """Incremental decoding of one stream: the text of prompt and output, without what the prompt says by itself.

    `push` returns only text that later tokens cannot change: a character whose bytes are split over tokens
    is held back until it is whole (also one that the prompt began), so U+FFFD is never seen for one that is
    merely incomplete, and one that is incomplete at the end is left out. Bytes that can never become a character
    do appear as U+FFFD.

    `shown`: special tokens that are not skipped. Where only the library can decode, none are then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._vocabulary = vocabulary = vocabulary_of(tokenizer)
        self._table = vocabulary.table(skip_special_tokens, shown)
        if shown and vocabulary.kind is Kind.OTHER:
            skip_special_tokens = False
        self._library: LibraryStream | None = None
        if vocabulary.kind is Kind.OTHER:
            self._library = LibraryStream(vocabulary, prompt, skip_special_tokens)
        # No token has come yet that counts, not even in the prompt.
        self.opening = vocabulary.beginning(prompt, self._table.hidden) == len(prompt)
        self._plain = self._library is None and not self.opening
        self.pending = b""  # of a character that is not whole yet; a valid beginning of one
        if self._library is None:
            self.pending = _unfinished(self._table, prompt)

    def push(self, token: int) -> str:
        """The text that `token` completes, often one word, sometimes none."""
        if self._plain:
            raw, text = self._table[token]
            if text is not None and not self.pending:
                return text
            return self._feed(raw)
        return self.step(token)[0]

    def step(self, token: int) -> tuple[str, bytes]:
        """As `push`, and the bytes that `token` itself adds."""
        if self._library is not None:
            text = self._library.step(token)
            return text, text.encode()
        raw = self._table[token][0]
        if self.opening and self._vocabulary.beginning((token,), self._table.hidden) == 0:
            raw = self._vocabulary.raw(token, first=True)
            self.opening, self._plain = False, True
        return self._feed(raw), raw

    def finish(self) -> str:
        """What is left at the end: nothing, since an incomplete last character is left out."""
        self.pending = b""
        return ""

    def _feed(self, raw: bytes) -> str:
        text, self.pending = whole_characters(self.pending + raw)
        return text


class LibraryStream:
    """What only the library can decode: the text of the newest tokens together, without that of those before.

    So does the library's own DecodeStream, but it raises where later tokens change what was sent: with byte fallback
    a stray byte does, to all characters that stand in bytes before it. Here they stay as they were sent.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._skip = skip_special_tokens
        self._skipped = vocabulary.special if skip_special_tokens else frozenset[int]()
        self._said = self._context(prompt)  # newest tokens whose text was sent
        self._text = self._decode(self._said)
        # Those that came since: they do not end with a character yet, or say nothing so far.
        self._held = _begun(vocabulary, prompt) if len(self._said) < len(prompt) else []

    def step(self, token: int) -> str:
        if token in self._skipped or self._tokenizer.id_to_token(token) is None:
            return ""
        self._held.append(token)
        whole = self._decode(self._said + self._held)
        follows = whole.startswith(self._text)
        added = whole[len(self._text) :] if follows else self._decode(self._held)
        if not added or (added.endswith(REPLACEMENT) and len(self._held) < HELD_TOKENS_MAX):
            return ""
        self._said, self._held = self._held, []
        self._text = self._decode(self._said)
        return added

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, without what a character begins with that is still to come."""
        context = list(prompt[-CONTEXT_TOKENS:])
        while context and self._decode(context).endswith(REPLACEMENT):
            context.pop()
        return context

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text


def _begun(vocabulary: Vocabulary, prompt: Sequence[int]) -> list[int]:
    """The tokens at the end of a prompt that stand for the first bytes of a character."""
    tail = b""
    for token in reversed(prompt[-CHAR_BYTES_MAX:]):
        byte = vocabulary.fallback(token)
        if not byte:
            break
        tail = byte + tail
    count = len(whole_characters(tail)[1])
    return list(prompt[len(prompt) - count :])


def whole_characters(data: bytes) -> tuple[str, bytes]:
    """The text of `data`, and the bytes at its end that are the beginning of a character."""
    text, used = utf_8_decode(data, "replace", False)
    rest = data[used:]
    # Python waits for a third byte of a surrogate, which no third byte makes valid.
    if rest[:1] == b"\xed" and rest[1:2] >= b"\xa0":
        return text + rest.decode(errors="replace"), b""
    return text, rest


def text_of(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> tuple[str, bytes]:
    """The text of `ids`, and the bytes at its end that are only the beginning of a character."""
    detok = Detokenizer(tokenizer, (), skip_special_tokens)
    return "".join(map(detok.push, ids)), detok.pending


def ends_with(tokenizer: Tokenizer, ids: Sequence[int], mark: str) -> bool:
    """Whether the text of `ids` ends with `mark`; white space may follow."""
    tail: str = tokenizer.decode(list(ids[-len(mark) - ENDING_TOKENS :]), skip_special_tokens=False)
    return tail.rstrip().endswith(mark)


def _unfinished(table: Table, prompt: Sequence[int]) -> bytes:
    """The beginning of a character with which the prompt ends."""
    tail = b""
    for token in reversed(prompt):
        tail = table[token][0] + tail
        if len(tail) >= CHAR_BYTES_MAX:
            break
    return whole_characters(tail)[1]


class StopFinder:
    """Finds the first of several stop strings in a text that arrives in pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that ended the stream or None)."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(at, len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, length, stop = min(found)
            self._held = ""
            return text[: at + length if self._include else at], stop
        keep = possible_start(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def skip(self, piece: str) -> str:
        """Let a piece pass without looking at it (before min_tokens)."""
        out, self._held = self._held + piece, ""
        return out

    def finish(self) -> str:
        """The stream ended otherwise: what was held back was no stop string."""
        out, self._held = self._held, ""
        return out
