"""What tests of operations ask of a simulated group."""

from __future__ import annotations

from controlplane.contract.records import OperationState
from controlplane.contract.status import OperationRequest
from tests.core.control.sim import Sim


def done(sim: Sim, id: str = "op") -> bool:
    return sim.state(id) is OperationState.DONE


def levels(sim: Sim, kind: str, node: str, substitute: str | None = None) -> dict[str, str]:
    request = OperationRequest("dry", kind, node, substitute, dry_run=True)
    answer = sim.cores[sim.leader].preflight(request)
    assert not answer.accepted
    return {check.name: check.level for check in answer.checks}
