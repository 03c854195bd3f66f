"""Values that outlive the code that wrote them: what older code does not know survives its rewrite."""

from __future__ import annotations

import copy
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import NewerSchema, PeerError
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys, decode, encode
from controlplane.contract.records import (
    NodeRecord,
    Operation,
    OperationKind,
    OperationState,
    ProcessKind,
    Target,
)
from controlplane.contract.reports import LinkReport, NodeReport
from controlplane.contract.schema import SCHEMA, schema_of
from controlplane.contract.topology import Mode, Move, Pipeline, Stage, Topology
from controlplane.core import events
from controlplane.shell.inbox import Inbox
from controlplane.shell.performer import Performer
from tests.core.control.sim import Sim
from tests.core.control.world import make_config

A, B, C, D = (Member(f"n{k}", f"i{k}") for k in range(4))


def topology(counter: int = 1) -> Topology:
    stages = (Stage(("n0",), (A,), (C,)), Stage(("n1",), (B,), (D,)))
    move = Move(1, D, "op-1")
    return Topology(
        "default",
        counter,
        Mode.REPLICATE,
        (Pipeline("p0", 1, stages, move), Pipeline("p1", 1, (), None)),
        ("n3",),
    )


def raw(value: bytes) -> Any:
    return msgspec.json.decode(value)


def newer(value: bytes, **more: Any) -> Any:
    """As newer code would write it: one more field in every record, at every level."""

    def add(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: add(each) for key, each in item.items()} | {
                "added": {"by": "newer", "here": sorted(item)}
            }
        return [add(each) for each in item] if isinstance(item, list) else item

    return add(raw(value)) | more


def test_a_value_says_its_schema_and_reads_back() -> None:
    value = encode(topology())
    assert schema_of(value) == SCHEMA
    assert next(iter(raw(value))) == "schema", "the first thing that an operator sees in etcdctl"
    assert decode(value, Topology, "k") == topology()
    assert schema_of(msgspec.json.encode(topology())) == 1, "values of the first release do not say"
    assert [schema_of(v) for v in (b"", b"[]", b"{nonsense", b'{"schema":"x"}', b"\xff")] == [0] * 5


def test_what_is_closed_is_written_as_it_is() -> None:
    config = ClusterConfig(run_dir="/r", model="m", etcd=("e:1",))
    assert msgspec.json.decode(encode(config), type=ClusterConfig) == config


def test_unknown_fields_survive_a_rewrite_at_every_level() -> None:
    before = newer(encode(topology()))
    known = decode(msgspec.json.encode(before), Topology, "k")
    p0 = known.pipelines[0]
    stages = (p0.stages[0], msgspec.structs.replace(p0.stages[1], ranks=(D,), replicas=(B,)))
    after = msgspec.structs.replace(
        known,
        counter=2,
        pipelines=(
            known.pipelines[1],
            msgspec.structs.replace(p0, epoch=2, stages=stages),
        ),  # in another order
        retired=(A,),
    )
    written = raw(encode(after, msgspec.json.encode(before)))
    assert decode(msgspec.json.encode(written), Topology, "k") == after, "what is known is what was decided"
    old, new = before["pipelines"][0], written["pipelines"][1]
    assert written["added"] == before["added"]
    assert new["added"] == old["added"]
    assert written["pipelines"][0]["added"] == before["pipelines"][1]["added"]
    assert [stage["added"] for stage in new["stages"]] == [stage["added"] for stage in old["stages"]]
    assert new["stages"][0]["ranks"][0]["added"] == old["stages"][0]["ranks"][0]["added"]
    assert new["move"]["added"] == old["move"]["added"]
    assert new["move"]["to"]["added"] == old["move"]["to"]["added"]


def test_what_belonged_to_another_record_is_not_carried_over() -> None:
    before = newer(encode(topology()))
    known = decode(msgspec.json.encode(before), Topology, "k")
    p0 = known.pipelines[0]
    moved = msgspec.structs.replace(p0, move=Move(0, C, "op-2"))
    swapped = msgspec.structs.replace(p0.stages[0], ranks=(Member("n0", "another"),))
    fresh = Pipeline("p9", 1, ())
    after = msgspec.structs.replace(
        known, pipelines=(msgspec.structs.replace(moved, stages=(swapped, p0.stages[1])), fresh)
    )
    written = raw(encode(after, msgspec.json.encode(before)))["pipelines"]
    assert "added" not in written[0]["move"]
    assert "added" in written[0]["stages"][0], "the stage persists"
    assert "added" not in written[0]["stages"][0]["ranks"][0], "another process"
    assert "added" not in written[1], "another pipeline"


def test_operations_keep_what_they_have(tmp_path: object) -> None:
    targets = (Target(ProcessKind.NODE, A), Target(ProcessKind.CONTROLLER, Member("c1", "x")))
    before = newer(encode(Operation("o1", OperationKind.RESTART, "all", targets=targets)))
    known = decode(msgspec.json.encode(before), Operation, "k")
    done = msgspec.structs.replace(known, state=OperationState.DONE, turn=2)
    written = raw(encode(done, msgspec.json.encode(before)))
    assert written["added"] == before["added"]
    assert [t["member"]["added"] for t in written["targets"]] == [
        t["member"]["added"] for t in before["targets"]
    ]


