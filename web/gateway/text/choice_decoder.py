"""One choice of a response: turns accepted tokens into text and finds out how it ends (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from controlplane.contract.request_bytes import text_bytes
from controlplane.contract.requests import FinishReason, Token
from web.gateway.text.detok import Detokenizer, StopFinder, ends_with
from web.gateway.text.parsers.output import OutputParser, OutputRules
from web.gateway.text.parsers.parsed import CallDelta, Parsed, add_call
from web.gateway.text.parsers.reasoning import ReasoningMeter
from web.gateway.text.spans import Span, Spans

RULE_BYTES = 150  # of an entry of a tuple, set or dict of the rules, its text aside


@dataclass(slots=True)
class Piece:
    """What a batch of tokens added to a choice."""

    text: str = ""  # without reasoning and tool calls, where they are told apart
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # of each token, if the rules ask for them
    finish: str | None = None  # "stop", "length" or "tool_calls"
    stop_reason: str | int | None = None  # the stop string or token id that the client asked for
    silent: bool = False  # the client has it already: only what follows from it counts

    def say(self, parsed: Parsed) -> None:
        """`parsed` comes next."""
        self.text += parsed.content
        self.reasoning += parsed.reasoning
        for part in parsed.calls:
            add_call(self.calls, part)

    def add(self, other: Piece) -> None:
        """`other` comes next."""
        self.say(Parsed(other.text, other.reasoning, other.calls))
        self.tokens += other.tokens
        self.spans += other.spans
        self.finish, self.stop_reason = other.finish, other.stop_reason


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
    # What is told apart in the text; None: nothing is.
    output: OutputRules | None = None
    shown: frozenset[int] = frozenset()  # special tokens that are marks of it

    @property
    def bytes_kept(self) -> int:
        """About what they take in memory."""
        names = self.output.names if self.output is not None else ()
        texts = (*self.stops, *names)
        return RULE_BYTES * (len(texts) + len(self.stop_tokens) + len(self.shown)) + sum(
            map(text_bytes, texts)
        )


class ChoiceDecoder:
    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], rules: TextRules) -> None:
        self._detok = Detokenizer(tokenizer, prompt, rules.skip_special_tokens, rules.shown)
        self._stop = StopFinder(rules.stops, rules.include_stop)
        self._rules = rules
        self._spans = Spans(self._detok) if rules.spans else None
        self.tokens = 0  # generated, those of a stop included
        self.reasoning_tokens = 0  # of these
        self.cached = 0  # tokens of the prompt whose KV was there already
        self.finished = False
        self._parser: OutputParser | None = None
        self._meter: ReasoningMeter | None = None
        if rules.output is not None:
            marks = rules.output.reasoning
            inside = marks is not None and ends_with(tokenizer, prompt, marks.begin)
            self._parser = OutputParser(rules.output, inside)
            if marks is not None:
                self._meter = ReasoningMeter(marks, inside)

    @property
    def reasons(self) -> bool:
        """Whether reasoning is told apart."""
        return self._meter is not None

    def restore_end(self, tokens: int, reasoning_tokens: int = 0) -> None:
        """All of it was sent by an earlier gateway."""
        self.tokens, self.reasoning_tokens, self.finished = tokens, reasoning_tokens, True

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Take in the next tokens. After a finish, the rest of them is not part of the choice."""
        if self._parser is None:
            return self._push_all(tokens)
        if len(tokens) == 1 and not self.finished:
            piece = self._push_all(tokens)
            self._parse(self._parser, piece)
            return piece
        piece = Piece()
        for token in tokens:  # one by one, as a call may be the end of the output
            if self.finished:
                break
            one = self._push_all((token,))
            if self._parser is not None:
                self._parse(self._parser, one)
            piece.add(one)
        return piece

    def _push_all(self, tokens: Sequence[Token]) -> Piece:
        piece = Piece()
        for token in tokens:
            if self.finished:
                break
            self.tokens += 1
            self.cached = token.cached or self.cached
            if self._spans is None:
                piece.tokens.append(token)
            self._push(token, piece)
        if self._spans is not None:
            piece.text, piece.tokens, piece.spans = self._spans.release(piece.text, self.finished)
        return piece

    def restore(self, tokens: Sequence[Token]) -> Piece:
        """As `push`, for tokens of which the client has all that it will get."""
        piece = self._push_all(tokens)
        if self._spans is not None:
            piece.text += self._spans.forget() + self._stop.finish()
            piece.tokens, piece.spans = list(tokens), [Span()] * len(tokens)
        if self._parser is not None:
            self._parse(self._parser, piece)
        piece.silent = True
        return piece

    def _parse(self, parser: OutputParser, piece: Piece) -> None:
        """Tell apart what the text of `piece` says; a call may be the end."""
        text, piece.text = piece.text, ""
        piece.say(parser.push(text))
        if parser.done and not self.finished:
            self.finished, piece.finish = True, "stop"
            if self._spans is not None:
                _, tokens, spans = self._spans.release("", True)
                piece.tokens += tokens
                piece.spans += spans
        if self.finished:
            piece.say(parser.finish())
            if (
                piece.finish == "stop"
                and parser.calls
                and self._rules.output
                and not self._rules.output.named
            ):
                piece.finish = "tool_calls"
        if parser.idle:
            self._parser = None

    def _push(self, token: Token, piece: Piece) -> None:
        if token.finish is None and not self._rules.stops:
            piece.text += self._counted(self._text(token))
            return
        stopped = token.finish is FinishReason.STOP
        # The text of a stop token is shown only on request, like that of a stop string.
        text = self._counted(self._text(token, hidden=stopped and not self._rules.include_stop))
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

    def _counted(self, text: str) -> str:
        """`text` is a token's: of the reasoning, if it begins or ends within it."""
        if self._meter is not None and not self._meter.over:
            self.reasoning_tokens += self._meter.push(text)
        return text

    def _text(self, token: Token, hidden: bool = False) -> str:
        if self._spans is not None:
            return self._spans.push(token, hidden)
        return "" if hidden else self._detok.push(token.token)
