"""Modes in which requests have holders of their own: an instance that failed waits for its nodes, none is borrowed."""

from __future__ import annotations

import pytest
from hypothesis import settings

from controlplane.contract.topology import Mode
from tests.core.control.sim import Sim, formed
from tests.core.control.test_stateful import Cluster
from tests.core.control.world import make_config

MODES = [Mode.LOAD_AWARE, Mode.FIXED_NEIGHBOUR]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", ["n0", "n1"])
def test_the_stage_is_empty_until_its_node_is_back_and_others_keep_their_duties(
    mode: Mode, victim: str
) -> None:
    sim = formed(2, 2, mode=mode)
    sim.run(2.0)
    before = sim.topology
    assert before is not None
    sim.held.add(victim)
    sim.kill(victim)
    sim.run(6.0)
    after = sim.topology
    assert after is not None
    stage = int(victim[1:])
    assert not after.pipelines[0].stages[stage].ranks
    assert after.pipelines[0].stages[1 - stage].ranks == before.pipelines[0].stages[1 - stage].ranks
    assert after.pipelines[1] == before.pipelines[1]
    assert not any(s.replicas for p in after.pipelines for s in p.stages)
    sim.held.clear()
    sim.run_until(sim.home, limit_s=60)


class LoadAware(Cluster):
    def __init__(self) -> None:
        super().__init__()
        self.sim = Sim(make_config(2, 2, mode=Mode.LOAD_AWARE))


TestLoadAware = LoadAware.TestCase
TestLoadAware.settings = settings(Cluster.TestCase.settings, max_examples=10)
