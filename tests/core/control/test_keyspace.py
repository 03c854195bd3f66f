"""The cluster's keys folded once: junk keeps the last good value, is counted and told; who is newer is known."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from controlplane.contract.errors import PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, encode
from controlplane.contract.records import (
    ControllerRecord,
    GatewayRecord,
    Hearing,
    NodeRecord,
    Operation,
    OperationKind,
    Waiting,
)
from controlplane.contract.schema import SCHEMA
from controlplane.contract.topology import Mode, Move, Pipeline, Stage, Topology
from controlplane.etcd import wire
from controlplane.etcd.values import KeyValue, WatchBatch, WatchEvent
from controlplane.keyspace.view import Change, View
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry

KEYS = Keys("k")
N0 = NodeRecord(Member("n0", "a"), "default", 0, 2, "", "", "d", 64, 16, 1)
TOPOLOGY = Topology("default", 3, Mode.REPLICATE, (), retired=(Member("n9", "z"),))
OP = Operation("o1", OperationKind.DRAIN, "n0")


class Store:
    """Revisions as etcd gives them."""

    def __init__(self) -> None:
        self.view = View(KEYS, "default")
        self.revision = 10
        self.created: dict[str, int] = {}

    def event(self, key: str, value: bytes | None) -> WatchEvent:
        self.revision += 1
        if value is None:
            self.created.pop(key, None)
            return WatchEvent(key, self.revision, None)
        created = self.created.setdefault(key, self.revision)
        return WatchEvent(key, self.revision, KeyValue(key, value, created, self.revision, 1, 0))

    def put(self, key: str, value: bytes | None) -> list[Change]:
        return self.view.apply(WatchBatch(self.revision + 1, (self.event(key, value),)))


def test_who_waits_for_a_name_is_told_until_it_has_it() -> None:
    store = Store()
    wait = Waiting("incarnation a, pid 7 on h", "incarnation b, pid 9 on i")
    (change,) = store.put(f"{KEYS.root}waiting/nodes/n0", encode(wait))
    assert (change.name, change.now) == ("nodes/n0", wait)
    (told,) = store.view.troubles()
    assert told.startswith("nodes/n0 belongs to one process (incarnation a, pid 7 on h)")
    assert "(incarnation b, pid 9 on i)" in told
    store.put(f"{KEYS.root}waiting/nodes/n0", None)
    assert store.view.troubles() == []


def test_junk_keeps_the_last_good_value_until_the_key_goes() -> None:
    store = Store()
    view = store.view
    (seen,) = store.put(KEYS.node("n0"), encode(N0))
    assert (seen.folder, seen.name, seen.now) == ("nodes", "n0", N0)
    for count, junk in enumerate(
        (b"{nonsense", b"[]", b"\xff", encode(msgspec.structs.replace(N0, pid="x"))), 1
    ):
        (change,) = store.put(KEYS.node("n0"), junk)
        assert change.unreadable
        assert change.now is None
        assert view.nodes == {"n0": N0}, "unknown is not absent"
        assert view.junk == count
    assert "n0" in "".join(view.troubles())
    wrong = msgspec.structs.replace(N0, member=Member("n1", "a"))
    (change,) = store.put(KEYS.node("n0"), encode(wrong))
    assert "speaks of n1" in change.unreadable
    (seen,) = store.put(KEYS.node("n0"), encode(N0))
    assert (seen.now, seen.unreadable, view.troubles()) == (N0, "", [])
    (gone,) = store.put(KEYS.node("n0"), None)
    assert (gone.now, gone.unreadable, view.nodes) == (None, "", {})


@pytest.mark.parametrize("junk", [
    b'{"id":"o1","kind":"drain","message":"r\xe9paration"}',
    b'{"id":"o1","kind":"drain","later":"r\xe9paration"}',
    b'{"\xff":1,"id":"o1","kind":"drain"}',
    b'{"a":' * 2000,
    b'{"id":"o1","kind":"drain","a":' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"id":"o1","kind":"drain","turn":1' + b"0" * 30 + b"}",
    b'{"id":"o1","kind":"drain","schema":"2"}',
])  # fmt: skip
def test_no_bytes_end_who_reads_them(junk: bytes) -> None:
    store = Store()
    store.put(KEYS.operation("o1"), encode(OP))
    (change,) = store.put(KEYS.operation("o1"), junk)
    assert change.unreadable
    assert store.view.operations["o1"][0] == OP
    assert "operations/o1 cannot be read" in store.view.troubles()[0]


A, P0 = Member("n1", "i"), Pipeline("p0", 3, (Stage(("n0",)),))


@pytest.mark.parametrize(("change", "why"), [
    ({"counter": 10**30}, "no topology has such a counter"),
    ({"counter": 1 << 63}, "no topology has such a counter"),
    ({"counter": -1}, "no topology has such a counter"),
    ({"group": "other"}, "it is of the group other"),
    ({"pipelines": (P0, msgspec.structs.replace(P0, epoch=4))}, "two pipelines are p0"),
    ({"pipelines": (msgspec.structs.replace(P0, epoch=1 << 64),)}, "no pipeline has such an epoch as p0"),
    ({"pipelines": (msgspec.structs.replace(P0, epoch=-1),)}, "no pipeline has such an epoch as p0"),
    ({"pipelines": (msgspec.structs.replace(P0, moved=10**30),)}, "no pipeline has such an epoch as p0"),
    ({"pipelines": (msgspec.structs.replace(P0, move=Move(10**30, A, "")),)}, "such a stage as p0 moves"),
])  # fmt: skip
def test_a_topology_that_cannot_be_is_not_believed_and_nobody_leads_by_it(
    change: dict[str, Any], why: str
) -> None:
    store, key = Store(), KEYS.topology("default")
    store.put(key, encode(TOPOLOGY))
    (seen,) = store.put(key, encode(msgspec.structs.replace(TOPOLOGY, **change)))
    assert why in seen.unreadable
    assert store.view.topology == TOPOLOGY
    registry = Registry(cast(Any, None), KEYS, "default", Inbox())
    registry.view = store.view
    registry._find_obstacle()
    assert why in registry.obstacle
    performer = Performer(cast(Any, None), KEYS, "default", Inbox(), cast(Any, None), store.view)
    with pytest.raises(PeerError, match=why):
        performer._view.parse(key, encode(msgspec.structs.replace(TOPOLOGY, **change)), Topology)


@pytest.mark.parametrize("pipeline", [
    msgspec.structs.replace(P0, stages=()),
    msgspec.structs.replace(P0, epoch=10_000),
    msgspec.structs.replace(P0, move=Move(9, A, "by hand")),
    msgspec.structs.replace(P0, stages=(Stage(()),)),
])  # fmt: skip
def test_what_the_planner_mends_or_names_is_read(pipeline: Pipeline) -> None:
    store = Store()
    topology = msgspec.structs.replace(TOPOLOGY, pipelines=(pipeline,))
    (seen,) = store.put(KEYS.topology("default"), encode(topology))
    assert seen.now == topology


@pytest.mark.parametrize("counter", [10**30, -1])
def test_nobody_makes_the_epochs_go_on_above_what_no_topology_has(counter: int) -> None:
    store = Store()
    store.put(KEYS.hearing("c1"), encode(Hearing("c1", 4, counter)))
    store.put(KEYS.gateway("g1"), encode(GatewayRecord("g1", "", 1, topology_counter=counter)))
    assert store.view.forgotten == 0
    assert len(store.view.unreadable) == 2


@pytest.mark.parametrize(
    "said", ['"2"', "2.0", "2.5", "null", "[2]", '{"major":2}', "-1", "0", '2,"schema":1', "true"]
)
def test_a_value_that_does_not_say_its_schema_clearly_is_unknown(said: str) -> None:
    store, key = Store(), KEYS.topology("default")
    store.put(key, encode(TOPOLOGY))
    later = encode(msgspec.structs.replace(TOPOLOGY, counter=4)).replace(
        b'"schema":1', b'"schema":%b' % said.encode()
    )
    (change,) = store.put(key, later)
    assert change.unreadable
    assert store.view.topology == TOPOLOGY
    with pytest.raises(PeerError):
        encode(TOPOLOGY, later)
    within = encode(TOPOLOGY).replace(b'{"node"', b'{"schema":"theirs","node"')
    (change,) = store.put(key, within)
    assert change.now == TOPOLOGY, "the schema is the outermost object's"


def test_a_key_whose_name_is_no_text_is_told_in_text() -> None:
    store = Store()
    for folder, value in (
        ("operations", b"junk"),
        ("nodes", encode(N0)),
        ("operations", b'{"id":"x","kind":"drain","schema":2}'),
        ("waiting", encode(Waiting("one", "another"))),
        ("controllers", encode(ControllerRecord("c1", "", "", 1))),
        ("hearing", encode(Hearing("c1", 1))),
    ):
        key = wire.key_text(f"{KEYS.root}{folder}/x".encode() + b"\xff")
        (change,) = store.put(key, value)
        assert (change.name, store.view.item(key) is None) == ("x\\xff", False)
        assert msgspec.json.encode([change.name, change.unreadable, store.view.troubles()])
        registry = Registry(cast(Any, None), KEYS, "default", Inbox())
        registry.view = store.view
        registry._find_obstacle()
        assert msgspec.json.encode([registry.obstacle, *store.view.controllers, *store.view.hearing])
        told = "".join(store.view.troubles())
        store.put(key, None)
        assert "x\\xff" in told or folder in ("controllers", "hearing")
        assert store.view.troubles() == []


def test_what_is_written_here_is_not_read_again_and_what_another_writes_is() -> None:
    store, key = Store(), KEYS.topology("default")
    store.put(key, b"{nonsense")
    encoded = encode(TOPOLOGY)
    store.view.writes(key, encoded, TOPOLOGY)
    (seen,) = store.put(key, bytes(bytearray(encoded)))
    assert seen.now is TOPOLOGY
    assert store.view.troubles() == []
    another = msgspec.structs.replace(TOPOLOGY, counter=4)
    (seen,) = store.put(key, encode(another))
    assert seen.now == another
    store.put(key, None)
    (seen,) = store.put(key, encoded)
    assert (seen.now, seen.now is TOPOLOGY) == (TOPOLOGY, False)


def test_unreadable_topology_and_operation_are_kept_and_told() -> None:
    store = Store()
    view = store.view
    store.put(KEYS.topology("default"), encode(TOPOLOGY))
    store.put(KEYS.operation("o1"), encode(OP))
    known_at = store.revision
    store.put(KEYS.topology("default"), b'{"mode":"quantum"}')
    (change,) = store.put(KEYS.operation("o1"), encode(OP).replace(b"running", b"suspended"))
    assert view.topology == TOPOLOGY
    assert view.operations == {"o1": (OP, known_at)}, (
        "with the revision of what was read: a write will not fit"
    )
    assert change.unreadable
    assert view.retired(Member("n9", "z"))
    assert not view.retired(Member("n9", "y"))


def test_newer_values_are_read_as_far_as_they_can_be_and_named() -> None:
    store = Store()
    newer = msgspec.json.encode(msgspec.json.decode(encode(TOPOLOGY)) | {"schema": SCHEMA + 1, "more": 1})
    (change,) = store.put(KEYS.topology("default"), newer)
    assert change.now == TOPOLOGY
    assert store.view.newer == {KEYS.topology("default"): SCHEMA + 1}
    assert "newer code" in store.view.troubles()[0]
    store.put(KEYS.topology("default"), encode(TOPOLOGY))
    assert (store.view.newer, store.view.troubles()) == ({}, [])


def test_a_snapshot_tells_what_is_gone_and_topologies_last() -> None:
    store = Store()
    store.put(KEYS.node("n0"), encode(N0))
    unchanged = store.event(KEYS.node("n1"), encode(msgspec.structs.replace(N0, member=Member("n1", "b"))))
    store.view.apply(WatchBatch(store.revision, (unchanged,)))
    events = (
        store.event(KEYS.topology("default"), encode(TOPOLOGY)),
        store.event(KEYS.operation("o1"), encode(OP)),
        store.event(KEYS.node("n2"), encode(msgspec.structs.replace(N0, member=Member("n2", "c")))),
        unchanged,
    )
    changes = store.view.apply(WatchBatch(store.revision, events, is_snapshot=True))
    assert [(c.folder, c.name, c.now is None) for c in changes] == [
        ("nodes", "n0", True),
        ("nodes", "n2", False),
        ("operations", "o1", False),
        ("groups", "default/topology", False),
    ]
    assert sorted(store.view.nodes) == ["n1", "n2"]


def test_candidates_stand_in_the_order_of_their_keys() -> None:
    store = Store()
    store.put(f"{KEYS.leader}2", encode(ControllerRecord("c2", "", "", 1)))
    store.put(f"{KEYS.leader}1", encode(ControllerRecord("c1", "", "", 1)))
    assert store.view.candidates() == ["c2", "c1"]
    store.put(f"{KEYS.leader}2", b"junk")
    assert store.view.candidates() == ["", "c1"], "somebody leads, and it is not c1"
    store.put(f"{KEYS.leader}2", None)
    assert store.view.candidates() == ["c1"]


def test_others_keys_are_not_looked_at() -> None:
    store = Store()
    other = msgspec.structs.replace(N0, group="other")
    assert store.put(f"{KEYS.root}config", b"junk") == []
    assert store.put(KEYS.topology("other"), b"junk") == []
    assert store.put(KEYS.node("n0"), encode(other)) == []
    assert store.view.junk == 0
    store.put(KEYS.node("n0"), encode(N0))
    (change,) = store.put(KEYS.node("n0"), encode(other))
    assert (change.now, change.unreadable, store.view.nodes) == (None, "", {}), (
        "it was ours, and is no longer"
    )
