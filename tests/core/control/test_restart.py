"""Rolling restart."""

from __future__ import annotations

import pytest

from controlplane.contract.ids import Member
from controlplane.contract.records import OperationState
from controlplane.contract.topology import Mode
from tests.core.control.operating import done, levels
from tests.core.control.sim import Sim, formed


def fresh(sim: Sim, before: dict[str, Member]) -> set[str]:
    return {name for name, member in members(sim).items() if before[name] != member}


def members(sim: Sim) -> dict[str, Member]:
    return {**sim.peers, **{name: node.member for name, node in sim.nodes.items()}}


def test_every_node_is_restarted_and_never_two_of_one_stage_are_away() -> None:
    sim = formed(2, 3)
    before = members(sim)
    answer = sim.submit("restart", "nodes")
    assert answer.accepted, answer
    assert answer.plan[0] == "move p0/0 off n0, restart it, hand back"

    def over() -> bool:
        away = [
            name
            for name, node in sim.nodes.items()
            if not node.alive or (sim.topology is not None and not sim.topology.serving(name))
        ]
        assert len(away) <= 1, away
        assert sim.up()
        return done(sim)

    sim.run_until(over, limit_s=120)
    assert fresh(sim, before) == {f"n{k}" for k in range(6)}
    assert "6 of 6" in " ".join(said(sim))
    sim.run_until(sim.home, limit_s=20)


def said(sim: Sim) -> list[str]:
    return [op.message for op, _ in sim.operations.values()] + sim.messages


def test_the_next_node_waits_for_the_copies() -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes")
    sim.run_until(lambda: sim.nodes["n0"].member != before["n0"], limit_s=10)
    sim.run_until(lambda: sim.serving()[0] == "n0", limit_s=10)
    sim.lag = 10_000
    sim.run(15)
    assert sim.operations["op"][0].turn == 0
    assert "copies" in sim.operations["op"][0].message
    assert fresh(sim, before) == {"n0"}
    sim.lag = 0
    sim.run_until(lambda: done(sim), limit_s=60)


def test_everything_is_restarted_the_leader_last_of_the_controllers() -> None:
    sim = formed(2, 2, controllers=3, gateways=2)
    before = members(sim)
    answer = sim.submit("restart", "all")
    assert [step for step in answer.plan if "c" in step][:3] == [
        "restart c2",
        "restart c3",
        "transfer leadership, restart c1",
    ]
    assert answer.operation is not None
    rest = [target.member.node for target in answer.operation.targets[3:]]
    assert rest == ["n0", "n1", "n2", "n3", "g1", "g2"]  # nodes refuse gateways of newer code
    sim.run_until(lambda: done(sim), limit_s=120)
    assert fresh(sim, before) == set(before)
    assert sim.led == ["c1", "c2"]  # handed over once
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize(("wanted", "told"), [("2", "n0 came back with code 1, not 2"), ("1", "")])
def test_a_restart_fails_at_the_first_process_of_other_code(wanted: str, told: str) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes", version=wanted, settings="s")
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=60)
    operation = sim.operations["op"][0]
    if told:
        assert operation.state is OperationState.FAILED
        assert told in operation.message
        assert fresh(sim, before) == {"n0"}, "the others keep what they have"
    else:
        assert operation.state is OperationState.DONE
        assert fresh(sim, before) == {"n0", "n1", "n2", "n3"}
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize("what", ["code", "settings"])
@pytest.mark.parametrize("scope", ["nodes", "controllers", "gateways", "all"])
def test_a_restart_whose_processes_differ_fails_and_names_them(scope: str, what: str) -> None:
    """Nobody has said what they should be: what is installed changes in the middle."""
    sim = formed(2, 2, controllers=2, gateways=2)
    before = members(sim)
    answer = sim.submit("restart", scope)
    assert answer.operation is not None
    first, second = (target.member.node for target in answer.operation.targets[:2])
    sim.held.add(second)
    sim.run_until(lambda: sim.operations["op"][0].turn == 1, limit_s=30)
    assert fresh(sim, before) == {first}
    sim.installed = ("2", "s") if what == "code" else ("1", "t")
    sim.held.clear()
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=60)
    operation = sim.operations["op"][0]
    assert operation.state is OperationState.FAILED, operation
    old, new = ("1", "2") if what == "code" else ("s", "t")
    assert f"mixed {what}: {old} in {first}, {new} in {second}" in operation.message
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize(
    ("recorded", "why"),
    [
        ({"block_size": 32}, "KV blocks of 32 tokens, the controller's settings say 16"),
        ({"weights_digest": "others"}, "its weights are not those that serve stage 0"),
        ({"stage": 2}, "holds stage 2 of 2, the group has 2"),
    ],
)
def test_a_restart_fails_at_a_fresh_process_that_cannot_serve(recorded: dict[str, object], why: str) -> None:
    """Its turn would never end, and nothing would be wrong with its code or settings."""
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes", version="1", settings="s")
    sim.recorded = recorded
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=30)
    operation = sim.operations["op"][0]
    assert operation.state is OperationState.FAILED
    assert f"n0 cannot serve: {why}" in operation.message
    assert (operation.turn, fresh(sim, before)) == (0, {"n0"})


