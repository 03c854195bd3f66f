"""Which part of the answer's text is whose: for log probabilities, which name tokens by their text (pure).

Text and tokens leave together, a token only when the text that it has a part in is whole and no stop string can
take it away any more. So the tokens that a client has are exactly those of the text that it has, and what it has
been sent is known from their number alone: a stream that is taken up elsewhere goes on with the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from controlplane.contract.requests import Token
from web.gateway.text.detok import Detokenizer, whole_characters

# Bytes that never become whole characters would hold all their tokens back.
GROUP_TOKENS_MAX = 16


@dataclass(frozen=True, slots=True)
class Span:
    """One token's part of the text.

    `offset`: characters of the output before it; `raw`: the bytes of it that are part of the answer (none of a
    hidden token, and fewer than it has where a stop string or the end cuts it); `first`: nothing is before it, not
    even a prompt.
    """

    offset: int = 0
    raw: bytes = b""
    first: bool = False


@dataclass(frozen=True, slots=True)
class _End:
    """Where a token and a character end together."""

    tokens: int  # of the output
    chars: int
    pending: bytes  # of a character that goes on nevertheless (see GROUP_TOKENS_MAX)


Leaving = tuple[str, list[Token], list[Span]]  # a part of the answer, its tokens, and a span of each


class Spans:
    """The tokens of one choice that have not left yet, each with its part of the text."""

    def __init__(self, detok: Detokenizer) -> None:
        self._detok = detok
        self._held: deque[tuple[Token, Span]] = deque()
        self._ends: deque[_End] = deque()
        # The newest end; the one up to which all has left.
        self._last = self._left = _End(0, 0, detok.pending)
        self._tokens = self._chars = 0  # of the output, so far
        self._ready = ""  # what may leave, from `_left` on: no stop string can take it away

    def push(self, token: Token, hidden: bool) -> str:
        """The text that `token` completes; none if it is hidden."""
        before, first = self._detok.pending, self._detok.opening
        text, raw = ("", b"") if hidden else self._detok.step(token.token)
        # Bytes that were waiting, and do not go on with these, are a U+FFFD before them.
        broken = bool(before and raw) and not _goes_on(before, raw[0])
        self._held.append((token, Span(self._chars + broken, raw, first)))
        self._tokens += 1
        self._chars += len(text)
        if not self._detok.pending or self._tokens - self._last.tokens >= GROUP_TOKENS_MAX:
            self._last = _End(self._tokens, self._chars, self._detok.pending)
            self._ends.append(self._last)
        return text

    def release(self, shown: str, finished: bool) -> Leaving:
        """`shown`: what of the text may be shown now; when `finished`, the rest of the tokens have no part in it."""
        self._ready += shown
        if finished:
            return self._finish()
        until, limit = self._left, self._left.chars + len(self._ready)
        while self._ends and self._ends[0].chars <= limit:
            until = self._ends.popleft()
        taken = [self._held.popleft() for _ in range(until.tokens - self._left.tokens)]
        count = until.chars - self._left.chars
        text, self._ready = self._ready[:count], self._ready[count:]
        self._left = until
        return text, [token for token, _ in taken], [span for _, span in taken]

    def forget(self) -> str:
        """All tokens so far have left, with their text: returns what of it was still here."""
        self._held.clear()
        self._ends.clear()
        ready, self._ready = self._ready, ""
        self._last = self._left = _End(self._tokens, self._chars, self._detok.pending)
        return ready

    def _finish(self) -> Leaving:
        text, end = self._ready, self._left.chars + len(self._ready)
        tokens, spans = [token for token, _ in self._held], [span for _, span in self._held]
        clipped = _clip(self._left.pending, [span.raw for span in spans], text)
        self.forget()
        return (
            text,
            tokens,
            [
                replace(span, offset=min(span.offset, end), raw=raw)
                for span, raw in zip(spans, clipped, strict=True)
            ],
        )


def _goes_on(pending: bytes, byte: int) -> bool:
    """Whether `byte` is, or may be, of the same character as the valid beginning `pending`."""
    data = pending + bytes([byte])
    text, rest = whole_characters(data)
    return rest == data or text.encode() == data


def _clip(pending: bytes, raws: list[bytes], text: str) -> Iterator[bytes]:
    """The bytes of each token that are part of `text`, with which what they say begins."""
    data = pending + b"".join(raws)
    keep = text.encode()
    size = len(keep) if data.startswith(keep) else _bytes_of(data, len(text))
    left = max(0, size - len(pending))
    for raw in raws:
        yield raw[:left]
        left = max(0, left - len(raw))


def _bytes_of(data: bytes, chars: int) -> int:
    """How many bytes say the first `chars` characters, when some of them are no UTF-8."""
    count, rest = 0, b""
    for at, byte in enumerate(data):
        text, rest = whole_characters(rest + bytes([byte]))
        count += len(text)
        if count > chars:  # a broken character, and the one that broke it
            return at
        if count == chars and text:
            return at + 1 - len(rest)
    return len(data) if chars else 0
