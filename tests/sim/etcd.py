"""A simulated etcd of several members: it speaks etcd's protocol, so that the real client runs against it.

Raft itself is not played: the members that see a majority of each other share one store. What it costs is there: a
member without a majority answers nothing new, an election takes a while, and a write whose answer was lost may have
been applied, or may yet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from grpc import StatusCode as Status

from controlplane.etcd.proto import rpc_pb2
from tests.sim.etcd_store import Lease, Refused, Store
from tests.sim.network import End, Network
from tests.sim.world import Process, World

ELECTION_S = (0.2, 0.6)
NO_LEADER_S = 0.6  # after this a member without a majority says so
COMMIT_S = (0.0003, 0.002)
LATE_S = (0.3, 2.6)
LEASE_CHECK_S = 0.25
TTL_MIN_S = 2  # etcd makes at least one and a half election timeouts of it
NO_LEADER = (Status.UNAVAILABLE, "etcdserver: no leader")
WRITES = ("Put", "DeleteRange", "Txn", "Compact")
REFUSALS = {
    "space": (Status.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"),
    "busy": (Status.RESOURCE_EXHAUSTED, "etcdserver: too many requests"),
    "rights": (Status.PERMISSION_DENIED, "etcdserver: permission denied"),
    "corrupt": (Status.DATA_LOSS, "etcdserver: corrupt cluster"),
}


def refuses(how: str, name: str, request: Any) -> bool:
    """What etcd refuses in such a state. Leases are kept alive in any."""
    match how:
        case "space":  # nothing that would make it larger
            puts = name == "Txn" and any(op.HasField("request_put") for op in request.success)
            return puts or name in ("Put", "LeaseGrant")
        case "busy":
            return name in (*WRITES, "LeaseGrant")
        case _:
            return name in (*WRITES, "LeaseGrant", "LeaseRevoke", "Range")


@dataclass(eq=False)
class _Watch:
    end: End
    call: int
    key: bytes
    range_end: bytes
    seen: int  # the last revision that the watcher was told of


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a majority."""

    end: End
    call: int
    name: str
    request: Any
    late: bool = False


@dataclass(eq=False)
class Member:
    process: Process
    address: str
    calls: dict[tuple[End, int], str] = field(default_factory=dict)
    watches: list[_Watch] = field(default_factory=list)
    waiting: list[_Waiting] = field(default_factory=list)
    alone_since: float | None = None


