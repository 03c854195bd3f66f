"""An answer that leaves in one piece, while it grows (pure).

Log probabilities are nearly all of it. They are encoded as they come, so that neither their objects are kept nor the
event loop stands still at the end for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from web.gateway.openai.long_lists import LongList
from web.gateway.openai.requests import Common
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.parsers.parsed import CallDelta

ENTRY_BYTES = 250  # of a token's part in the lists, without what is encoded


def best(wholes: Sequence[Whole], request: Common) -> list[int]:
    """Which choices the answer has, in its order: of each prompt those whose tokens are likeliest in the mean."""
    if request.choices == request.shown:
        return list(range(len(wholes)))
    found: list[int] = []
    for first in range(0, len(wholes), request.choices):
        group = range(first, first + request.choices)
        found += sorted(group, key=lambda index: -wholes[index].mean_logprob)[: request.shown]
    return found


class Whole:
    """One choice: `ids` are its tokens, `logprobs` the lists of either API."""

    def __init__(self, text: str = "") -> None:
        self._texts = [text]
        self._reasoning: list[str] = []
        self._calls: list[CallDelta] = []
        self._last = Piece()
        self.ids: list[int] = []
        self.prompt_scores = b""  # of its prompt, if asked for
        self._logprob = 0.0  # of all tokens together
        self.logprobs: dict[str, LongList] | None = None

    @property
    def piece(self) -> Piece:
        """All that it says, and how it ended."""
        return Piece(
            "".join(self._texts),
            "".join(self._reasoning),
            self._calls,
            finish=self._last.finish,
            stop_reason=self._last.stop_reason,
        )

    @property
    def mean_logprob(self) -> float:
        """By which the best of several is found."""
        return self._logprob / max(1, len(self.ids))

    def join(self, other: Whole) -> None:
        """Its log probabilities, after one's own."""
        for name, entries in (other.logprobs or {}).items():
            assert self.logprobs is not None
            self.logprobs[name].join(entries)

    def add(self, piece: Piece, logprobs: dict[str, Any] | None) -> int:
        """Returns about how many bytes that keeps."""
        self._texts.append(piece.text)
        self._reasoning.append(piece.reasoning)
        for part in piece.calls:
            if part.name:
                self._calls.append(CallDelta(part.index, part.name))
            self._calls[part.index].arguments += part.arguments
        self._last = piece
        if piece.tokens and piece.tokens[0].prompt_scores is not None:
            self.prompt_scores = piece.tokens[0].prompt_scores
        self._logprob += sum(token.logprob or 0.0 for token in piece.tokens)
        self.ids += [token.token for token in piece.tokens]
        size = len(piece.text) + len(piece.reasoning) + ENTRY_BYTES * len(piece.tokens)
        if logprobs is None:
            return size
        if self.logprobs is None:
            self.logprobs = {name: LongList() for name in logprobs}
        return size + sum(self.logprobs[name].extend(entries) for name, entries in logprobs.items())
