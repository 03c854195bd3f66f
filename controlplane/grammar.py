"""Grammars that say what a model's output may be, compiled with llguidance: by gateways to check them, by a last stage
to obey them. Both use the same limits, so what a gateway accepts compiles everywhere.

A grammar's text is llguidance's own: Lark, or JSON with Lark grammars and JSON schemas in it. Which tokens may come
next is a function of text, tokenizer and the tokens so far, and of nothing else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

ERROR_CHARS_MAX = 400
# A lexer's state takes 1 to 2 KB, and every running request has its own; a schema of 350 properties makes about 2,000.
LEXER_STATES_MAX = 50_000
SYMBOLS_MAX = 100_000  # a schema of 900 properties makes about 20,000
# Compilation calls itself for each reference in a grammar: a stack of 8 MB, as threads have, ends at a thousand, and
# the process with it. 128 KB of text have some 10,000 references at most. Memory is taken as it is used.
STACK_BYTES = 256 << 20

_STARTING = threading.Lock()  # a thread whose stack is another's size


class GrammarError(ValueError):
    """A grammar, or a tokenizer, that cannot be used. The text says why, for the client."""


@cache
def library_version() -> str:
    """Of what compiles grammars: another one may allow other tokens."""
    return metadata.version("llguidance")


class DeepThreads(ThreadPoolExecutor):
    """Threads to compile in: nowhere else may it be done."""

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        with _STARTING:
            before = threading.stack_size(STACK_BYTES)
            try:
                return super().submit(*arguments, **named)  # starts a thread where none is idle
            finally:
                threading.stack_size(before)


class Compiler:
    """Compiles grammars for one tokenizer, in any of DeepThreads; it gives the interpreter free meanwhile.

    Making one does not: about a second for 128,000 tokens, in which no other thread runs."""

    def __init__(self, tokenizer: str, vocab_size: int, ends: Sequence[int]) -> None:
        """`tokenizer`: a tokenizer.json's text; `ends`: the tokens that end a text. Raises GrammarError."""
        if not ends:
            raise GrammarError("the model's files name no token that ends a text")
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends))
        except BaseException as error:  # a panic of the library is no Exception
            raise GrammarError(
                f"its tokenizer cannot be used for grammars: {_in_short(str(error))}"
            ) from error
        self._limits = LLParserLimits(
            max_lexer_states=LEXER_STATES_MAX, max_grammar_size=SYMBOLS_MAX, verbose_errors=False
        )

    def compile(self, text: str) -> LLMatcher:
        """At the beginning of the output. Raises GrammarError."""
        try:
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        except BaseException as error:
            raise GrammarError(_in_short(str(error))) from error
        if matcher.is_error():
            raise GrammarError(error_of(matcher))
        return matcher


def load_compiler(folder: Path, vocab_size: int, ends: Sequence[int]) -> Compiler:
    """For a model's directory. `ends`: as its config.json or generation_config.json has them, if they do.

    Raises GrammarError."""
    try:
        text = (folder / "tokenizer.json").read_text()
        return Compiler(text, vocab_size, ends or _named_end(text, folder / "tokenizer_config.json"))
    except (OSError, ValueError) as error:
        raise GrammarError(str(error)) from error


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher has no next token; "" if it may have one."""
    return _in_short(matcher.get_error()) if matcher.is_error() else ""


def _named_end(tokenizer: str, settings: Path) -> tuple[int, ...]:
    """The tokenizer's own end, where the model's files name none, as gateways have it."""
    if not settings.exists():
        return ()
    end = json.loads(settings.read_text()).get("eos_token")
    name = end.get("content") if isinstance(end, dict) else end
    added = json.loads(tokenizer).get("added_tokens", [])
    return tuple(token["id"] for token in added if token.get("content") == name)[:1]


def _in_short(text: str) -> str:
    """One line, without the parser's state that the library adds."""
    return " ".join(text.partition("<state>")[0].split())[:ERROR_CHARS_MAX]
