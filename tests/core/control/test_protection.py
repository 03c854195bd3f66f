"""What the loss of each node would cost now."""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig, ParityConfig
from controlplane.contract.ids import Member
from controlplane.contract.incidents import Affected, Incident
from controlplane.contract.protection import Loss
from controlplane.contract.repair import Restoring
from controlplane.contract.status import ClusterStatus, NodeState, PipelineStatus
from controlplane.contract.topology import Mode
from controlplane.core.protection import protection
from tests.core.counting import lines
from tests.web.admin_service import healthy

SIZE, BLOCK_BYTES = 16, 4096
CONFIG = ClusterConfig("run", "model", ("127.0.0.1:1",))
BUSY = {"tokens": 1000, "tail_tokens": 60, "token_s": 0.002, "step_s": 0.05}
FAILURE = Incident(
    1, "n0", "a", "gone", 10.0, 0.1, (Affected("p0", 3, "", plan_s=0.02, connect_s=0.03, ended_unix_s=11.0),)
)


RESTORING = Restoring(wait_s=0.02, block_s=0.001, blocks=9)


def coded(status: ClusterStatus, *, restoring: Restoring = RESTORING) -> ClusterStatus:
    """With parity in the place of copies; a node has had blocks restored."""
    pipelines = tuple(
        replace(p, stages=tuple(replace(stage, replicas=()) for stage in p.stages)) for p in status.pipelines
    )
    nodes = (*status.nodes[:-1], replace(status.nodes[-1], restoring=restoring))
    return replace(status, mode=Mode.PARITY, pipelines=pipelines, nodes=nodes)


def busy(lag: int = 0, **changes: object) -> ClusterStatus:
    """2 x 4 nodes at home, each pipeline with 1,000 positions of KV."""
    status = healthy()
    pipelines = tuple(
        replace(p, stages=tuple(replace(stage, lag_tokens=lag) for stage in p.stages), **BUSY)
        for p in status.pipelines
    )
    nodes = tuple(replace(node, block_bytes=BLOCK_BYTES) for node in status.nodes)
    return replace(status, pipelines=pipelines, nodes=nodes, **changes)


def loss(status: ClusterStatus, node: str, config: ClusterConfig = CONFIG) -> Loss:
    found = protection(status, config, [FAILURE])
    return next(one for one in found.losses if one.node == node)


def changed(status: ClusterStatus, pipeline: int, **changes: object) -> ClusterStatus:
    pipelines = list(status.pipelines)
    pipelines[pipeline] = replace(pipelines[pipeline], **changes)
    return replace(status, pipelines=tuple(pipelines))


def without_copies(pipeline: PipelineStatus) -> PipelineStatus:
    stages = tuple(replace(stage, replicas=(), lag_tokens=-1) for stage in pipeline.stages)
    return replace(pipeline, stages=stages)


def test_with_a_copy_what_it_lacks_is_computed_again() -> None:
    cost = loss(busy(lag=32), "n1")
    assert (cost.tokens, cost.streams, cost.restore_bytes) == (32 + 60, 8, 0)
    assert cost.how == ("p0: goes on from the copy on n5",)
    assert cost.wait_s is not None
    assert abs(cost.wait_s - (0.15 + 92 * 0.002 + 0.05)) < 1e-9
    assert cost.exposed_bytes == 390 * BLOCK_BYTES


def test_without_a_copy_all_of_it_is() -> None:
    status = busy()
    status = replace(status, mode=Mode.NONE, pipelines=tuple(map(without_copies, status.pipelines)))
    assert loss(status, "n1").tokens == 1000
    # A copy on a node that is not well is none, and one on the node that is lost goes with it.
    status = busy()
    sick = replace(status.nodes[5], state=NodeState.YELLOW)
    assert loss(replace(status, nodes=(*status.nodes[:5], sick, *status.nodes[6:])), "n1").down == ("p0",)
    stages = list(status.pipelines[0].stages)
    stages[1] = replace(stages[1], replicas=(Member("n1", "aaaa"),))
    assert loss(changed(status, 0, stages=tuple(stages)), "n1").tokens == 1000


def test_a_lag_that_is_not_known_protects_nothing() -> None:
    status = busy(lag=-1)
    assert loss(status, "n1").tokens == 1000
    found = protection(status, CONFIG, [])
    assert (found.protected_bytes, found.lag_tokens) == (0, 0)
    assert found.kv_bytes == 8 * 1000 * BLOCK_BYTES // SIZE


def test_a_stage_that_nobody_else_has() -> None:
    status = healthy(instances=1)
    assert loss(changed(status, 0, **BUSY), "n2").down == ("p0",)
    cordoned = busy()
    nodes = tuple(replace(node, cordoned=node.node == "n6") for node in cordoned.nodes)
    assert loss(replace(cordoned, nodes=nodes), "n2").down == ("p0",)


def test_parity_brings_back_so_many_stages_at_once() -> None:
    config = replace(CONFIG, mode=Mode.PARITY, parity=ParityConfig("xor", 1))
    status = coded(busy(lag=48))
    cost = loss(status, "n1", config)
    assert cost.tokens == 48 + 60
    assert cost.restore_bytes == (1000 - 108) // SIZE * BLOCK_BYTES
    stages = list(status.pipelines[0].stages)
    stages[2] = replace(stages[2], serving=stages[1].serving, borrowed=True)
    both = changed(status, 0, stages=tuple(stages))
    assert loss(both, "n1", config).tokens == 1000
    two = replace(config, parity=ParityConfig("rs", 2))
    assert loss(both, "n1", two).tokens == 108
    assert protection(both, two, []).policy == "rs 4+2"


