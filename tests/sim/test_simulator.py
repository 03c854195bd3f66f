"""The simulator itself: equal runs from equal seeds, schedules that can be cut, faults that really happen."""

from __future__ import annotations

import re

from tests.sim.schedule import generate
from tests.sim.shrink import shrink
from tests.sim.soaking import simulator

STEPS_MAX = 6


def test_a_seed_gives_the_same_run_each_time() -> None:
    first, second = (simulator("run", "17") for _ in range(2))
    assert first.returncode == 0
    assert len(first.stdout.splitlines()) > 20
    assert first.stdout == second.stdout
    assert simulator("run", "18").stdout != first.stdout


def test_a_schedule_is_made_from_its_seed_alone() -> None:
    assert generate(5) == generate(5)
    assert generate(5) != generate(6)
    cut = generate(5).only([0, 2])
    assert cut.steps == (generate(5).steps[0], generate(5).steps[2])


def test_shrinking_leaves_what_is_needed() -> None:
    tried: list[list[int]] = []

    def fails(kept: list[int]) -> bool:
        tried.append(kept)
        return {3, 11, 12} <= set(kept)

    assert shrink(list(range(40)), fails) == [3, 11, 12]
    assert len(tried) < 120
    assert shrink([1, 2], lambda kept: True) == []


def test_a_failing_seed_can_be_made_small_and_played_again() -> None:
    without = ("--without", "checksum")
    found = simulator("soak", "200", "--stop", "--jobs", "1", *without)
    seed = re.search(r"python -m tests.sim run (\d+) --without checksum", found.stdout)
    assert seed is not None, found.stdout
    small = simulator("shrink", seed[1], *without)
    again = re.search(r"^python -m tests.sim (run .*)$", small.stdout, re.MULTILINE)
    assert again is not None, small.stdout
    kept = again[1].rpartition(" ")[2].split(",")
    assert 1 <= len(kept) <= STEPS_MAX, small.stdout
    played = simulator(*again[1].split())
    assert played.returncode == 1
    assert " corrupt " in small.stdout
    assert re.search(r"token \d+ at position \d+ instead of \d+", played.stdout)


def test_every_kind_of_fault_happens() -> None:
    kinds = {step.what for seed in range(300) for step in generate(seed).steps}
    assert kinds == {
        *("submit", "cancel", "kill", "leave", "pause", "isolate", "cut", "one_way", "flap", "deaf", "mute"),
        "hush",
        *("reset", "slow", "tamper", "corrupt", "wall_jump", "etcd_kill", "etcd_down", "etcd_pause"),
        *("fate_of_write", "expire", "compact", "operate", "cancel_operation"),
    }