def test_a_writer_keeps_unknown_fields_and_looks_for_them_only_in_what_others_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[bytes] = []

    def look(value: msgspec.Struct, before: bytes | None = None) -> bytes:
        looked.extend([before] if before is not None else [])
        return encode(value, before)

    monkeypatch.setattr("controlplane.shell.performer.encode", look)
    performer = Performer(cast(Any, None), Keys("k"), "default", Inbox(), cast(Any, None))
    first, second, third, fourth = (Topology("default", k, Mode.REPLICATE, ()) for k in range(4))
    mine = performer._encode("t", second, encode(first))
    assert (mine, looked) == (encode(second), [encode(first)])
    mine = performer._encode("t", third, mine)
    assert (mine, looked) == (encode(third), [encode(first)])
    theirs = msgspec.json.encode(msgspec.json.decode(mine) | {"later": 5})
    mine = performer._encode("t", fourth, theirs)
    assert msgspec.json.decode(mine)["later"] == 5
    mine = performer._encode("t", first, mine)
    assert msgspec.json.decode(mine)["later"] == 5
    assert looked[1:] == [theirs, encode(fourth, theirs)]


def test_newer_code_s_values_are_not_rewritten() -> None:
    before = newer(encode(topology()), schema=SCHEMA + 1)
    known = decode(msgspec.json.encode(before), Topology, "k")
    with pytest.raises(NewerSchema, match=str(SCHEMA + 1)):
        encode(known, msgspec.json.encode(before))


def test_what_older_code_does_not_know_is_kept_as_it_is_written() -> None:
    """A number may be one that this code could not write, or would write in another way."""
    later = b'[0.1000000000000000055511151231257827,1e2,1e999,%b,{"a":1,"a":2},"\\u00e9", {}]' % (b"9" * 5000)
    before = encode(topology()).replace(b'{"node":"n0"', b'{"later":%b,"node":"n0"' % later)
    before = b'%b,"later":%b}' % (before[:-1], later)
    written = encode(topology(2), before)
    assert written.count(later) == before.count(later) == 2
    assert decode(written, Topology, "k") == topology(2)


def test_what_cannot_be_read_is_not_rewritten() -> None:
    for junk in (b"", b"[]", b"{nonsense", b'{"group":"\xff"}', b'{"a":' * 5000, b'{"schema":1}'):
        with pytest.raises(PeerError):
            encode(topology(), junk)


def test_an_unknown_word_is_unknown_and_not_another_one() -> None:
    strange = raw(encode(Operation("o1", OperationKind.DRAIN, "n1"))) | {"state": "suspended"}
    with pytest.raises(PeerError, match="suspended"):
        decode(msgspec.json.encode(strange), Operation, "k")


def test_a_value_of_the_first_release_gets_a_schema_and_loses_nothing() -> None:
    before = msgspec.json.encode(msgspec.json.decode(msgspec.json.encode(topology())) | {"note": "by hand"})
    written = raw(encode(topology(2), before))
    assert (written["schema"], written["note"], written["counter"]) == (SCHEMA, "by hand", 2)


JSON = st.sampled_from([None, True, 0, -5, "", "text", [], [1, {"a": []}], {}, {"schema": 7}, {"id": "p9"}])
EXTRA = st.dictionaries(st.sampled_from(["x", "y", "z1"]), JSON, max_size=2)


@settings(deadline=None, max_examples=100)
@given(extras=st.lists(EXTRA, min_size=4, max_size=4), order=st.permutations(["p0", "p1", "p2"]))
def test_any_field_survives_any_order(extras: list[dict[str, Any]], order: list[str]) -> None:
    pipelines = tuple(Pipeline(name, 1, (Stage(("n0",)),)) for name in ("p0", "p1", "p2"))
    base = Topology("default", 1, Mode.NONE, pipelines)
    before = raw(encode(base))
    for target, extra in zip([before, *before["pipelines"]], extras, strict=True):
        target.update(copy.deepcopy(extra))
    after = msgspec.structs.replace(base, counter=2, pipelines=tuple(base.pipeline(n) for n in order))
    written = raw(encode(after, msgspec.json.encode(before)))
    assert {k: v for k, v in written.items() if k in extras[0]} == extras[0]
    found = {p["id"]: p for p in written["pipelines"]}
    for name, extra in zip(("p0", "p1", "p2"), extras[1:], strict=True):
        assert {k: v for k, v in found[name].items() if k in extra} == extra
    assert [p["id"] for p in written["pipelines"]] == list(order)


def test_records_read_what_newer_code_registers() -> None:
    record = NodeRecord(A, "default", 0, 2, "", "", "d", 64, 16, 1)
    later = newer(encode(record), fault_domain={})  # that one is no record: its keys are labels
    assert decode(msgspec.json.encode(later), NodeRecord, "k") == record


def test_what_a_node_cannot_speak_with_is_a_trouble_in_its_status() -> None:
    sim = Sim(make_config(2, 2))
    sim.run_until(sim.home, limit_s=30)
    node = sim.nodes["n0"]
    links = (
        LinkReport(
            Member("n1", "x"), False, 0.0, "no link: the peer speaks protocol 2, we speak 1", refused=True
        ),
        LinkReport(Member("n2", "x"), False, 0.0, "outgoing link: reset"),
    )
    report = NodeReport(node.member, node.seq + 1, 1.0, 1, links=links, troubles=("a gateway is refused",))
    sim.tell(events.ReportReceived(report))
    status = sim.cores[sim.leader].status(sim.now)
    told = {found.node: found.troubles for found in status.nodes}
    assert told["n0"] == ("a gateway is refused", "no link: the peer speaks protocol 2, we speak 1 (n1)")
    assert told["n1"] == ()
