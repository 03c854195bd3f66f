"""The account of KV blocks: every block is somebody's, cached or free; what was computed once is found again."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.core.account import Account
from dataplane.core.prefix import PrefixHasher

SIZE = 4


def names(*tokens: int, salt: bytes = b"") -> list[bytes]:
    return PrefixHasher(SIZE, salt).extend(tokens)


# ---------------------------------------------------------------------- names


def test_a_block_is_named_by_all_tokens_up_to_its_end() -> None:
    one, two = names(*range(8))
    assert names(*range(8)) == [one, two]
    assert names(*range(7)) == [one]
    assert names(9, 1, 2, 3, 4, 5, 6, 7)[1] != two, "the second block follows another first one"
    assert names(0, 1, 2, 3, 0, 1, 2, 3)[1] != one, "the same tokens further on"


def test_another_salt_shares_nothing() -> None:
    assert not set(names(*range(8))) & set(names(*range(8), salt=b"a"))


def test_names_come_as_blocks_fill_and_go_when_the_log_is_cut() -> None:
    hasher = PrefixHasher(SIZE)
    assert hasher.extend([1, 2, 3]) == []
    assert hasher.extend([1, 2, 3, 4, 5]) == names(1, 2, 3, 4)
    assert hasher.extend([1, 2, 3, 4, 5, 6, 7, 8]) == names(1, 2, 3, 4, 5, 6, 7, 8)[1:]
    hasher.cut(7)
    assert hasher.extend([1, 2, 3, 4, 5, 6, 7, 9]) == names(1, 2, 3, 4, 5, 6, 7, 9)[1:]


def test_a_token_id_is_four_bytes() -> None:
    assert names(1, 0, 0, 0) != names(256, 0, 0, 0) != names(0, 1, 0, 0)


# ---------------------------------------------------------------------- one request after the other


def computed(account: Account, rid: int, tokens: list[int]) -> int:
    """It begins, gets its blocks and fills them. Returns the blocks that it found."""
    full = names(*tokens)
    found = account.begin(rid, full[: (len(tokens) - 1) // SIZE])
    assert account.grow(rid, -(-len(tokens) // SIZE))
    for index in range(found, len(full)):
        account.seal(rid, index, full[index])
    account.check()
    return found


def test_what_one_request_computed_the_next_one_finds_while_it_runs_and_after_it() -> None:
    account = Account(8)
    assert computed(account, 1, list(range(10))) == 0
    assert computed(account, 2, list(range(10))) == 2
    assert account.used == 4
    account.release(1)
    account.release(2)
    assert (account.used, account.cached) == (0, 2)
    assert computed(account, 3, list(range(9))) == 2
    assert (account.queries, account.hits) == (6, 4)


def test_equal_content_that_two_compute_at_the_same_time_is_kept_once() -> None:
    account, tokens = Account(8), list(range(8))
    full = names(*tokens)
    for rid in (1, 2):
        assert account.begin(rid, full[:1]) == 0
        assert account.grow(rid, 2)
    assert account.used == 4
    account.seal(1, 0, full[0])
    account.seal(2, 0, full[0])
    assert account.used == 3
    account.check()


def test_the_least_recently_used_goes_first_and_of_a_request_its_end() -> None:
    account = Account(6)
    computed(account, 1, list(range(12)))
    account.release(1)
    computed(account, 2, list(range(100, 112)))
    account.release(2)
    assert account.cached == 6
    computed(account, 3, [7] * 8)  # needs two
    assert account.found(names(*range(12))) == 1
    assert account.found(names(*range(100, 112))) == 3


def test_what_a_request_finds_cannot_be_taken_from_it() -> None:
    account = Account(4)
    computed(account, 1, list(range(12)))
    account.release(1)
    wanted = names(*range(12))[:2]
    assert account.needed(wanted, 4) == 4 == account.available
    assert account.begin(2, wanted) == 2
    assert not account.grow(2, 5)
    assert account.grow(2, 4)
    assert account.available == 0
    account.check()


def test_a_smaller_quota_costs_what_is_cached_and_then_asks_for_requests() -> None:
    account = Account(6)
    computed(account, 1, list(range(8)))
    computed(account, 2, [9] * 12)
    account.release(1)
    account.set_quota(2)
    assert (account.cached, account.used, account.available) == (0, 3, -1)
    assert not account.grow(2, 4)
    account.release(2)
    assert (account.cached, account.used) == (2, 0)
    account.check()
    account.set_quota(8)
    assert computed(account, 3, [5] * 32) == 0
    account.check()


def test_rejected_tokens_leave_nothing() -> None:
    account = Account(4)
    computed(account, 1, list(range(6)))
    assert account.grow(1, 3)
    account.cut(1, 2)
    assert account.used == 2
    assert account.grow(1, 4)
    account.check()


def test_after_a_change_of_fence_it_begins_with_what_all_stages_have() -> None:
    account = Account(6)
    computed(account, 1, list(range(12)))
    account.release(1)
    account.reset()
    assert account.found(names(*range(12))) == 0
    shared = names(*range(8))
    assert account.adopt(1, shared)
    assert account.adopt(2, names(*range(12)))
    assert account.used == 3
    account.keep([*shared, *names(*range(50, 74))])
    assert (account.used, account.cached) == (3, 3)
    assert account.evictions == names(*range(50, 74))[3:], "there is no room for the rest"
    assert not account.adopt(3, names(*range(50, 70))), "five, of which three are cached"
    account.release(2)
    assert account.adopt(3, names(*range(50, 66)))
    account.check()


def test_what_a_stage_has_lost_is_found_no_more() -> None:
    account = Account(8)
    computed(account, 1, list(range(12)))
    computed(account, 2, [*range(4), 9, 9, 9, 9])
    account.release(1)
    full = names(*range(12))
    account.forget([full[0], full[2]])
    assert account.found(full) == 2, "somebody has the first: the next step shows what is wrong with it"
    assert account.evictions == [full[2]], "other stages need not keep it either"
    account.check()


def test_without_a_cache_everything_is_given_back() -> None:
    account = Account(8, keeps=False)
    computed(account, 1, list(range(8)))
    assert computed(account, 2, list(range(8))) == 0
    account.release(1)
    account.release(2)
    assert (account.used, account.cached) == (0, 0)
    assert account.evictions == names(*range(8))[::-1]


def test_blocks_of_a_request_that_is_not_here() -> None:
    account = Account(1)
    account.release(5)
    with pytest.raises(KeyError):
        account.grow(5, 1)


# ---------------------------------------------------------------------- any order of everything


class Any(RuleBasedStateMachine):
    """Against what a reader would say by hand: contents by request, and how much there is of all."""

    @initialize(quota=st.integers(1, 12))
    def begin_with(self, quota: int) -> None:
        self.account = Account(quota)
        self.tokens: dict[int, list[int]] = {}
        self.here: set[bytes] = set()  # named blocks that a stage which does as it is told has
        self.rid = 0

    @rule(length=st.integers(1, 20), family=st.integers(0, 2), odd=st.integers(0, 24))
    def start(self, length: int, family: int, odd: int) -> None:
        tokens = [family] * length
        if odd < length:
            tokens[odd] = 7
        full = names(*tokens)
        shareable = full[: (length - 1) // SIZE]
        blocks = -(-length // SIZE)
        fits = self.account.needed(shareable, blocks) <= self.account.available
        self.rid += 1
        found = self.account.begin(self.rid, shareable)
        self._told()
        assert self.here.issuperset(shareable[:found]), "what is found is on every stage"
        grown = self.account.grow(self.rid, blocks)
        assert grown == fits, "`needed` tells whether it fits"
        self._told()
        if not grown:
            self.account.release(self.rid)
            return
        self.tokens[self.rid] = tokens
        for index in range(found, len(full)):
            self._seal(self.rid, index, full[index])

    def _told(self) -> None:
        for name in self.account.evictions:
            assert name in self.here
        self.here.difference_update(self.account.evictions)
        self.account.evictions.clear()

    def _seal(self, rid: int, index: int, name: bytes) -> None:
        self._told()
        self.account.seal(rid, index, name)
        self.here.add(name)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def decode(self, which: int, token: int) -> None:
        rid = sorted(self.tokens)[which % len(self.tokens)]
        tokens = self.tokens[rid]
        if not self.account.grow(rid, len(tokens) // SIZE + 1):
            assert self.account.available <= 0
            return
        tokens.append(token)
        if len(tokens) % SIZE == 0:
            self._seal(rid, len(tokens) // SIZE - 1, names(*tokens)[-1])

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 99), keep=st.integers(0, 20))
    def cut(self, which: int, keep: int) -> None:
        rid = sorted(self.tokens)[which % len(self.tokens)]
        keep = min(keep, len(self.tokens[rid])) // SIZE * SIZE  # what is sealed does not become open
        del self.tokens[rid][keep:]
        self.account.cut(rid, keep // SIZE)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        rid = sorted(self.tokens)[which % len(self.tokens)]
        del self.tokens[rid]
        self.account.release(rid)

    @rule(quota=st.integers(1, 12))
    def resize(self, quota: int) -> None:
        self.account.set_quota(quota)

    @rule()
    def all_stages_are_asked(self) -> None:
        self._told()
        for rid in self.tokens:
            self.account.release(rid)
        self.account.reset()
        for rid, tokens in list(self.tokens.items()):
            if not self.account.adopt(rid, names(*tokens)):
                del self.tokens[rid]
            elif not self.account.grow(rid, -(-len(tokens) // SIZE)):
                self.account.release(rid)
                del self.tokens[rid]
        self.account.keep(sorted(self.here))
        self.here.difference_update(self.account.evictions)
        self.account.evictions.clear()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "account"):
            return
        self.account.check()
        for rid, tokens in self.tokens.items():
            full = names(*tokens)
            assert self.account.found(full) == len(full)
            assert self.here.issuperset(full), "what a request has is not evicted"
            assert self.account.blocks(rid) >= len(full)
        if self.account.used <= self.account.quota:
            assert self.account.used + self.account.cached <= self.account.quota


TestAny = Any.TestCase
TestAny.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---------------------------------------------------------------------- as good as the ideal cache


def test_hits_are_those_of_an_ideal_cache() -> None:
    """Conversations that go on: each turn has all turns before it in its prompt. One request at a time."""
    random, capacity = Random(7), 300
    account, ideal = Account(capacity), OrderedDict[bytes, None]()
    logs: list[list[int]] = [[random.randrange(1000) for _ in range(40)] for _ in range(30)]
    hits = queries = 0
    for rid in range(600):
        log = logs[min(29, int(random.expovariate(0.15)))]
        log += [random.randrange(1000) for _ in range(random.randrange(1, 40))]
        if len(log) > 400:
            del log[40:]
        shareable = names(*log)[: (len(log) - 1) // SIZE]
        queries += len(shareable)
        for name in shareable:
            if name not in ideal:
                break
            hits += 1
        computed(account, rid, log)
        account.release(rid)
        for name in reversed(names(*log)):
            ideal[name] = None
            ideal.move_to_end(name)
        while len(ideal) > capacity:
            ideal.popitem(last=False)
    assert account.queries == queries
    assert account.hits >= 0.98 * hits > 0.3 * queries
