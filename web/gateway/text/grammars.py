"""Checks grammars before requests go out with them, in threads: other streams go on meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from tokenizers import Tokenizer

from controlplane.grammar import Compiler, DeepThreads, GrammarError, error_of

THREADS = 2
WAITING_MAX = 1024  # grammars that are compiled or wait for it
TRIED_TOKENS = 8  # of an output that a new grammar allows
KNOWN_MAX = 1024  # grammars whose check is remembered: some 100 bytes each


class TooManyGrammars(Exception):
    """So many are being compiled that another one is not taken now."""


class GrammarChecker:
    """What it accepts, a last stage compiles: both do the same, with the same limits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> None:
        """Takes a second for 128,000 tokens. `ends`: the tokens that end a text."""
        self._compiler: Compiler | None = None
        self._why = ""  # there is none
        try:
            self._compiler = Compiler(tokenizer.to_str(), vocab_size, ends)
        except GrammarError as error:
            self._why = str(error)
        self._threads = DeepThreads(THREADS, thread_name_prefix="grammar")
        self._waiting = 0
        self._known: OrderedDict[bytes, str] = (
            OrderedDict()
        )  # digest of a grammar -> why it is refused, or ""

    async def check(self, make: Callable[[], str]) -> str:
        """The grammar that `make` returns, which may take time and raise GrammarError.

        Raises GrammarError, which says why it cannot be used, and TooManyGrammars."""
        if self._compiler is None:
            raise GrammarError(f"this model's outputs cannot be held to a grammar: {self._why}")
        if self._waiting >= WAITING_MAX:
            raise TooManyGrammars
        self._waiting += 1
        future: Future[str] = self._threads.submit(self._check, self._compiler, make)
        # Counted until the thread is done with it: a client that hangs up does not make room for another one.
        future.add_done_callback(self._done(asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _done(self, loop: asyncio.AbstractEventLoop) -> Callable[[Future[str]], None]:
        def done(_: Future[str]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._leave)

        return done

    def _leave(self) -> None:
        self._waiting -= 1

    def _check(self, compiler: Compiler, make: Callable[[], str]) -> str:
        text = make()
        key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        why = self._known.get(key)
        if why is None:
            why = self._known[key] = _refusal(compiler, text)
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        if why:
            raise GrammarError(why)
        return text


def _refusal(compiler: Compiler, text: str) -> str:
    """Why a grammar cannot be used; "" if it can."""
    try:
        matcher = compiler.compile(text)
        # Some are found to be too large only on their way.
        for _ in range(TRIED_TOKENS):
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            if matcher.is_error() or matcher.is_stopped() or not bits.any():
                break
            matcher.consume_token(int(bits.argmax()))
    except GrammarError as error:
        return str(error)
    return error_of(matcher)
