"""Leadership under a prefix of etcd: one leased key a candidate, the lowest create-revision leads.

Two safeguards, both needed. The holder stops by its own clock before etcd can have given the lease up; and
every write it makes carries `guard()`, so that one which was delayed past that moment changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from controlplane.backoff import Backoff
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError, EtcdLeaseGone, EtcdUnavailable, EtcdUnknown
from controlplane.etcd.lease import LeaseKeeper
from controlplane.etcd.values import Compare, Get, KeyValue, Put, Snapshot, fold
from controlplane.etcd.watch import Watch

log = logging.getLogger(__name__)

LEADER_TTL_S = 2
RESIGN_TIMEOUT_S = 1.0
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads. `identity` is what the candidate wrote (JSON); `term` is the create-revision of its key,
    which only grows from one leader to the next."""

    key: str
    identity: bytes
    term: int


def leader_of(items: Mapping[str, KeyValue]) -> Leader | None:
    """The leader among the candidates' keys, or None if there is no candidate."""
    first = min(items.values(), key=lambda kv: kv.create_revision, default=None)
    return None if first is None else Leader(first.key, first.value, first.create_revision)


class Leadership:
    """A candidate's key and, once `Election.campaign` has returned it, the right to lead."""

    def __init__(self, client: EtcdClient, keeper: LeaseKeeper, key: str, create_revision: int) -> None:
        self.key = key
        self.create_revision = create_revision
        self._client = client
        self._keeper = keeper
        self._watch: Watch | None = None
        self._follower: asyncio.Task[None] | None = None

    @property
    def lost(self) -> asyncio.Event:
        """Set when leadership has ended, whatever the cause; it never comes back."""
        return self._keeper.lost

    @property
    def lost_reason(self) -> str:
        return self._keeper.lost_reason

    @property
    def lease_id(self) -> int:
        return self._keeper.lease_id

    def valid(self) -> bool:
        """Whether one may act as leader at this moment. Ask right before each effect, not once a turn."""
        return self._keeper.valid()

    def remaining_s(self) -> float:
        return self._keeper.remaining_s()

    def guard(self) -> Compare:
        """The condition that every write of a leader includes."""
        return Compare.create_revision(self.key, self.create_revision)

    def give_up(self, why: str) -> None:
        """Stop leading at once; `lost` is set, and whoever waits for it has to `resign`."""
        self._keeper.declare_lost(why)

    async def resign(self) -> None:
        """Stop leading at once, then let others know. Never raises for etcd: the lease ends by itself."""
        await self._keeper.close()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        try:
            await self._client.lease_revoke(self.lease_id, timeout_s=RESIGN_TIMEOUT_S)
        except EtcdError as error:
            log.warning("leadership %s not handed over at once: %s", self.key, error)

    async def wait_won(self, prefix: str) -> bool:
        """Wait until every earlier candidate is gone: True; False if the lease is lost first."""
        won = asyncio.get_running_loop().create_future()
        follower = asyncio.create_task(self._follow(prefix, won), name=f"etcd-election-{self.key}")
        self._follower = follower
        self._keeper.on_lost(lambda _: follower.cancel())
        ended = asyncio.create_task(self.lost.wait())
        try:
            await asyncio.wait({won, ended}, return_when=asyncio.FIRST_COMPLETED)
            return won.done() and self.valid()
        finally:
            ended.cancel()

    async def _follow(self, prefix: str, won: asyncio.Future[None]) -> None:
        """Watch the candidates as long as the lease lives."""
        items: dict[str, KeyValue] = {}
        try:
            async with aclosing(self._client.watch_prefix(prefix)) as watch:
                async for batch in watch:
                    items = fold(items, batch)
                    mine = items.get(self.key)
                    if mine is None or mine.create_revision != self.create_revision:
                        self._keeper.declare_lost("its key was deleted")
                        return
                    leader = leader_of(items)
                    # Keys older than ours cannot appear later, so even an old view cannot make two winners.
                    if leader is not None and leader.key == self.key and not won.done():
                        won.set_result(None)
        finally:
            self._keeper.declare_lost("the watch over the candidates ended")


class Election:
    """One candidate. `identity` is shown to everyone by `observe` and on the operators' pages.

    `guards` gives conditions under which alone it may stand: that its name is its own.
    """

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        identity: bytes,
        *,
        ttl_s: int = LEADER_TTL_S,
        guards: Callable[[], Sequence[Compare]] = tuple,
    ) -> None:
        self._guards = guards
        self.prefix = prefix
        self.identity = identity
        self.last_error = ""  # why the last candidacy failed, while none has won since
        self.campaigns = 0  # times a candidacy was begun: grows when etcd was away for longer than the TTL
        self._client = client
        self._ttl_s = ttl_s

    async def campaign(self) -> Leadership:
        """Wait, for as long as it takes, until this candidate leads. Cancelling withdraws the candidacy."""
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        while True:
            self.campaigns += 1
            try:
                leadership = await self._stand(await self._client.lease_keeper(self._ttl_s))
            except EtcdError as error:  # away, or it refuses (no space, no rights): an operator can mend that
                self._note(error)
            else:
                if leadership is not None:
                    self.last_error = ""
                    return leadership
            await backoff.pause()

    def _note(self, error: EtcdError) -> None:
        if str(error) != self.last_error:  # once per cause: an outage must not fill the log
            log.warning("cannot stand for election: %s; trying again", error)
        self.last_error = str(error)

    async def observe(self) -> AsyncIterator[Leader | None]:
        """The leader now, then each change; None while there is no candidate."""
        items: dict[str, KeyValue] = {}
        known: Leader | None = None
        begun = False
        async with aclosing(self._client.watch_prefix(self.prefix)) as watch:
            async for batch in watch:
                items = fold(items, batch)
                leader = leader_of(items)
                if not begun or leader != known:
                    begun, known = True, leader
                    yield leader

    async def _stand(self, keeper: LeaseKeeper) -> Leadership | None:
        """One candidacy on one lease; None if the lease was lost before it won."""
        key = f"{self.prefix}{keeper.lease_id:016x}"
        leadership: Leadership | None = None
        won = False
        try:
            created = await self._create(keeper, key)
            if created is None:
                return None
            leadership = Leadership(self._client, keeper, key, created)
            won = await leadership.wait_won(self.prefix)
            return leadership if won else None
        finally:
            if not won:
                await (leadership or Leadership(self._client, keeper, key, 0)).resign()

    async def _create(self, keeper: LeaseKeeper, key: str) -> int | None:
        """Create our key; its create-revision, or None if the lease ended first or a guard does not hold.

        The key carries the lease's id, so it can only be ours, and creating it again after an unknown
        outcome finds it.
        """
        put = Put(key, self.identity, lease=keeper.lease_id)
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        while keeper.valid():
            try:
                compares = [Compare.absent(key), *self._guards()]
                result = await self._client.txn(compares, [put], [Get(key)], timeout_s=1.0)
            except EtcdLeaseGone:
                return None
            except (EtcdUnknown, EtcdUnavailable) as error:
                log.info("candidate key not known to be written: %s; trying again", error)
                await backoff.pause()
                continue
            if result.succeeded:
                return result.revision
            (found,) = result.results
            if isinstance(found, Snapshot) and key in found.items:
                return found.items[key].create_revision
            log.info("not a candidate yet: its own name is not registered")
            return None
        return None
