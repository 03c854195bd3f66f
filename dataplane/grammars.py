"""Follows outputs through their grammars, in threads of its own: the work behind `core/rules.py`.

Compilation, and the log of a request that comes from elsewhere, have two threads; nothing waits for them but that
request. The masks of a step have another one: it begins when the tokens before are committed, and is done long before
a stage has computed the next ones. That thread alone writes masks, in order, so that a slot's next owner never finds
the last one's.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from controlplane.grammar import Compiler, DeepThreads, GrammarError, error_of
from dataplane.core.rules import Rule
from dataplane.model.sampler import Foresight

log = logging.getLogger(__name__)

COMPILED_MAX, COMPILED_BYTES_MAX = 128, 4 << 20  # grammars that are kept compiled, and their texts
Moves = Sequence[tuple[Rule, int]]


class Grammars:
    """One for a node. `settled` is called, in a thread of ours, when a rule that was begun is ready or has an error."""

    def __init__(self, compiler: Compiler, threads: int = 1) -> None:
        """`threads`: that masks of one step are shared among."""
        self.settled: Callable[[], object] = lambda: None
        self._compiler = compiler
        self._threads = threads
        self._executor: LLExecutor | None = None
        self._compiling = DeepThreads(2, thread_name_prefix="grammar")
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="mask")
        self._masked: Future[None] | None = None  # the last step's
        self._compiled: OrderedDict[bytes, tuple[int, Future[LLMatcher]]] = OrderedDict()
        self._lock = Lock()  # of what is compiled

    def close(self) -> None:
        for pool in (self._compiling, self._masking):
            pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, rule: Rule, grammar: str, output: Sequence[int]) -> None:
        self._compiling.submit(self._begin, rule, grammar, list(output))

    def advance(self, moves: Moves) -> None:
        self._masked = self._masking.submit(self._advance, moves)

    def foresee(self, drafts: Sequence[tuple[Rule, int, Sequence[int]]], foresight: Foresight) -> None:
        self._masked = self._masking.submit(self._foresee, drafts, foresight)

    def settle(self) -> None:
        if self._masked is not None:
            self._masked.result()

    # ------------------------------------------------------------------ in the threads of compilation

    def _begin(self, rule: Rule, grammar: str, output: list[int]) -> None:
        if rule.closed:
            return
        try:
            matcher = self._matcher(grammar).deep_copy()
            if output and not matcher.consume_tokens(output):
                raise GrammarError(error_of(matcher) or "the output so far is not the grammar's")
            words = rule.masks.shape[1]  # the library adds one
            mask = np.frombuffer(matcher.compute_bitmask(), np.int32)[:words]
            if error := error_of(matcher):
                raise GrammarError(error)
        except GrammarError as error:
            self._fail([rule], str(error))
        # A panic of the library is no Exception: it costs this request, not the node.
        except BaseException as error:
            log.exception("a grammar failed")
            self._fail([rule], f"the grammar failed: {error}")
        else:
            rule.matcher = matcher
            self._masking.submit(self._install, rule, mask)

    def _matcher(self, grammar: str) -> LLMatcher:
        """At the beginning, to be copied. Compiled once for all who come with the same text. Raises GrammarError."""
        key = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        mine: Future[LLMatcher] | None = None
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                mine = Future()
                found = self._compiled[key] = (len(grammar), mine)
                self._evict()
            else:
                self._compiled.move_to_end(key)
        if mine is not None:
            try:
                matcher = self._compiler.compile(grammar)
                matcher.compute_bitmask()  # its copies begin with what the lexer has found out by that
                mine.set_result(matcher)
            except BaseException as error:
                mine.set_exception(error)
        return found[1].result()

    def _evict(self) -> None:
        while len(self._compiled) > 1 and (
            len(self._compiled) > COMPILED_MAX
            or sum(size for size, _ in self._compiled.values()) > COMPILED_BYTES_MAX
        ):
            self._compiled.popitem(last=False)

    # ------------------------------------------------------------------ in the thread of masks

    def _install(self, rule: Rule, mask: np.ndarray) -> None:
        if not rule.closed:
            rule.masks[rule.slot] = mask
            rule.ready = True
            self.settled()

    def _advance(self, moves: Moves) -> None:
        moves = [(rule, token) for rule, token in moves if not rule.closed and not rule.error]
        if not moves:
            return
        rules = list({id(rule): rule for rule, _ in moves}.values())
        try:
            if self._executor is None:
                self._executor = LLExecutor(self._threads)
            if len(rules) == len(moves):
                self._executor.consume_token_par([(rule.matcher, token) for rule, token in moves])
            else:  # drafts that were right: one matcher takes several, in their order
                for rule, token in moves:
                    rule.matcher.consume_token(token)
        except BaseException as error:  # nobody can say which of them have taken their tokens
            self._fail(rules, _told(error))
            return
        tables = {id(rule.masks) for rule in rules}
        for table in tables:  # a borrowed node's stages have one each
            own = [rule for rule in rules if id(rule.masks) == table]
            try:
                self._mask(own)
            except BaseException:
                for rule in own:  # whose fault it is, is found out one by one
                    try:
                        self._mask([rule])
                    except BaseException as error:
                        self._fail([rule], _told(error))

    def _mask(self, rules: Sequence[Rule]) -> None:
        assert self._executor is not None
        places = [(rule.matcher, rule.slot) for rule in rules]
        fill_next_token_bitmask_par(self._executor, places, rules[0].masks)
        for rule in rules:
            rule.error = error_of(rule.matcher)

    def _foresee(self, drafts: Sequence[tuple[Rule, int, Sequence[int]]], foresight: Foresight) -> None:
        """On copies, which cost microseconds: what drafts do to a matcher must never count, errors included."""
        if self._executor is None:
            self._executor = LLExecutor(self._threads)
        for rule, row, tokens in drafts:
            if not rule.ready or rule.closed or rule.error:
                continue
            try:
                place = (rule.matcher.deep_copy(), row, list(tokens))
                fill_next_token_bitmask_par_with_draft_tokens(self._executor, [place], foresight.masks)
                foresight.made[row : row + len(tokens) + 1] = not place[0].is_error()
            except BaseException as error:  # these drafts are not drawn for, and that is all
                log.warning("no masks behind drafts: %s", type(error).__name__)

    def _fail(self, rules: Sequence[Rule], error: str) -> None:
        for rule in rules:
            rule.error = error
        self.settled()


def _told(error: BaseException) -> str:
    """Its text may have some of the grammar in it, which is no log's."""
    log.error("following a grammar failed: %s", type(error).__name__)
    return f"the grammar failed: {error}"
