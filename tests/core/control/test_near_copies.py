"""What `kfadmin status` says of copies that stand where the original does."""

from __future__ import annotations

from msgspec.structs import replace

from controlplane.contract.ids import Member
from controlplane.contract.status import (
    ClusterStatus,
    NodeState,
    NodeStatus,
    PipelineState,
    PipelineStatus,
    StageStatus,
    near_copies,
)
from controlplane.contract.topology import Mode


def status(where: dict[str, dict[str, str]], copies: dict[str, str]) -> ClusterStatus:
    """Nodes and where they are; of each pipeline's one node, who has the copy."""
    nodes = tuple(
        NodeStatus(node, NodeState.GREEN, fault_domain={**domain, "host": node, "node": node})
        for node, domain in where.items()
    )
    pipelines = tuple(
        PipelineStatus(
            f"p{k}", PipelineState.UP, 1,
            (StageStatus((node,), (Member(node, "a"),), False, (Member(copy, "a"),), 0),), 0, 0,
        )
        for k, (node, copy) in enumerate(copies.items())
    )  # fmt: skip
    return ClusterStatus(
        "c", "default", "m", Mode.REPLICATE, True, 1, False, "c1", "c1", 0.0, nodes, pipelines, (), (), ()
    )


def test_the_outermost_label_in_which_hosts_differ_is_told() -> None:
    where = {
        "n0": {"zone": "x", "rack": "1"},
        "n1": {"zone": "x", "rack": "1"},
        "n2": {"zone": "x", "rack": "2"},
    }
    told = near_copies(status(where, {"n0": "n1", "n1": "n2", "n2": "n0"}))
    assert told == ["rack 1 has both what serves and its copy: p0/0"]
    assert near_copies(status(where, {"n0": "n2", "n1": "n2", "n2": "n0"})) == []
    where["n2"]["zone"] = "y"
    assert near_copies(status(where, {"n0": "n1"})) == ["zone x has both what serves and its copy: p0/0"]


def test_without_labels_nothing_is_told() -> None:
    bare = status({"n0": {}, "n1": {}}, {"n0": "n1"})
    assert near_copies(bare) == []
    assert near_copies(replace(bare, nodes=())) == []
