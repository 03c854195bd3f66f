"""GhostServe's rules by content: whatever links lose, repeat and break, and whoever encodes, in the end every block has
parity in one place, what has gone has none, every loss that the code allows is restored, and no claim is too high."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.repair import Restoring
from controlplane.contract.topology import Mode, Pipeline, Stage, Topology
from dataplane._fast.checksum import crc32
from dataplane.core.encoder import JOB_LIMIT_S, Effect, Encoder, Fetch, Refuse, Send, Solve
from dataplane.core.messages import Fence, RejoinMeta, Shape, ShardAckMeta, ShardDropMeta, ShardQueryMeta
from dataplane.core.parity import (
    ALONE_LIMIT_S,
    ANSWER_LIMIT_S,
    COMPARE_EVERY_S,
    ENCODERS_MIN,
    MINE,
    REFUSED_S,
    WHOLE,
    ShardSource,
    candidates_of,
    clients_of,
    encoders_of,
    partners_of,
    ranked,
)
from dataplane.core.prefix import unpack_names
from dataplane.core.restorer import ATTEMPT_LIMIT_S, QUIET_LIMIT_S, TRIES_MAX, Restorer
from dataplane.parity_bytes import OF_BYTES, ParityBytes

PIPELINE, FENCE = "p", Fence(1)
CODES = [("xor", 1), ("rdp", 2), ("rs", 1), ("rs", 2), ("rs", 3)]


def name_of(number: int) -> bytes:
    return random.Random(number).randbytes(16)


@dataclass
class Place:
    """A node that encodes."""

    encoder: Encoder
    bytes: ParityBytes = field(default_factory=ParityBytes)
    sent: list[tuple[bytes, int, bytes]] = field(default_factory=list)  # name, stage, restored shard
    refused: list[tuple[bytes, int]] = field(default_factory=list)

    def perform(self, effects: list[Effect], payload: bytes = b"", size: int = 0) -> list[Fetch]:
        fetches: list[Fetch] = []
        while effects:
            for effect in effects:
                if isinstance(effect, Send):
                    shard = bytes(self.bytes.restored[effect.key][effect.stage])
                    self.sent.append((effect.key[1], effect.stage, shard))
                elif isinstance(effect, Refuse):
                    self.refused.append((effect.key[1], effect.stage))
                elif isinstance(effect, Fetch):
                    fetches.append(effect)
            work = [effect for effect in effects if isinstance(effect, OF_BYTES)]
            solved = self.bytes.perform(work, memoryview(payload), size)
            solves = [effect for effect in effects if isinstance(effect, Solve)]
            effects = [more for s in solves for more in self.encoder.solved(s.key, solved[s.key])]
        held = sum(len(part) for parts in self.bytes.parities.values() for part in parts)
        assert held == self.encoder.used_bytes
        return fetches


class World:
    """The stages of one pipeline, and nodes that encode. Links keep their order, and may lose, repeat and break."""

    def __init__(self, code: str, parities: int, stages: int, seed: int, room: int = 1 << 20) -> None:
        self.random = random.Random(seed)
        self.sizes = [self.random.choice([7, 24, 40]) for _ in range(stages)]
        self.shape = Shape(code, stages, parities, max(self.sizes))
        self.shapes = [self.shape] * stages  # as each stage has it from its own settings
        self.came = 0  # shards, at encoders
        self.room = room
        self.sources = [ShardSource(index == 0, max(self.sizes)) for index in range(stages)]
        self.places: dict[Member, Place] = {}
        self.links: dict[tuple[int, Member, bool], deque] = {}  # stage, node, whether to it
        self.names: list[set[bytes]] = [set() for _ in range(stages)]
        # Stages whose shard has come since it was dropped.
        self.added: dict[tuple[Member, bytes], set[int]] = {}
        self.were_complete: set[tuple[Member, bytes]] = set()  # had the shards of all stages at some time
        self.now = 0.0
        self.born = 0
        for _ in range(3):
            self.born_one()
        self.place()
        for source in self.sources:
            source.settle()

    def shard(self, name: bytes, stage: int) -> bytes:
        return random.Random(name + bytes([stage])).randbytes(self.sizes[stage])

    def born_one(self) -> None:
        self.born += 1
        self.places[Member(f"e{self.born}", "a")] = Place(Encoder(self.room))

    def place(self) -> None:
        for source in self.sources:
            source.place(tuple(sorted(self.places)), tuple(sorted(self.places)))

    # ------------------------------------------------------------------ what happens

    def put(self, stage: int, node: Member, to: bool, message: object) -> None:
        self.links.setdefault((stage, node, to), deque()).append(message)

    def pump(self) -> None:
        for stage, source in enumerate(self.sources):
            for node in source.must_ask(self.now):
                self.put(stage, node, True, ShardQueryMeta(PIPELINE, FENCE, stage))
            for node, names in source.drops(self.now):
                self.put(stage, node, True, ShardDropMeta(PIPELINE, FENCE, stage, b"".join(names)))
            while (taken := source.take(self.now, 4)) is not None:
                node, names = taken
                for name in names:
                    self.put(stage, node, True, name)
        for node, at in self.places.items():
            for pipeline, stage, news in at.encoder.news():
                parts = (news.added, news.complete, news.damaged, news.full, news.gone, news.left)
                added, complete, damaged, full, gone, left = map(b"".join, parts)
                ack = ShardAckMeta(pipeline, FENCE, added, complete, damaged, full, gone, left)
                self.put(stage, node, False, ack)

    def deliver(self, loss: float = 0.0) -> bool:
        ready = [link for link, queue in self.links.items() if queue]
        if not ready:
            return False
        link = self.random.choice(ready)
        message = self.links[link].popleft()
        if self.random.random() < loss:
            return True
        if self.random.random() < loss:
            self.links[link].appendleft(message)  # once more
        stage, node, to = link
        place = self.places.get(node)
        if place is None:
            return True
        if not to:
            self.claims(node, message)
            self.sources[stage].heard(node, message, self.now)
        elif isinstance(message, ShardQueryMeta):
            self.put(stage, node, False, place.encoder.whole(PIPELINE, stage, FENCE))
        elif isinstance(message, ShardDropMeta):
            for name in unpack_names(message.names):
                self.added.pop((node, name), None)
            place.perform(place.encoder.dropped(PIPELINE, stage, unpack_names(message.names)))
        else:
            self.arrive(place, node, stage, message)
        return True

    def arrive(self, place: Place, node: Member, stage: int, name: bytes) -> None:
        if ranked(name, tuple(sorted(self.places)))[0] != node:
            return
        data = self.shard(name, stage)
        key = PIPELINE, name
        effects = place.encoder.arrived(key, stage, self.shapes[stage], crc32(data), 0, self.now)
        self.came += 1
        place.perform(effects, data, len(data))
        self.added.setdefault((node, name), set()).add(stage)
        if len(self.added[node, name]) == len(self.sources):
            self.were_complete.add((node, name))

    def claims(self, node: Member, ack: ShardAckMeta) -> None:
        for name in unpack_names(ack.complete):
            assert (node, name) in self.were_complete, "said to be complete, with a shard missing"

    def strike(self) -> None:
        pick = self.random.random()
        if pick < 0.55:
            self.names_change(name_of(self.random.randrange(12)), self.random.random() < 0.7)
        elif pick < 0.65:
            link = self.random.choice(list(self.links) or [(0, next(iter(self.places)), True)])
            for to in (True, False):
                self.links.pop((link[0], link[1], to), None)
            self.sources[link[0]].restart(link[1].node)
        elif pick < 0.72:
            self.now += ANSWER_LIMIT_S + 0.1
        elif pick < 0.78 and len(self.places) > 1:
            del self.places[self.random.choice(sorted(self.places))]
            self.place()
        elif pick < 0.84:
            self.born_one()
            self.place()

    def names_change(self, name: bytes, here: bool) -> None:
        """On all stages, but not at the same time."""
        for stage in self.random.sample(range(len(self.sources)), len(self.sources)):
            (self.sources[stage].add if here else self.sources[stage].gone)([name])
            (self.names[stage].add if here else self.names[stage].discard)(name)
            if self.random.random() < 0.5:
                self.pump()
                self.deliver()

    def calm(self) -> None:
        self.links.clear()  # a new epoch: what was on its way is of an older one
        for source in self.sources:
            source.restart()
            source.settle()
        for _ in range(400):
            self.now += 0.05
            self.pump()
            while self.deliver():
                pass
            if not any(source.lag_blocks for source in self.sources) and self.only_once():
                return

    def only_once(self) -> bool:
        there = [name for place in self.places.values() for name in place.encoder.names(PIPELINE)]
        return sorted(there) == sorted(self.names[0])

    # ------------------------------------------------------------------ losses

    def restores(self, name: bytes, lost: tuple[int, ...]) -> list[tuple[bytes, int, bytes]]:
        node = ranked(name, tuple(sorted(self.places)))[0]
        place = self.places[node]
        place.sent.clear()
        place.refused.clear()
        stages = range(len(self.sources))
        asks = [("ask", stage) for stage in lost]
        has = [("has", stage) for stage in stages if stage not in lost] * 2  # some come twice
        lacks = [("lacks", stage) for stage in lost]
        later = [*has, *lacks, *asks[1:]]
        self.random.shuffle(later)
        for what, stage in [*asks[:1], *later]:
            if what == "ask":
                to = Member(f"n{stage}", "a")
                place.perform(place.encoder.asked(PIPELINE, FENCE, stage, to, [name], self.now))
            elif what == "lacks":
                place.perform(place.encoder.lacks(PIPELINE, FENCE, stage, [name]))
            else:
                data = self.shard(name, stage)
                key = PIPELINE, name
                place.perform(place.encoder.survived(key, FENCE, stage, crc32(data), 0), data, len(data))
        place.perform(place.encoder.expire(self.now + 2 * JOB_LIMIT_S))  # whatever rounding does
        assert not place.bytes.restored, "scratch is left behind"
        return list(place.sent)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(CODES), st.integers(1, 5), st.integers(0, 1 << 30))
def test_in_the_end_every_block_is_protected_once(code: tuple[str, int], stages: int, seed: int) -> None:
    world = World(*code, stages, seed)
    for _ in range(150):
        world.strike()
        world.now += 0.01
        world.pump()
        for _ in range(world.random.randrange(8)):
            world.deliver(loss=0.1)
        for source in world.sources:
            assert source.lag_blocks == len(source._names) - len(source.complete())
    world.calm()
    assert not any(source.lag_blocks for source in world.sources)
    assert world.only_once()
    for name in sorted(world.names[0])[:3]:
        for count in range(1, min(code[1], stages) + 1):
            for lost in itertools.combinations(range(stages), count):
                sent = world.restores(name, lost)
                assert lost[0] in {stage for _, stage, _ in sent}
                for got, stage, shard in sent:
                    assert stage in lost
                    assert (got, shard) == (name, world.shard(name, stage))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from([("xor", 1), ("rs", 2)]), st.integers(1, 4), st.integers(0, 1 << 30))
def test_without_room_no_claim_is_too_high_either(code: tuple[str, int], stages: int, seed: int) -> None:
    world = World(*code, stages, seed, room=3 * 40 * code[1])
    for _ in range(150):
        world.strike()
        world.now += 0.01
        world.pump()
        for _ in range(world.random.randrange(8)):
            world.deliver(loss=0.1)
    world.now += COMPARE_EVERY_S  # whatever was lost is made good by then
    for _ in range(200):
        world.now += 0.05
        world.pump()
        while world.deliver():
            pass
    claimed = set().union(*(source.complete() for source in world.sources))
    whole = {
        name
        for place in world.places.values()
        for name in place.encoder.names(PIPELINE)
        if place.encoder.is_complete((PIPELINE, name))
    }
    assert claimed <= whole
    assert all(place.encoder.used_bytes <= world.room for place in world.places.values())


def complete(world: World, name: bytes) -> tuple[Place, Member]:
    for source in world.sources:
        source.add([name])
    world.calm()
    node = ranked(name, tuple(sorted(world.places)))[0]
    assert world.places[node].encoder.is_complete((PIPELINE, name))
    return world.places[node], node


def test_what_an_encoder_said_last_may_be_lost() -> None:
    """A stage that has heard that its shard is in, and nothing since, asks: perhaps all others are in as well. It does
    so among other traffic, too."""
    world = World("xor", 1, 2, 3)
    name = name_of(1)
    source = world.sources[0]
    source.add([name])
    world.calm()
    assert source.lag_blocks == 1, "the other stage has not sent its own"
    node = ranked(name, tuple(sorted(world.places)))[0]
    heard = ShardAckMeta(PIPELINE, FENCE)
    for _ in range(int(ALONE_LIMIT_S / 0.5) + 2):
        world.now += 0.5
        source.heard(node, heard, world.now)
        if node in source.must_ask(world.now):
            break
    else:
        pytest.fail("it never asked")
    source.heard(
        node, ShardAckMeta(PIPELINE, FENCE, whole=True, names=name, flags=bytes([MINE | WHOLE])), world.now
    )
    assert source.lag_blocks == 0
    world.now += 2 * ALONE_LIMIT_S
    assert source.must_ask(world.now) == [], "nothing is left to ask for"


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_stages_of_different_codes_wait_and_are_protected_when_they_agree(stages: int, seed: int) -> None:
    """As in a rolling restart that changes the code: a stage at a time has the new one."""
    world = World("xor", 1, stages, seed)
    names = [name_of(number) for number in range(8)]
    for source in world.sources:
        source.add(names)

    def go_on(seconds: float) -> None:
        for _ in range(int(seconds / 0.05)):
            world.now += 0.05
            world.pump()
            while world.deliver():
                pass

    newer = replace(world.shape, code="rs", parities=2)
    for stage in range(1, stages):  # before anything is coded: one stage is left with the older code
        world.shapes[stage] = newer
    go_on(5 * COMPARE_EVERY_S)
    rounds = 5 * COMPARE_EVERY_S / REFUSED_S + 1
    assert world.came <= 2 * rounds * stages * len(names), "blocks are sent as fast as links take them"
    assert all(source.lag_blocks == len(names) for source in world.sources), "a claim is too high"
    world.shapes[0] = newer
    world.sources[0] = ShardSource(True, max(world.sizes))
    world.place()
    world.sources[0].add(names)
    world.sources[0].settle()
    go_on(2 * COMPARE_EVERY_S + 20)
    assert not any(source.lag_blocks for source in world.sources), "not protected though all have one code"
    for name in names:
        at = world.places[ranked(name, tuple(sorted(world.places)))[0]].encoder
        assert at.shape((PIPELINE, name)) == newer
        assert at.is_complete((PIPELINE, name))
    came = world.came
    go_on(COMPARE_EVERY_S)
    assert world.came == came


def test_parity_stays_when_a_stage_that_is_in_it_has_another_code() -> None:
    world = World("xor", 1, 2, 1)
    name = name_of(1)
    place, _ = complete(world, name)
    world.shapes[1] = replace(world.shape, code="rs")
    data = world.shard(name, 1)
    for now in (world.now, world.now + 100.0):  # once more, as after a break
        arrived = place.encoder.arrived((PIPELINE, name), 1, world.shapes[1], crc32(data), 0, now)
        assert arrived == []
    assert place.encoder.is_complete((PIPELINE, name))
    assert world.restores(name, (1,)) == [(name, 1, data)]


def test_a_block_that_changes_each_time_does_not_keep_the_others_sending() -> None:
    encoder, key, shape = Encoder(1 << 20), (PIPELINE, name_of(1)), Shape("xor", 2, 1, 8)
    sent = [0, 0]
    waits = {0, 1}
    for tick in range(1000):  # 10 s
        for stage in sorted(waits):
            sent[stage] += 1
            encoder.arrived(key, stage, shape, sum(sent) if stage else 0, 0, tick * 0.01)
        waits = {stage for _, stage, news in encoder.news() if news.gone and not news.full}
        if tick % 10 == 0:
            waits.add(1)  # it was damaged on its way, or so
    assert sent[0] <= sent[1] / 2 + 1, "a stage sends again each time another one does"


def test_one_loss_more_than_there_are_parities_is_refused() -> None:
    world = World("rs", 2, 4, 1)
    name = name_of(1)
    place, _ = complete(world, name)
    assert world.restores(name, (0, 1, 2)) == []
    assert {stage for _, stage in place.refused} == {0, 1, 2}


@pytest.mark.parametrize("where", ["parity", "shard"])
def test_a_turned_bit_leads_to_a_refusal(where: str) -> None:
    world = World("rs", 2, 3, 2)
    name = name_of(2)
    place, _ = complete(world, name)
    if where == "parity":
        place.bytes.parities[PIPELINE, name][0][3] ^= 4
        assert world.restores(name, (1,)) == []
        assert place.encoder.checksum_failures == 1
        assert not place.encoder.names(PIPELINE), "it restores nothing: stages send their blocks again"
    else:
        stranger = Member("n1", "a")
        place.perform(place.encoder.asked(PIPELINE, FENCE, 1, stranger, [name], world.now))
        place.perform(place.encoder.survived((PIPELINE, name), FENCE, 0, 12345, 0))
        data = world.shard(name, 2)
        effects = place.encoder.survived((PIPELINE, name), FENCE, 2, crc32(data), 0)
        place.perform(effects, data, len(data))
        # A block that is not what had gone in counts as lost: there is a second parity for it.
        assert place.sent == [(name, 1, world.shard(name, 1))]


# ---------------------------------------------------------------------------------- who asks

ENCODERS = tuple(Member(f"e{i}", "a") for i in range(4))


def asking(*requests: list[bytes]) -> Restorer:
    restorer = Restorer(64)
    rids = tuple(range(len(requests)))
    meta = RejoinMeta(PIPELINE, FENCE, 0, rids, True, tuple(b"".join(names) for names in requests))
    names = {name for each in requests for name in each}
    restorer.begin(meta, b"", dict(enumerate(requests)), dict.fromkeys(names, ENCODERS), 0.0)
    return restorer


def test_requests_go_on_one_after_the_other() -> None:
    a, b, c = map(name_of, range(3))
    restorer = asking([a, b], [c], [a])
    ((_, _, encoder, names),) = restorer.next(0.0, 100)
    assert (encoder, names) == (ENCODERS[0], [a, b, c])
    assert restorer.answers(0.0) == []
    restorer.arrived(PIPELINE, a, 0.1)
    (answer,) = restorer.answers(0.1)
    assert (answer.rids, answer.last) == ((2,), False)
    restorer.arrived(PIPELINE, b, 0.2)
    restorer.arrived(PIPELINE, c, 0.2)
    (answer,) = restorer.answers(0.2)
    assert (answer.rids, answer.last) == ((0, 1), True)
    assert not restorer.pipelines


def test_nobody_waits_for_blocks_behind_one_that_cannot_be_had() -> None:
    a, b = map(name_of, range(2))
    restorer = asking([a, b])
    for encoder in ENCODERS[:TRIES_MAX]:
        asked = restorer.next(0.0, 100)
        assert [each[2] for each in asked] == [encoder]
        restorer.refused(PIPELINE, FENCE, encoder, [a])
        restorer.refused(PIPELINE, FENCE, ENCODERS[-1], [b])  # who was not asked has no say
        if encoder != ENCODERS[TRIES_MAX - 1]:
            assert restorer.answers(0.0) == []
    (answer,) = restorer.answers(0.0)
    assert answer.last


def test_blocks_are_asked_for_together() -> None:
    """An encoder that is at work is asked for no fewer blocks than go into one message, unless they are the last."""
    names = [name_of(number) for number in range(12)]
    restorer = Restorer(64, company=4)
    meta = RejoinMeta(PIPELINE, FENCE, 0, (1,), True, (b"".join(names),))
    restorer.begin(meta, b"", {1: list(names)}, dict.fromkeys(names, ENCODERS), 0.0)
    assert [each[3] for each in restorer.next(0.0, 6)] == [names[:6]]
    for at, name in enumerate(names[:3]):
        restorer.arrived(PIPELINE, name, 0.1 + at / 10)
        assert restorer.next(0.1 + at / 10, 6) == [], "one, two or three would go alone"
    restorer.arrived(PIPELINE, names[3], 0.4)
    assert [each[3] for each in restorer.next(0.4, 6)] == [names[6:10]]
    for name in names[4:6]:
        restorer.arrived(PIPELINE, name, 0.5)
    assert [each[3] for each in restorer.next(0.5, 6)] == [names[10:]], "nothing comes behind these"
    for name in names[6:]:
        restorer.arrived(PIPELINE, name, 0.6)
    assert restorer.answers(0.6)[0].last


def test_an_encoder_that_gets_on_is_not_late() -> None:
    names = [name_of(number) for number in range(3)]
    restorer = asking(names)
    assert len(restorer.next(0.0, 100)) == 1
    restorer.arrived(PIPELINE, names[0], 0.9 * ATTEMPT_LIMIT_S)
    assert restorer.next(1.8 * ATTEMPT_LIMIT_S, 100) == [], "a block has come meanwhile"
    asked = restorer.next(1.95 * ATTEMPT_LIMIT_S, 100)
    assert [(each[2], each[3]) for each in asked] == [(ENCODERS[1], names[1:])]


def test_how_fast_blocks_were_restored_is_known_afterwards() -> None:
    names = [name_of(number) for number in range(5)]
    restorer = asking(names)
    assert restorer.speed.restoring == Restoring()
    for name, at in zip(names, (0.2, 0.2, 0.3, 0.4, 0.5), strict=True):
        restorer.arrived(PIPELINE, name, at)
    assert restorer.answers(0.5)[0].last
    found = restorer.speed.restoring
    assert (found.wait_s, found.block_s, found.blocks) == (pytest.approx(0.2), pytest.approx(0.1), 3)


def test_what_was_not_restored_is_no_measurement() -> None:
    restorer = asking([name_of(1)])
    assert restorer.answers(QUIET_LIMIT_S)[0].last
    assert restorer.speed.restoring == Restoring()


def test_a_stage_that_is_sending_is_not_silent() -> None:
    world = World("xor", 1, 3, 4)
    names = [name_of(1), name_of(2)]
    for source in world.sources:
        source.add(names)
    world.calm()
    encoder = Encoder(1 << 20)
    for name in names:
        for stage in range(3):
            data = world.shard(name, stage)
            encoder.arrived((PIPELINE, name), stage, world.shape, crc32(data), 0, 0.0)
    encoder.asked(PIPELINE, FENCE, 0, Member("n0", "a"), names, 0.0)
    for stage in (1, 2):
        encoder.heard(PIPELINE, stage, 0.9 * JOB_LIMIT_S)
    assert encoder.expire(1.8 * JOB_LIMIT_S) == []
    refused = [effect for effect in encoder.expire(1.95 * JOB_LIMIT_S) if isinstance(effect, Refuse)]
    assert sorted(effect.key[1] for effect in refused) == sorted(names)


def test_no_more_is_asked_for_than_there_is_room_and_all_waiting_ends() -> None:
    names = [name_of(number) for number in range(10)]
    restorer = asking(names)
    asked = restorer.next(0.0, 4)
    assert sum(len(each[3]) for each in asked) == 4
    assert restorer.next(0.0, 4) == []
    assert restorer.answers(QUIET_LIMIT_S - 0.01) == []
    (answer,) = restorer.answers(QUIET_LIMIT_S)
    assert answer.last
    assert not restorer.pipelines


# ---------------------------------------------------------------------------------- who encodes


def member(node: str) -> Member:
    return Member(node, "a")


def topology(*pipelines: list[str], cordoned: tuple[str, ...] = ()) -> Topology:
    """Node pKsI is at home at stage I of pipeline K."""
    made = tuple(
        Pipeline(f"p{k}", 1, tuple(Stage((f"p{k}s{i}",), (member(node),)) for i, node in enumerate(nodes)))
        for k, nodes in enumerate(pipelines)
    )
    return Topology("g", 1, Mode.PARITY, made, cordoned)


def rows(count: int, stages: int) -> list[list[str]]:
    return [[f"p{k}s{i}" for i in range(stages)] for k in range(count)]


def test_encoders_are_few_outside_and_known_to_both_sides() -> None:
    many = topology(*rows(9, 3))
    for pipeline in many.pipelines:
        encoders = encoders_of(many, pipeline.id)
        assert ENCODERS_MIN <= len(encoders) < ENCODERS_MIN + 3
        assert not set(encoders) & set(pipeline.members())
        for encoder in encoders:
            assert pipeline in clients_of(many, encoder)
            assert encoder.node in partners_of(many, next(pipeline.members()))
            assert {m.node for m in pipeline.members()} <= partners_of(many, encoder)
    assert encoders_of(replace(many, mode=Mode.NONE), "p0") == ()
    assert clients_of(replace(many, mode=Mode.NONE), member("p0s0")) == []


def test_a_borrowed_node_encodes_no_more_and_may_still_have_what_it_had() -> None:
    before, after = rows(2, 2), [["p0s0", "p1s1"], ["p1s0", "p1s1"]]
    assert encoders_of(topology(*before), "p0") == (member("p1s0"), member("p1s1"))
    assert encoders_of(topology(*after), "p0") == (member("p1s0"),)
    assert candidates_of(topology(*after), "p0") == (member("p1s0"), member("p1s1"))
    assert topology(*after).pipelines[0] in clients_of(topology(*after), member("p1s1"))
    assert encoders_of(topology(*before, cordoned=("p1s0",)), "p0") == (member("p1s1"),)


def test_who_comes_or_goes_moves_only_what_must_move() -> None:
    names = [bytes([byte]) * 16 for byte in range(256)]
    for gone in ENCODERS:
        left = tuple(m for m in ENCODERS if m != gone)
        for name in names:
            first = ranked(name, ENCODERS)[0]
            assert first == gone or ranked(name, left)[0] == first
    shares = [sum(ranked(name, ENCODERS)[0] == m for name in names) for m in ENCODERS]
    assert min(shares) > 256 / 4 / 2
