"""Checks grammars before requests go out with them, in threads: other streams go on meanwhile."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from tokenizers import Tokenizer

from controlplane.grammar import Compiler, DeepThreads, GrammarError, error_of

THREADS = 2
WAITING_MAX = 1024  # grammars of one API key that are compiled or wait for it
ALL_WAITING_MAX = 4 * WAITING_MAX  # and of all together
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
        self._lock = threading.Lock()
        self._waiting: Counter[bytes] = Counter()  # by owner, those that are compiled included
        # By owner, whose turn is next first.
        self._turns: OrderedDict[bytes, deque[tuple[Future[str], Callable[[], str]]]] = OrderedDict()
        # Digest of a grammar -> why it is refused, or "".
        self._known: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, make: Callable[[], str], owner: bytes = b"") -> str:
        """The grammar that `make` returns, which may take time and raise GrammarError. Owners take turns, so that one
        whose grammars take long keeps the others waiting for no more than those that are being compiled.

        Raises GrammarError, which says why it cannot be used, and TooManyGrammars."""
        if self._compiler is None:
            raise GrammarError(f"this model's outputs cannot be held to a grammar: {self._why}")
        future: Future[str] = Future()
        with self._lock:
            if self._waiting[owner] >= WAITING_MAX or self._waiting.total() >= ALL_WAITING_MAX:
                raise TooManyGrammars
            self._waiting[owner] += 1
            self._turns.setdefault(owner, deque()).append((future, make))
        # Counted until a thread is done with it: a client that hangs up then does not make room for another one.
        future.add_done_callback(functools.partial(self._leave, owner))
        self._threads.submit(self._take_turn, self._compiler)
        return await asyncio.wrap_future(future)

    def _leave(self, owner: bytes, future: Future[str]) -> None:
        with self._lock:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner]
            if future.cancelled() and (waiting := self._turns.get(owner)) is not None:
                for entry in [entry for entry in waiting if entry[0] is future]:
                    waiting.remove(entry)
                if not waiting:
                    del self._turns[owner]

    def _take_turn(self, compiler: Compiler) -> None:
        """In a thread, once for each grammar."""
        with self._lock:
            if not self._turns:
                return  # its client has hung up
            owner, waiting = self._turns.popitem(last=False)
            future, make = waiting.popleft()
            if waiting:
                self._turns[owner] = waiting  # behind the others
        if not future.set_running_or_notify_cancel():
            return
        try:
            text = self._check(compiler, make)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(text)
        finally:
            del future, make  # what was raised knows this frame

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
