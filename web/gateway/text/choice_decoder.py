"""One choice of a response: turns accepted tokens into text and finds out how it ends (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from controlplane.contract.requests import FinishReason, Token
from web.gateway.text.detok import Detokenizer, StopFinder
from web.gateway.text.spans import Span, Spans


@dataclass(slots=True)
class Piece:
    """What a batch of tokens added to a choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # of each token, if the rules ask for them
    finish: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or token id that the client asked for
    silent: bool = False  # the client has it already: only what follows from it counts


@dataclass(frozen=True, slots=True)
class TextRules:
    """What of a request decides how its tokens become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    # Those that the client named, and how it did.
    stop_tokens: Mapping[int, str | int] = field(default_factory=dict)
    # Each token is told with the part of the text that is its own (log probabilities): text and tokens then leave
    # together, when both are certain.
    spans: bool = False


class ChoiceDecoder:
    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], rules: TextRules) -> None:
        self._detok = Detokenizer(tokenizer, prompt, rules.skip_special_tokens)
        self._stop = StopFinder(rules.stops, rules.include_stop)
        self._rules = rules
        self._spans = Spans(self._detok) if rules.spans else None
        self.tokens = 0  # generated, those of a stop included
        self.finished = False

    def restore_end(self, tokens: int) -> None:
        """All of it was sent by an earlier gateway."""
        self.tokens, self.finished = tokens, True

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Take in the next tokens. After a finish, the rest of them is not part of the choice."""
        piece = Piece()
        for token in tokens:
            if self.finished:
                break
            self.tokens += 1
            if self._spans is None:
                piece.tokens.append(token)
            self._push(token, piece)
        if self._spans is not None:
            piece.text, piece.tokens, piece.spans = self._spans.release(piece.text, self.finished)
        return piece

    def restore(self, tokens: Sequence[Token]) -> Piece:
        """As `push`, for tokens of which the client has all that it will get."""
        piece = self.push(tokens)
        if self._spans is not None:
            self._spans.forget()
            self._stop.forget()
            piece.tokens, piece.spans = list(tokens), [Span()] * len(tokens)
        piece.silent = True
        return piece

    def _push(self, token: Token, piece: Piece) -> None:
        if token.finish is None and not self._rules.stops:
            piece.text += self._text(token)
            return
        stopped = token.finish is FinishReason.STOP
        # The text of a stop token is shown only on request, like that of a stop string.
        text = self._text(token, hidden=stopped and not self._rules.include_stop)
        if token.finish is not None:
            text += self._detok.finish()
        if self.tokens <= self._rules.min_tokens:
            piece.text += self._stop.skip(text)
            match = None
        else:
            shown, match = self._stop.push(text)
            piece.text += shown
        if match is not None:
            piece.finish, piece.stop_reason = "stop", match
        elif token.finish is not None:
            piece.text += self._stop.finish()
            piece.finish = token.finish.value
            if stopped:
                piece.stop_reason = self._rules.stop_tokens.get(token.token)
        self.finished = piece.finish is not None

    def _text(self, token: Token, hidden: bool = False) -> str:
        if self._spans is not None:
            return self._spans.push(token, hidden)
        return "" if hidden else self._detok.push(token.token)