def test_restoring_takes_its_time() -> None:
    config = replace(CONFIG, mode=Mode.PARITY, parity=ParityConfig("xor", 1))
    cost = loss(coded(busy(lag=48)), "n1", config)
    blocks = (1000 - 108) // SIZE
    assert cost.wait_s is not None
    assert abs(cost.wait_s - (0.15 + 0.02 + blocks * 0.001 + 108 * 0.002 + 0.05)) < 1e-9
    assert loss(coded(busy(), restoring=Restoring()), "n1", config).wait_s is None, "it was never measured"


def test_who_had_many_blocks_restored_knows_best() -> None:
    status = coded(busy())
    few = replace(status.nodes[2], restoring=Restoring(0.5, 0.05, 3))
    also = replace(status.nodes[3], restoring=Restoring(0.6, 0.06, 4))
    status = replace(status, nodes=(*status.nodes[:2], few, also, *status.nodes[4:]))
    assert protection(status, CONFIG, []).restoring == Restoring(0.02, 0.001, 16)


def test_what_is_computed_sooner_than_restored_is_computed() -> None:
    config = replace(CONFIG, mode=Mode.PARITY, parity=ParityConfig("xor", 1))
    cost = loss(coded(busy(lag=48), restoring=Restoring(0.02, 0.5, 9)), "n1", config)
    assert (cost.tokens, cost.restore_bytes) == (1000, 0)
    assert cost.wait_s is not None
    assert abs(cost.wait_s - (0.15 + 1000 * 0.002 + 0.05)) < 1e-9
    assert cost.how == ("p0: computed again, which is sooner than to restore it",)


def test_many_chunks_follow_one_another() -> None:
    status = replace(busy(), mode=Mode.NONE)
    status = replace(status, pipelines=tuple(map(without_copies, status.pipelines)))
    cost = loss(changed(status, 0, pace_s=0.001, chunk_tokens=100), "n1")
    assert cost.wait_s is not None
    assert abs(cost.wait_s - (0.15 + 100 * 0.002 + 900 * 0.001 + 0.05)) < 1e-9


def test_where_instances_hold_copies_of_requests_the_whole_instance_moves() -> None:
    status = replace(changed(busy(lag=-1), 0, unheld_tokens=160), mode=Mode.LOAD_AWARE)
    cost = loss(status, "n2", replace(CONFIG, mode=Mode.LOAD_AWARE))
    assert (cost.tokens, cost.down, cost.streams) == (160 + 60, (), 8)
    found = protection(status, CONFIG, [])
    assert found.protected_bytes == 4 * (1000 - 220) * BLOCK_BYTES // SIZE
    assert found.lag_tokens == 4 * 160
    alone = replace(status, pipelines=status.pipelines[:1], nodes=status.nodes[:4])
    assert loss(alone, "n2").down == ("p0",)


def test_who_serves_two_pipelines_costs_both() -> None:
    status = busy()
    stages = list(status.pipelines[1].stages)
    stages[1] = replace(stages[1], serving=status.pipelines[0].stages[1].serving, borrowed=True)
    cost = loss(changed(status, 1, stages=tuple(stages), token_s=0.01), "n1")
    # p0 goes on from the copy on n5; that of p1 was on n1 itself.
    assert cost.tokens == 60 + 1000
    assert cost.streams == 16
    assert cost.wait_s is not None
    assert abs(cost.wait_s - (0.15 + 1000 * 0.01 + 0.05)) < 1e-9


def test_what_was_not_measured_is_not_told() -> None:
    status = busy()
    assert protection(status, CONFIG, []).losses[0].wait_s is None
    assert protection(status, CONFIG, []).overhead_s is None
    slow = changed(status, 0, step_s=0.0)
    assert loss(slow, "n0").wait_s is None
    idle = changed(status, 0, tokens=0, tail_tokens=0, token_s=0.0, step_s=0.0, running=0)
    assert loss(idle, "n0").wait_s == 0.0


def test_a_spare_costs_what_it_holds() -> None:
    status = busy()
    spare = replace(status.nodes[0], node="n8", serving=(), blocks_replica=3, counters={"parity_bytes": 7})
    cost = loss(replace(status, nodes=(*status.nodes, spare)), "n8")
    assert (cost.streams, cost.tokens, cost.wait_s, cost.how) == (0, 0, 0.0, ())
    assert cost.exposed_bytes == 3 * BLOCK_BYTES + 7


def test_what_each_loss_costs_is_told_without_a_look_at_all_nodes_for_each() -> None:
    each = {}
    for times in (16, 128):
        one = busy(lag=32)
        nodes = [replace(n, node=f"{n.node}-{k}") for k in range(times) for n in one.nodes]
        pipelines = [_renamed(p, k) for k in range(times) for p in one.pipelines]
        status = replace(one, nodes=tuple(nodes), pipelines=tuple(pipelines))
        assert loss(status, "n1-3").how == ("p0-3: goes on from the copy on n5-3",)
        each[times] = lines(lambda status=status: protection(status, CONFIG, [FAILURE])) / times
    assert each[128] < 1.2 * each[16]


def _renamed(pipeline: PipelineStatus, number: int) -> PipelineStatus:
    def renamed(members: tuple[Member, ...]) -> tuple[Member, ...]:
        return tuple(replace(m, node=f"{m.node}-{number}") for m in members)

    stages = tuple(
        replace(stage, serving=renamed(stage.serving), replicas=renamed(stage.replicas))
        for stage in pipeline.stages
    )
    return replace(pipeline, id=f"{pipeline.id}-{number}", stages=stages)
