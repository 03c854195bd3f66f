"""KV protected by parity (GhostServe, arXiv 2605.00831): where it is kept, and what of one stage's is there.

Full blocks have names, equal on all stages, and never change. So a chunk is a named block, its shards are that block on
the N stages of a pipeline, and K parities over them are kept under that name by one node outside the pipeline, its
encoder. Every node finds the same encoder for a name, from the topology alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from controlplane.contract.ids import Member, NodeId, PipelineId
from controlplane.contract.topology import Mode, Pipeline, Topology
from dataplane.core.messages import ShardAckMeta
from dataplane.core.prefix import unpack_names

ENCODERS_MIN = 8  # of a pipeline, where there are so many nodes outside it: more would be more links
WINDOW_BLOCKS = 64  # sent to an encoder and not acknowledged ...
WINDOW_BYTES = 32 << 20  # ... and no more bytes than that, but two blocks in any case
PUSH_EVERY_S = 0.02  # blocks go in company
ANSWER_LIMIT_S = 2.0  # without an answer: ask again what the encoder has
# For so long other stages' shards of a name may be missing before it is asked whether they still are: what the encoder
# said of it may be lost.
ALONE_LIMIT_S = 5.0
# So often it is asked for all that it has: its word that a name is gone may be lost, too.
COMPARE_EVERY_S = 60.0
# A name that it has refused is not sent again for so long, however often it is asked for all that it has meanwhile.
REFUSED_S = 30.0
# What an encoder says of a name when it is asked for all of them.
MINE, WHOLE = 1, 2


# ---------------------------------------------------------------------------------- where it is kept


def encoders_of(topology: Topology, pipeline: PipelineId, former: bool = False) -> tuple[Member, ...]:
    """Who keeps the parity of a pipeline: the members of the next ones in the topology's order, of as many as have
    ENCODERS_MIN of them, that are not in the pipeline themselves. `former`: also those that serve a stage of it in the
    place of its home, as if they did not: what they had encoded before that they have still."""
    if topology.mode is not Mode.PARITY:
        return ()
    order = topology.pipelines
    at = next((i for i, each in enumerate(order) if each.id == pipeline), None)
    if at is None:
        return ()
    inside = {
        member.node
        for stage in order[at].stages
        for member in stage.ranks
        if not former or member.node in stage.homes
    }
    shut = {*topology.cordoned, *topology.leaving, *(member.node for member in topology.retired)}
    found: dict[Member, None] = {}
    for step in range(1, len(order)):
        found |= {
            member: None
            for member in order[(at + step) % len(order)].members()
            if member.node not in inside and member.node not in shut
        }
        if len(found) >= ENCODERS_MIN:
            break
    return tuple(sorted(found))


def candidates_of(topology: Topology, pipeline: PipelineId) -> tuple[Member, ...]:
    """Who may have parity of a pipeline: who is to have it now, or was before nodes were borrowed."""
    return tuple(sorted({*encoders_of(topology, pipeline), *encoders_of(topology, pipeline, former=True)}))


def clients_of(topology: Topology, me: Member) -> list[Pipeline]:
    """The pipelines whose parity a node may have. Its work depends on what the node serves, not on the group's size."""
    if topology.mode is not Mode.PARITY:
        return []
    order, found = topology.pipelines, dict[PipelineId, Pipeline]()
    for at, served in enumerate(order):
        if any(me in stage.ranks for stage in served.stages):
            # Each has a member at least, unless it is down. Its own too: the node may be borrowed.
            for step in range(min(len(order), 2 * ENCODERS_MIN)):
                pipeline = order[at - step]
                if me in candidates_of(topology, pipeline.id):
                    found[pipeline.id] = pipeline
    return list(found.values())


def partners_of(topology: Topology, me: Member) -> set[NodeId]:
    """Whom a node exchanges shards with, besides who is named by its own pipelines: encoders and clients."""
    served = [p.id for p in topology.pipelines if any(me in stage.ranks for stage in p.stages)]
    nodes = {member.node for pipeline in served for member in candidates_of(topology, pipeline)}
    nodes |= {member.node for pipeline in clients_of(topology, me) for member in pipeline.members()}
    return nodes - {me.node}


