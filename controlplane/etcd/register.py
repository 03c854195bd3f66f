"""A process's name in the cluster: one leased key that only one process can hold, through any absence of etcd.

The key is created only if it is absent. One that stands there is taken over only from a process that is certainly
gone: from this very process (an earlier lease of it), from one that has died on this machine, or from one that an
operator or a launcher names. Otherwise its lease has to end first; who waits for that in vain gives up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

import msgspec

from controlplane import process
from controlplane.backoff import Backoff
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError, NameTaken
from controlplane.etcd.lease import LeaseKeeper
from controlplane.etcd.values import Compare, KeyValue, Put
from controlplane.unreadable import UNREADABLE

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
# A dead holder's lease ends within its TTL, or twice that when etcd elects a leader meanwhile.
WAIT_TTLS = 3.0
TELL_AT = 0.4  # of the wait: then no dead holder's lease is left, usually, and etcd is told who waits
TOLD_S = 60  # so long it stands there after it was last told: until the next try of this process's supervisor
TAKE_OVER = "take the name from this incarnation at once, although it may live: it ends when it sees that"


class _Member(msgspec.Struct, frozen=True):
    incarnation: str = ""


class Holder(msgspec.Struct, frozen=True):
    """What any record says of the process that wrote it: nodes have a member, others an incarnation."""

    member: _Member = _Member()
    incarnation: str = ""
    process: str = ""
    pid: int = 0

    @property
    def fresh(self) -> str:
        return self.incarnation or self.member.incarnation

    def __str__(self) -> str:
        return f"incarnation {self.fresh or '?'}, {process.describe(self.process) or f'pid {self.pid}'}"


def holder_of(value: bytes) -> Holder | None:
    """Who wrote a record; None if that cannot be read."""
    try:
        return msgspec.json.decode(value, type=Holder)
    except UNREADABLE:
        return None


class Registration:
    """Keeps `key` = `value` under a lease of `ttl_s`; when the lease is lost, does so again.

    `value` is a record in JSON that has an incarnation. `supersedes`: incarnations that are known to be dead, or that
    an operator wants replaced. `wait_s`: how long to wait for a holder's lease to end (default: `WAIT_TTLS` leases).
    """

    def __init__(
        self,
        client: EtcdClient,
        key: str,
        value: bytes,
        ttl_s: int,
        *,
        supersedes: Collection[str] = (),
        wait_s: float | None = None,
    ) -> None:
        self.key = key
        self.times_registered = 0
        self.free = asyncio.Event()  # nobody else is known to have the name
        self.held = asyncio.Event()  # it has been registered at least once
        self._client = client
        self._value = value
        self._ttl_s = ttl_s
        self._wait_s = WAIT_TTLS * ttl_s if wait_s is None else wait_s
        self._supersedes = frozenset(supersedes) - {""}
        self._mine = holder_of(value) or Holder()
        self._keeper: LeaseKeeper | None = None
        self._revision = 0  # of the write that made the key ours
        self._fenced: asyncio.Event = asyncio.Event()
        self._other = ""  # who has the name now
        self._last_error = ""
        self._told = 0  # lease of the key that says that we wait; 0: there is none
        self._tell_at = 0.0  # when to say it again; monotonic

    async def run(self) -> None:
        """Until cancelled. Raises NameTaken when another process has the name; an etcd that refuses is waited for."""
        while True:
            keeper = await self._register()
            self.times_registered += 1
            self.held.set()
            ends = [asyncio.create_task(e.wait()) for e in (keeper.lost, self._fenced)]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()
            if self._fenced.is_set():
                raise NameTaken(f"{self.key} now belongs to another process ({self._other}): this one ends")
            await self._close_keeper()

    def saw(self, now: KeyValue | None, revision: int) -> None:
        """A watch shows the key as of `revision`: gone (then it is registered again), ours, or somebody else's."""
        if not self._revision or revision <= self._revision:
            return  # older than our own write
        if now is None:
            if self._keeper is not None:
                self._keeper.declare_lost("its key was deleted")
        elif now.mod_revision > self._revision and not self._is_mine(now.value):
            self._other = str(holder_of(now.value) or "a value that cannot be read")
            self._fenced.set()

    def amend(self, **fields: int) -> None:
        """From now on the record says so too: it is registered again, with a new lease."""
        self._value = msgspec.json.encode(msgspec.json.decode(self._value) | fields)
        if self._keeper is not None:
            self._keeper.declare_lost("its record has changed")

    def guard(self) -> tuple[Compare, ...]:
        """The condition that the name is still this process's; one that never holds before it is."""
        return (Compare.mod_revision(self.key, self._revision or -1),)

    async def withdraw(self, timeout_s: float = 1.0) -> None:
        """Give the lease back, so that the key goes at once. Best effort: the lease expires anyway."""
        keeper = self._keeper
        if keeper is None:
            return
        await self._close_keeper()
        try:
            await self._client.lease_revoke(keeper.lease_id, timeout_s=timeout_s)
        except EtcdError as error:
            log.warning("cannot withdraw %s: %s", self.key, error)

    async def _register(self) -> LeaseKeeper:
        """Make the key ours, however long etcd is away. Raises NameTaken."""
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
        waiting_since: float | None = None
        while True:
            try:
                found = await self._client.get(self.key)
                if found is None or self._may_replace(found):
                    self.free.set()
                    if await self._put(found):
                        assert self._keeper is not None
                        await self._untell()
                        return self._keeper
                else:
                    now = time.monotonic()
                    waiting_since = self._wait(found, waiting_since, now)
                    if now - waiting_since > TELL_AT * self._wait_s and now >= self._tell_at:
                        await self._tell(found)
                        self._tell_at = now + TOLD_S / 2
            except EtcdError as error:
                if str(error) != self._last_error:  # once per cause: an outage must not fill the log
                    log.warning("cannot register %s: %s; trying again", self.key, error)
                self._last_error = str(error)
                await self._close_keeper()
            await backoff.pause()

    def _wait(self, found: KeyValue, since: float | None, now: float) -> float:
        """Since when the name is waited for. Raises NameTaken once that has been too long, or if it once was ours."""
        holder = holder_of(found.value)
        who = str(holder) if holder is not None else "a value that cannot be read"
        if self.held.is_set():
            raise NameTaken(f"{self.key} now belongs to another process ({who}): this one ends")
        if since is None:
            log.warning(
                "%s is taken (%s); waiting up to %g s for its lease to end", self.key, who, self._wait_s
            )
            return now
        if now - since > self._wait_s:
            raise NameTaken(
                f"{self.key} is taken by another process ({who}), which lives: its lease has not ended for "
                f"{self._wait_s:g} s. Two processes cannot have one name: stop that one, or give this one another"
            )
        return since

    async def _tell(self, holder: KeyValue) -> None:
        """Let the cluster's status say that two processes want one name: beside the name's folder, under "waiting"."""
        *root, folder, name = self.key.split("/")
        value = {"who": str(holder_of(holder.value) or "unknown"), "by": str(self._mine)}
        lease, _ = await self._client.lease_grant(TOLD_S)
        key = "/".join([*root, "waiting", folder, name])
        await self._client.put(key, msgspec.json.encode(value), lease)
        self._told = lease

    async def _untell(self) -> None:
        """It has the name now. Best effort: what was told ends by itself."""
        if self._told:
            try:
                await self._client.lease_revoke(self._told)
            except EtcdError as error:
                log.warning("cannot take back that %s was waited for: %s", self.key, error)
            self._told = 0

    async def _put(self, found: KeyValue | None) -> bool:
        """Compare-and-set the key to ours; False if it has changed meanwhile."""
        keeper = self._keeper
        if keeper is None or not keeper.valid():
            await self._close_keeper()
            keeper = self._keeper = await self._client.lease_keeper(self._ttl_s)
        unchanged = Compare.mod_revision(self.key, 0 if found is None else found.mod_revision)
        result = await self._client.txn([unchanged], [Put(self.key, self._value, lease=keeper.lease_id)])
        if result.succeeded:
            self._revision = result.revision
            self._last_error = ""
        return result.succeeded

    def _may_replace(self, found: KeyValue) -> bool:
        if self._is_mine(found.value):
            return True
        holder = holder_of(found.value)
        if holder is None:
            return False  # whatever it is, it is not known to be over
        if holder.fresh in self._supersedes:
            return True
        if process.is_dead(holder.process):
            log.info("%s was left by a process that has died (%s)", self.key, holder)
            return True
        return False

    def _is_mine(self, value: bytes) -> bool:
        if value == self._value:
            return True
        holder, mine = holder_of(value), self._mine
        return (
            holder is not None
            and bool(mine.fresh)
            and (holder.fresh, holder.process) == (mine.fresh, mine.process)
        )

    async def _close_keeper(self) -> None:
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            await keeper.close()