class SimEtcd:
    """The cluster. `fates` befall the next writes, one each: "lost", "landed" or "late", all without an answer."""

    def __init__(self, world: World, net: Network, size: int = 3) -> None:
        self.store = Store()
        self.refusing = ""  # one of REFUSALS: every member answers so
        self.store.changed = self._changed
        self.members: list[Member] = []
        self.fates: deque[str] = deque()
        self.fated: dict[str, int] = {}
        self.writer: Process | None = None  # whose write is being applied, for checks
        self._world = world
        self._net = net
        self._leader = 0
        self._electing_until = 0.0
        for number in range(size):
            member = Member(world.process(f"e{number}"), net.address())
            self.members.append(member)
            self.start(member)
        self._everybody = set(range(size))
        self._clock = world.process("etcd-clock")
        world.post(LEASE_CHECK_S, self._clock, self._check)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.address for member in self.members)

    # Faults.

    def start(self, member: Member) -> None:
        if not member.process.alive:
            member.process = self._world.process(member.process.name)
        self._net.listen(member.address, member.process, lambda end: self._accept(member, end))

    def kill(self, member: Member) -> None:
        if member.process.alive:
            member.process.alive = False
            self._net.died(member.process)
            member.calls.clear()
            member.watches.clear()
            self._abandon(member)
            self._reconsider()

    def expire(self, lease_id: int) -> None:
        """etcd takes a lease for expired, though its holder has renewed it in time: their clocks disagree."""
        if lease_id in self.store.leases:
            self.store.revoke(lease_id)

    # Majority.

    def majority(self) -> set[int]:
        """The members that can agree now: those that see most others, the leader among them."""
        if self._net.whole and all(m.process.alive and not m.process.paused for m in self.members):
            return self._everybody if self._world.now >= self._electing_until else set()
        ups = [i for i, m in enumerate(self.members) if m.process.alive and not m.process.paused]
        for i in [self._leader, *ups]:
            group = {j for j in ups if i in ups and self._see(i, j)}
            if len(group) * 2 > len(self.members):
                if i != self._leader:
                    self._elect(i)
                return group if self._world.now >= self._electing_until else set()
        return set()

    def _see(self, i: int, j: int) -> bool:
        a, b = (self.members[k].process.name for k in (i, j))
        return i == j or not (self._net.blocked(a, b) or self._net.blocked(b, a))

    def _elect(self, leader: int) -> None:
        low, high = ELECTION_S
        self._leader = leader
        self._electing_until = self._world.now + low + (high - low) * self._world.random.random()
        # A new leader gives every lease its whole time again.
        for lease in self.store.leases.values():
            lease.deadline = self._electing_until + lease.ttl_s

    def _abandon(self, member: Member) -> None:
        """What only this member knew of is gone, or was passed on in time."""
        for each in member.waiting:
            if each.name in WRITES and self._world.random.random() < 0.3:
                self._later(each)
        member.waiting.clear()

    def _reconsider(self) -> None:
        group = self.majority()
        for index, member in enumerate(self.members):
            if not member.process.alive:
                continue
            if index in group:
                member.alone_since = None
                waiting, member.waiting = member.waiting, []
                for each in waiting:
                    if each.name in WRITES and self._world.random.random() < 0.3:
                        continue  # it was never passed on; the client's deadline says so
                    self._apply(member, each)
                for watch in list(member.watches):
                    self._tell(member, watch)
            elif member.alone_since is None:
                member.alone_since = self._world.now

    def _check(self) -> None:
        """A turn of the cluster's own clock."""
        self._reconsider()
        now = self._world.now
        if self.majority():
            for lease in [lease for lease in self.store.leases.values() if lease.deadline < now]:
                self.store.revoke(lease.id)
        else:
            for lease in self.store.leases.values():  # nobody is there to expire them
                lease.deadline = max(lease.deadline, now + lease.ttl_s)
        for member in self.members:
            alone = member.alone_since
            if alone is not None and now - alone >= NO_LEADER_S and not member.process.paused:
                for end, call in list(member.calls):
                    self._end(member, end, call, *NO_LEADER)
                self._abandon(member)
        self._world.post(LEASE_CHECK_S, self._clock, self._check)

    # Requests.

    def _accept(self, member: Member, end: End) -> None:
        end.receive = lambda item: self._receive(member, end, item)
        end.down = lambda _: self._lost(member, end)

    def _lost(self, member: Member, end: End) -> None:
        member.calls = {key: path for key, path in member.calls.items() if key[0] is not end}
        member.watches = [watch for watch in member.watches if watch.end is not end]

    def _receive(self, member: Member, end: End, item: tuple[Any, ...]) -> None:
        what, call, payload = item
        if what == "open":
            path, _ = payload
            member.calls[end, call] = path.rpartition("/")[2]
            return
        name = member.calls.get((end, call))
        if name is None:
            return
        if what == "cancel":
            del member.calls[end, call]
            member.watches = [w for w in member.watches if (w.end, w.call) != (end, call)]
            return
        request = _Waiting(end, call, name, payload)
        index = self.members.index(member)
        group = self.majority()
        if name == "Status":
            self._reply(end, call, self._status(member, index))
        elif index in group:
            low, high = COMMIT_S
            delay_s = low + (high - low) * self._world.random.random() if name in WRITES else 0.0
            self._world.push(
                end.arrive_at(self._world.now + delay_s), member.process, self._serve, (member, request)
            )
        elif member.alone_since is not None and self._world.now - member.alone_since >= NO_LEADER_S:
            self._end(member, end, call, *NO_LEADER)
        else:
            member.waiting.append(request)
            self._reconsider()

    def _serve(self, member: Member, request: _Waiting) -> None:
        if (request.end, request.call) not in member.calls and request.name not in WRITES:
            return
        if self.members.index(member) not in self.majority():
            member.waiting.append(request)
            return
        fate = self.fates.popleft() if self.fates and request.name == "Txn" else ""
        if fate:
            self.fated[fate] = self.fated.get(fate, 0) + 1
        if fate == "late":
            self._later(request)
        elif fate == "landed":
            request.late = True
            self._apply(member, request)
        elif not fate:
            self._apply(member, request)

    def _later(self, request: _Waiting) -> None:
        low, high = LATE_S
        request.late = True
        delay_s = low + (high - low) * self._world.random.random()
        self._world.post(delay_s, self._clock, self._apply, self.members[0], request)

    def _apply(self, member: Member, request: _Waiting) -> None:
        self.writer = request.end.other.process
        try:
            reply = self._answer(member, request)
        except Refused as refused:
            if not request.late:
                self._end(member, request.end, request.call, refused.code, refused.details)
            return
        finally:
            self.writer = None
        if reply is not None and not request.late:
            self._reply(request.end, request.call, reply)

    def _answer(self, member: Member, waiting: _Waiting) -> Any:
        request, store, now = waiting.request, self.store, self._world.now
        if self.refusing and refuses(self.refusing, waiting.name, request):
            self.fated[self.refusing] = self.fated.get(self.refusing, 0) + 1
            raise Refused(*REFUSALS[self.refusing])
        match waiting.name:
            case "Range":
                return store.range(request)
            case "Put":
                return store.put(request)
            case "DeleteRange":
                return store.delete_range(request)
            case "Txn":
                return store.txn(request)
            case "Compact":
                return store.compact(request.revision)
            case "LeaseGrant":
                lease = store.grant(max(TTL_MIN_S, request.TTL), now, self.writer)
                return rpc_pb2.LeaseGrantResponse(header=store.header(), ID=lease.id, TTL=lease.ttl_s)
            case "LeaseRevoke":
                store.revoke(request.ID)
                return rpc_pb2.LeaseRevokeResponse(header=store.header())
            case "LeaseKeepAlive":
                kept = self._renewed(store.leases.get(request.ID), now)
                return rpc_pb2.LeaseKeepAliveResponse(header=store.header(), ID=request.ID, TTL=kept)
            case "Watch":
                return self._watch(member, waiting)
            case name:
                raise AssertionError(f"the client has never called {name}")

    @staticmethod
    def _renewed(lease: Lease | None, now: float) -> int:
        if lease is None:
            return 0
        lease.deadline = now + lease.ttl_s
        return lease.ttl_s

    def _status(self, member: Member, index: int) -> rpc_pb2.StatusResponse:
        header = self.store.header()
        header.member_id = index + 1
        leader = self._leader + 1 if self.majority() else 0
        return rpc_pb2.StatusResponse(
            header=header, version="3.5.sim", leader=leader, dbSize=1, dbSizeInUse=1
        )

    # Watches.

    def _watch(self, member: Member, waiting: _Waiting) -> rpc_pb2.WatchResponse | None:
        request, store = waiting.request, self.store
        if request.WhichOneof("request_union") == "progress_request":
            return rpc_pb2.WatchResponse(header=store.header(), watch_id=-1)
        create = request.create_request
        self._reply(waiting.end, waiting.call, rpc_pb2.WatchResponse(header=store.header(), created=True))
        seen = create.start_revision - 1 if create.start_revision else store.revision
        watch = _Watch(waiting.end, waiting.call, create.key, create.range_end, seen)
        member.watches.append(watch)
        self._tell(member, watch)
        return None

    def _tell(self, member: Member, watch: _Watch) -> None:
        """All that a watcher has not seen, or that it cannot be had any more."""
        store = self.store
        if watch.seen >= store.revision:
            return
        if watch.seen < store.compacted:
            member.watches.remove(watch)
            gone = rpc_pb2.WatchResponse(
                header=store.header(), canceled=True, compact_revision=store.compacted
            )
            self._reply(watch.end, watch.call, gone)
            return
        response = store.news(watch.seen, watch.key, watch.range_end)
        watch.seen = store.revision
        if response is not None:
            self._reply(watch.end, watch.call, response)

    def _changed(self) -> None:
        """Members that are with the majority tell their watchers; the others when they are back: _reconsider."""
        for index in self.majority():
            for watch in list(self.members[index].watches):
                self._tell(self.members[index], watch)

    def _reply(self, end: End, call: int, message: Any) -> None:
        end.send(("message", call, message))

    def _end(self, member: Member, end: End, call: int, code: Status, details: str) -> None:
        member.calls.pop((end, call), None)
        member.watches = [w for w in member.watches if (w.end, w.call) != (end, call)]
        end.send(("end", call, (code, details)))