@lru_cache(maxsize=256)
def ranking(members: tuple[Member, ...]) -> tuple[tuple[Member, ...], ...]:
    """For each first byte of a name the members by rendezvous hashing: who comes or goes changes the first of them
    only for what goes to, or comes from, that one. (Names are hashes: a byte of them spreads well enough.)"""

    def weight(byte: int, member: Member) -> bytes:
        return hashlib.blake2b(f"{byte} {member.node}".encode(), digest_size=8).digest()

    return tuple(
        tuple(sorted(members, key=lambda member: weight(byte, member), reverse=True)) for byte in range(256)
    )


def ranked(name: bytes, members: tuple[Member, ...]) -> tuple[Member, ...]:
    """Members by how likely they are to have the parity of this name; the first is its encoder."""
    return ranking(members)[name[0]]


# ---------------------------------------------------------------------------------- what of a stage is there

WAITS, FLIES, IN, COMPLETE, REFUSED = range(5)


@dataclass(slots=True)
class _Line:
    """What there is between the stage and one encoder."""

    known: bool = False  # it has said what it has
    asked_at: float | None = None
    heard_at: float = 0.0
    compared_at: float = 0.0  # it said then all that it has
    next_at: float = 0.0
    waiting: dict[bytes, None] = field(default_factory=dict)  # to be sent, oldest first
    flying: dict[bytes, None] = field(default_factory=dict)  # sent, and nothing is heard of them
    # It has our shard and not those of all others: since when it said so.
    alone: dict[bytes, float] = field(default_factory=dict)
    refused: dict[bytes, float] = field(default_factory=dict)  # it has not taken them, then
    untold: dict[bytes, None] = field(default_factory=dict)  # gone, which it has to be told
    leaving: dict[bytes, float] = field(default_factory=dict)  # it has been told so, then
    strangers: set[bytes] = field(default_factory=set)  # it has them, and they were not here when it said so


