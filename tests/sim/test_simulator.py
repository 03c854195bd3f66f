"""The simulator itself: equal runs from equal seeds, schedules that can be cut, faults that really happen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sources
from tests.sim import __main__ as soak
from tests.sim.record import Record
from tests.sim.schedule import generate
from tests.sim.shrink import shrink
from tests.sim.soaking import simulator
from tests.sources import ROOT, loaded

STEPS_MAX = 6


@pytest.mark.parametrize("seed", [17, 740, 746, 747, 1013])  # parity, changes of size, copies by load, relays
def test_a_seed_gives_the_same_run_each_time(seed: int) -> None:
    first, second = (simulator("run", str(seed)) for _ in range(2))
    assert first.returncode == 0
    assert len(first.stdout.splitlines()) > 20
    assert first.stdout == second.stdout
    assert simulator("run", str(seed + 1)).stdout != first.stdout


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
    found = simulator("soak", "200", "--first", "20", "--stop", "--jobs", "1", *without)
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
        *("hush", "hears_some", "split", "restore"),
        *("reset", "slow", "tamper", "corrupt", "wall_jump", "etcd_kill", "etcd_down", "etcd_pause"),
        *("fate_of_write", "expire", "compact", "operate", "cancel_operation", "scale"),
        *("etcd_refuses", "clash", "upgrade", "flip"),
    }


def test_a_soak_of_several_processes_stops_at_the_first_violation() -> None:
    """And does not play what it had handed out already, which takes hours."""
    ended = simulator("soak", "100000", "--stop", "--jobs", "2", "--without", "checksum")
    assert ended.returncode == 1
    assert re.search(r"^soak: \d+ seeds from 0, [1-9]\d* failed", ended.stdout, re.MULTILINE), ended.stdout


def test_a_soak_writes_its_result(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    ended = simulator("soak", "3", "--first", "40", "--jobs", "1", "--json", str(result))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert result.read_text() == ended.stdout.splitlines()[-1] + "\n"
    found = json.loads(result.read_text())
    assert (found["count"], found["first_seed"], found["failures"]) == (3, 40, 0)
    assert found["seconds"] > 0
    assert found["seeds_per_s"] > 0


def test_a_soak_goes_on_where_one_of_the_same_code_ended(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    first = simulator("soak", "2", "--first", "40", "--jobs", "1", "--json", str(result))
    assert first.returncode == 0, first.stdout + first.stderr
    half = json.loads(result.read_text())
    more = simulator("soak", "4", "--first", "40", "--jobs", "1", "--json", str(result))
    assert more.returncode == 0, more.stdout + more.stderr
    whole = json.loads(result.read_text())
    assert (whole["count"], whole["pieces"]) == (4, [[40, 44]])
    assert sum(whole["requests"].values()) > sum(half["requests"].values())
    assert simulator("soak", "4", "--first", "40", "--jobs", "1", "--json", str(result)).returncode == 0
    assert json.loads(result.read_text())["requests"] == whole["requests"], "nothing was left to run"

    result.write_text(json.dumps({**whole, "code": "another", "failed_seeds": [41]}))
    ended = simulator("soak", "1", "--first", "40", "--jobs", "1", "--json", str(result))
    assert ended.returncode == 0, "what other code did is not counted"
    assert json.loads(result.read_text())["count"] == 1
    result.write_text("[]")
    assert "name another file" in simulator("soak", "1", "--json", str(result)).stderr


def test_what_a_record_lacks() -> None:
    record = Record("c", 0, 100, None, [(20, 40), (60, 70)])
    assert record.missing(20) == [(0, 20), (40, 20), (70, 20), (90, 10)]
    assert Record("c", 0, 40, None, [(0, 40)]).missing(20) == []
    assert Record("c", 0, 30, None, [(0, 10), (25, 60)]).missing(20) == [(10, 15)], (
        "more has run than is asked for"
    )
    assert Record("c", 0, 30, None, [(0, 10), (40, 60)]).missing(20) == [(10, 20)]


def test_the_digest_is_of_what_a_seed_runs_and_of_nothing_else() -> None:
    """Of its modules and the sources of its extensions; of no tool, no GPU and no test."""
    shown = (
        "from tests.sim.__main__ import MODULES; from tests.sources import sources\n"
        "print(*(path for module in MODULES for path in sources(module)))"
    )
    ran = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    made = {str(Path(path).relative_to(ROOT)) for path in ran.stdout.split()}
    assert made > {
        *(
            "dataplane/core/scheduler.py",
            "controlplane/core/plan.py",
            "web/gateway/routing/router.py",
            "tests/sim/rpc.py",
        ),
        *(
            "tests/sim/__main__.py",
            "dataplane/_fast/sampling.pyx",
            "dataplane/_fast/draw.h",
            "kernels/cpu/team.c",
        ),
    }
    assert [
        path for path in made if re.search(r"kfadmin|/(cuda|triton)/|/test_|\.so$|_native\.c$", path)
    ] == []


def test_each_change_of_a_source_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    names = (
        "a.py",
        "fast.pyx",
        "fast.pxd",
        "fast.c",
        "fast.cpython.so",
        "draw.h",
        "team.c",
        "other.pyx",
        "b.py",
    )
    for name in names:
        (tmp_path / name).write_text("before")
    modules = [tmp_path / "a.py", tmp_path / "fast.cpython.so"]
    before = sources.code_digest(modules)
    changed = set()
    for name in names:
        (tmp_path / name).write_text("after")
        if sources.code_digest(modules) != before:
            changed.add(name)
        (tmp_path / name).write_text("before")
    assert changed == {"a.py", "fast.pyx", "fast.pxd", "draw.h", "team.c"}


def test_a_seed_that_imports_what_the_digest_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """That module could change, and what seeds did with it before would still count."""
    monkeypatch.setattr(soak, "MODULES", loaded() - {ROOT / "dataplane/core/scheduler.py"})
    with pytest.raises(
        RuntimeError, match=r"imported \['scheduler.py'\], which the digest of the code lacks"
    ):
        soak._chunk(0, 0, None)
