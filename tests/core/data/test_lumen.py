"""The simulation of `bench lumen`: requests are conserved, runs repeat, and the policies are worth something."""

from __future__ import annotations

import statistics

import pytest

from bench.lumen_sim import Request, Simulation
from controlplane.contract.topology import Mode

MODES = (Mode.LOAD_AWARE, Mode.FIXED_NEIGHBOUR, Mode.STOP_RESTART)


def play(mode: Mode, instances: int = 8, seed: int = 1) -> Simulation:
    requests = [Request(rid, rid * 0.04, 100 + rid * 37 % 200, 150 + rid * 53 % 150) for rid in range(600)]
    simulation = Simulation(mode, instances, requests, [(6.0, 3), (9.0, 5)], reload_s=8.0)
    simulation.run()
    for request in requests:
        assert request.made == request.output
        assert request.seen == request.output
        assert request.at < request.first_at <= request.last_at
        assert request.waits_since is None
    for instance in simulation.instances:
        assert not instance.running
        assert not instance.waiting
        assert instance.prompt_tokens == 0
        assert not instance.holders._placed
    assert not simulation.held
    assert not simulation.wave._tokens
    return simulation


@pytest.mark.parametrize("mode", MODES)
def test_every_request_ends_and_a_run_repeats(mode: Mode) -> None:
    first, second = play(mode), play(mode)
    assert [r.paused_s for r in first.interrupted] == [r.paused_s for r in second.interrupted]
    assert first.now == second.now
    assert first.interrupted


def test_who_is_interrupted_waits_least_where_loads_count() -> None:
    waits = {mode: statistics.fmean(r.paused_s for r in play(mode).interrupted) for mode in MODES}
    assert waits[Mode.LOAD_AWARE] < 0.5 * waits[Mode.STOP_RESTART]
    assert waits[Mode.LOAD_AWARE] <= waits[Mode.FIXED_NEIGHBOUR]


def test_one_instance_that_dies_keeps_its_requests_waiting_and_loses_none() -> None:
    requests = [Request(rid, rid * 0.1, 50, 40) for rid in range(30)]
    simulation = Simulation(Mode.LOAD_AWARE, 1, requests, [(1.0, 0)], reload_s=2.0)
    simulation.run()
    assert all(request.seen == request.output for request in requests)