class ShardSource:
    """One stage of one pipeline: which of its named blocks are in which encoder's parity. `leads`: of all stages, this
    one looks after what others have left behind."""

    def __init__(self, leads: bool, block_bytes: int) -> None:
        self.leads = leads
        self.refusals = 0
        self._window = max(2, min(WINDOW_BLOCKS, WINDOW_BYTES // block_bytes))
        self._encoders: tuple[Member, ...] = ()
        self._lines: dict[Member, _Line] = {}
        self._names: dict[bytes, int] = {}
        self._complete = 0  # of these, COMPLETE ones
        # May have parity of a name whose encoder is another now.
        self._elsewhere: dict[bytes, set[Member]] = {}
        self._settled = False  # all requests that are alive have been heard of in this epoch
        self._turn = 0

    # ------------------------------------------------------------------ what is here

    def add(self, names: Iterable[bytes]) -> None:
        """These blocks are here, full and named."""
        for name in names:
            if name not in self._names:
                self._names[name] = WAITS
                if self._encoders:
                    line = self._line(name)
                    line.untold.pop(name, None)
                    line.waiting[name] = None

    def gone(self, names: Iterable[bytes]) -> None:
        """These are not here any more."""
        for name in names:
            state = self._names.pop(name, None)
            self._complete -= state == COMPLETE
            if state is None or not self._encoders:
                continue
            line = self._line(name)
            line.waiting.pop(name, None)
            line.flying.pop(name, None)
            line.alone.pop(name, None)
            line.refused.pop(name, None)
            line.untold[name] = None
            self._tell_elsewhere(name)

    def settle(self) -> None:
        """Every request that is alive has been heard of: parity of what is not here is nobody's."""
        self._settled = True
        for line in self._lines.values():
            self._tell_strangers(line)

    def complete(self) -> set[bytes]:
        """What can be restored, as far as encoders have said so."""
        return {name for name, state in self._names.items() if state == COMPLETE}

    @property
    def lag_blocks(self) -> int:
        """Named blocks that could not be restored now."""
        return len(self._names) - self._complete

    # ------------------------------------------------------------------ encoders and links

    def place(self, encoders: tuple[Member, ...], others: tuple[Member, ...]) -> None:
        """Who encodes from now on; `others` may have parity from before."""
        if encoders != self._encoders:
            before, self._encoders = self._encoders, encoders
            for name in self._names:
                old = ranked(name, before)[0] if before else None
                new = ranked(name, encoders)[0] if encoders else None
                if old == new:
                    continue
                if old is not None and old in self._lines:
                    self._lines[old].waiting.pop(name, None)
                    self._lines[old].flying.pop(name, None)
                    self._lines[old].alone.pop(name, None)
                    self._lines[old].refused.pop(name, None)
                    if self.leads:  # other stages' shards may be there
                        self._elsewhere.setdefault(name, set()).add(old)
                self._complete -= self._names[name] == COMPLETE
                self._names[name] = WAITS
                if new is not None:
                    self._lines.setdefault(new, _Line()).waiting[name] = None
        # In the same order each time, which a set would not have.
        wanted = dict.fromkeys((*encoders, *others))
        self._lines = {m: line for m, line in self._lines.items() if m in wanted}
        for member in wanted:
            self._lines.setdefault(member, _Line())
        self._elsewhere = {name: left for name, ms in self._elsewhere.items() if (left := ms & wanted.keys())}

    def restart(self, node: NodeId | None = None) -> None:
        """The fence changed, or a link did: what was on its way may be lost. Encoders are asked what they have."""
        self._settled = self._settled and node is not None
        for member, line in self._lines.items():
            if node in (None, member.node):
                line.known, line.asked_at = False, None
                line.refused.clear()

    def must_ask(self, now: float) -> list[Member]:
        """Encoders to send a query to now."""
        asked = []
        for member, line in self._lines.items():
            told_at = next(iter(line.leaving.values()), now)
            silent = bool(line.flying) and now - line.heard_at > ANSWER_LIMIT_S
            alone_at = next(iter(line.alone.values()), now)
            old = bool(self._names) and now - line.compared_at > COMPARE_EVERY_S
            if line.known and (
                silent or old or now - told_at > ANSWER_LIMIT_S or now - alone_at > ALONE_LIMIT_S
            ):
                line.known, line.asked_at = False, None
            if not line.known and (line.asked_at is None or now - line.asked_at >= ANSWER_LIMIT_S):
                line.asked_at = now
                asked.append(member)
        return asked

    # ------------------------------------------------------------------ sending

    def take(self, now: float, limit: int) -> tuple[Member, list[bytes]] | None:
        """The next blocks to send to one encoder, `limit` at most; they are on their way then."""
        members = list(self._lines)
        for _ in members:
            self._turn = (self._turn + 1) % len(members)
            member = members[self._turn]
            line = self._lines[member]
            room = min(limit, self._window - len(line.flying))
            if not line.known or not line.waiting or room <= 0 or now < line.next_at:
                continue
            names = list(line.waiting)[:room]
            if not line.flying:
                line.heard_at = now  # nothing was outstanding: the wait for an answer begins
            for name in names:
                del line.waiting[name]
                line.flying[name] = None
                self._names[name] = FLIES
            if not line.waiting:
                line.next_at = now + PUSH_EVERY_S
            return member, names
        return None

    def drops(self, now: float) -> list[tuple[Member, list[bytes]]]:
        """What encoders have to be told is gone. Behind all shards that were taken before."""
        told = []
        for member, line in self._lines.items():
            if line.known and line.untold:
                names, line.untold = [name for name in line.untold if self._mine(name, member) is None], {}
                line.leaving |= dict.fromkeys(names, now)
                if names:
                    told.append((member, names))
        return told

    # ------------------------------------------------------------------ answers

    def heard(self, encoder: Member, meta: ShardAckMeta, now: float) -> None:
        line = self._lines.get(encoder)
        if line is None:
            return
        line.heard_at = now
        if meta.whole:
            self._compare(encoder, line, meta)
        if not line.known:
            return
        for name in unpack_names(meta.left):
            line.leaving.pop(name, None)
            if self._mine(name, encoder) in (
                IN,
                COMPLETE,
            ):  # it is back, and an answer of before has been taken
                self._put(line, name, WAITS)
        for name in unpack_names(meta.gone):
            if self._mine(name, encoder) in (FLIES, IN, COMPLETE):
                self._put(line, name, WAITS)
        for name in unpack_names(meta.damaged):
            if self._mine(name, encoder) is not None:
                self._put(line, name, WAITS)
        for name in unpack_names(meta.full):
            if self._mine(name, encoder) is not None:
                self.refusals += 1
                self._put(line, name, REFUSED)
        for name in unpack_names(meta.added):
            if self._mine(name, encoder) == FLIES:
                self._put(line, name, IN)
        for name in unpack_names(meta.complete):
            if self._mine(name, encoder) in (FLIES, IN):
                self._put(line, name, COMPLETE)

    def _compare(self, encoder: Member, line: _Line, meta: ShardAckMeta) -> None:
        """All that the encoder has of this pipeline."""
        line.known, line.compared_at = True, line.heard_at
        there = dict(zip(unpack_names(meta.names), meta.flags, strict=True))
        line.untold |= {name: None for name in line.leaving if name in there}  # what was said is lost
        line.leaving.clear()
        for name in self._names:
            if self._mine(name, encoder) is not None:
                flags = there.get(name, 0)
                refused_at = line.refused.get(name, -math.inf)
                if not flags & MINE and line.heard_at - refused_at < REFUSED_S:
                    continue
                self._put(line, name, COMPLETE if flags == MINE | WHOLE else IN if flags & MINE else WAITS)
        line.strangers.clear()
        for name in there.keys() - self._names.keys():
            if name not in line.untold:
                line.strangers.add(name)
        if self.leads:
            for name in there.keys() & self._names.keys():
                if self._mine(name, encoder) is not None:
                    continue
                if self._names[name] == COMPLETE:
                    line.untold[name] = None
                else:
                    self._elsewhere.setdefault(name, set()).add(encoder)
        if self._settled:
            self._tell_strangers(line)

    def _tell_strangers(self, line: _Line) -> None:
        if self.leads:
            line.untold |= dict.fromkeys(sorted(line.strangers - self._names.keys()))
            line.strangers.clear()

    def _put(self, line: _Line, name: bytes, state: int) -> None:
        self._complete += (state == COMPLETE) - (self._names[name] == COMPLETE)
        self._names[name] = state
        line.flying.pop(name, None)
        line.alone.pop(name, None)
        line.refused.pop(name, None)
        if state == REFUSED:
            line.refused[name] = line.heard_at
        if state == IN:
            line.alone[name] = line.heard_at
        if state == WAITS:
            line.waiting[name] = None
        else:
            line.waiting.pop(name, None)
        if state == COMPLETE:
            self._tell_elsewhere(name)

    def _tell_elsewhere(self, name: bytes) -> None:
        """Parity of this name is needed nowhere but with its encoder."""
        home = ranked(name, self._encoders)[0]
        for member in sorted(self._elsewhere.pop(name, ())):
            if member != home and member in self._lines:
                self._lines[member].untold[name] = None

    def _mine(self, name: bytes, encoder: Member) -> int | None:
        """The state of a name whose encoder this is; None: it is not, or the name is not here."""
        state = self._names.get(name)
        if state is None or not self._encoders or ranked(name, self._encoders)[0] != encoder:
            return None
        return state

    def _line(self, name: bytes) -> _Line:
        return self._lines.setdefault(ranked(name, self._encoders)[0], _Line())