def test_a_restart_of_other_settings_that_cannot_serve_names_the_settings() -> None:
    sim = formed(2, 2)
    sim.submit("restart", "nodes", version="1", settings="s")
    sim.installed, sim.recorded = ("1", "t"), {"block_size": 32}
    sim.run_until(lambda: not sim.operations["op"][0].open, limit_s=30)
    assert "n0 came back with settings t, not s" in sim.operations["op"][0].message


def test_an_id_is_of_a_restart_of_one_code_and_one_kind_of_settings() -> None:
    sim = formed(2, 2)
    assert sim.submit("restart", "nodes", version="1", settings="s").accepted
    assert sim.submit("restart", "nodes", version="1", settings="s").accepted
    for version, settings in (("2", "s"), ("1", "t"), ("", "")):
        again = sim.submit("restart", "nodes", version=version, settings=settings)
        assert not again.accepted
        assert [check.level for check in again.checks] == ["fail"]


def test_the_only_controller_restarts_itself() -> None:
    sim = formed(controllers=1)
    before = members(sim)
    assert levels(sim, "restart", "controllers")["leader"] == "warn"
    sim.submit("restart", "controllers")
    sim.run_until(lambda: done(sim), limit_s=10)
    assert fresh(sim, before) == {"c1"}


@pytest.mark.parametrize("turns", range(0, 160, 8))
def test_a_new_leader_resumes_a_restart_wherever_it_was(turns: int) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "all")
    sim.run(turns * 0.1)
    sim.kill_leader()
    sim.run_until(lambda: done(sim), limit_s=90)
    assert fresh(sim, before) == set(before)
    sim.run_until(sim.home, limit_s=20)


@pytest.mark.parametrize("turns", range(0, 60, 6))
def test_a_restart_that_is_cancelled_leaves_a_cluster_that_is_whole(turns: int) -> None:
    sim = formed(2, 2)
    sim.submit("restart", "all")
    sim.run(turns * 0.1)
    sim.cancel("op")
    sim.run_until(sim.home, limit_s=30)


@pytest.mark.parametrize("victim", ["n0", "n1", "n2", "n3"])
@pytest.mark.parametrize("turns", range(0, 60, 12))
def test_a_death_in_the_midst_of_a_restart(victim: str, turns: int) -> None:
    sim = formed(2, 2)
    before = members(sim)
    sim.submit("restart", "nodes")
    sim.run(turns * 0.1)
    sim.kill(victim)
    sim.run_until(lambda: done(sim), limit_s=90)
    assert fresh(sim, before) == {"n0", "n1", "n2", "n3"}
    sim.run_until(sim.home, limit_s=20)


def test_a_restart_is_refused_where_nobody_could_take_over() -> None:
    assert levels(formed(1, 2), "restart", "nodes")["stages"] == "fail"
    assert levels(formed(2, 2), "restart", "nodes")["stages"] == "ok"
    assert levels(formed(2, 2), "restart", "everything") == {"scope": "fail"}
    hushed = formed(2, 2)
    hushed.stop("n2")
    hushed.run(0.8)  # n2 is suspected, which may pass
    assert levels(hushed, "restart", "nodes")["stages"] == "warn"
    baseline = formed(2, 2, mode=Mode.STOP_RESTART)
    assert levels(baseline, "restart", "nodes")["mode"] == "fail"
    assert baseline.submit("restart", "gateways").accepted
    baseline.run_until(lambda: done(baseline), limit_s=5)
    sim = formed(2, 2)
    sim.near = False
    sim.submit("drain", "n1")
    assert levels(sim, "restart", "nodes")["operations"] == "fail"


def test_a_canary_and_its_rollback() -> None:
    """One instance alone comes back with what is installed now, and with the old again."""
    sim = formed(3, 2)
    before = members(sim)
    for version, id in (("2", "canary"), ("1", "rollback")):
        sim.installed = (version, "s")
        answer = sim.submit("restart", "p1", id=id, version=version, settings="s")
        assert [step.rpartition(" off ")[2].partition(",")[0] for step in answer.plan] == ["n2", "n3"]
        sim.run_until(lambda id=id: done(sim, id), limit_s=60)
        assert fresh(sim, before) == {"n2", "n3"}
        made = {name: node.record.version for name, node in sim.nodes.items()}
        assert made == {f"n{k}": version if k in (2, 3) else "1" for k in range(6)}
        sim.run_until(sim.home, limit_s=20)
    # One that does not come back as it should ends the canary at its first node.
    sim.installed = ("3", "s")
    sim.submit("restart", "p1", id="broken", version="4", settings="s")
    sim.run_until(lambda: not sim.operations["broken"][0].open, limit_s=60)
    assert sim.operations["broken"][0].state is OperationState.FAILED
    assert sim.nodes["n3"].record.version == "1"


def test_a_canary_of_what_is_not_there_or_goes_is_refused() -> None:
    sim = formed(2, 1)
    assert levels(sim, "restart", "p7") == {"scope": "fail"}
    sim.submit("scale", instances=1)
    sim.run(0.3)
    assert levels(sim, "restart", "p1")["scope"] == "fail"
