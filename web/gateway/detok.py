"""From tokens to text, one token at a time: a function of the token log (pure).

The text after k tokens does not depend on how the tokens were batched, by whom they were computed, or how
often the stream was moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 5  # of the prompt: decoders strip a leading space, or not, by what stands before
SPLIT_TOKENS_MAX = 4  # a character of UTF-8 has at most four bytes, so it spans at most four tokens
TOKENS_CACHED = 1 << 16
WINDOW_TOKENS_MAX = 64  # only streams of invalid bytes get here


class Detokenizer:
    """Incremental decoding of one stream with a window of recent tokens.

    `push` returns only text that later tokens cannot change: a character whose bytes are split over tokens
    is held back until it is whole, so U+FFFD is never seen for one that is merely incomplete. Bytes that can
    never become a character do appear as U+FFFD, as they do when the whole output is decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._base = len(self._window)  # tokens of the window whose text is out
        self._sent = len(self._text())  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that `token` completes, often one word, sometimes none."""
        self._window.append(token)
        text = self._text()
        if not text.endswith(REPLACEMENT):
            out = text[self._sent :]
            if out or len(self._window) > WINDOW_TOKENS_MAX:
                # The next window starts with the tokens of this piece: they are the context of the next one.
                self._window = self._window[self._base :]
                self._base = len(self._window)
                if self._base == 1:
                    self._sent = _chars_alone(self._decode, token, self._skip)
                else:
                    self._sent = len(self._text())
            return out
        pending = len(self._window) - self._base
        if pending <= SPLIT_TOKENS_MAX:
            return ""
        # Only the last replacement character can still turn into something else.
        out = text[self._sent : -1]
        self._sent = max(self._sent, len(text) - 1)
        if len(self._window) > WINDOW_TOKENS_MAX:
            self._window = self._window[-SPLIT_TOKENS_MAX:]
            self._base = 0
            self._sent = max(0, len(self._text()) - 1)
        return out

    def finish(self) -> str:
        """What is left at the end, without an incomplete last character."""
        text = self._text()
        return text[self._sent :].removesuffix(REPLACEMENT)

    def _text(self) -> str:
        text: str = self._decode(self._window, skip_special_tokens=self._skip)
        return text


@lru_cache(TOKENS_CACHED)
def _chars_alone(decode: Callable[..., str], token: int, skip_special_tokens: bool) -> int:
    """Length of the text of one token: most windows begin with one."""
    return len(decode([token], skip_special_tokens=skip_special_tokens))


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
        keep = self._possible_start(text)
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

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
