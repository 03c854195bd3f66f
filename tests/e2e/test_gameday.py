"""`kfadmin chaos run` against a real cluster: what it breaks is mended, and it ends itself when a stream suffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.test_moves import kfadmin

pytestmark = pytest.mark.usefixtures("home")


def test_a_game_day_passes_and_tells_of_every_stream(cluster: Cluster, tmp_path: Path) -> None:
    plan, html = tmp_path / "day.toml", tmp_path / "day.html"
    plan.write_text(
        'streams = 4\ntokens = 128\npause_max_s = 60\n'
        '[[faults]]\nat_s = 0\nkind = "kill"\ntarget = "n1"\n'
        '[[faults]]\nat_s = 0\nkind = "kill"\ntarget = "gateway"\n'
    )  # fmt: skip
    before = cluster.local.pids()
    done = kfadmin(cluster, "chaos", "run", str(plan), "-o", "json", "--html", str(html), limit_s=120.0)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [(fault["target"], fault["outcome"]) for fault in report["faults"]] == [
        ("n1", "home"),
        ("g1", "home"),
    ]
    first, second = report["faults"]
    assert second["began_s"] >= round(first["began_s"] + first["home_s"], 4)  # never two at a time
    assert "detect" in first["phases"]
    assert all(fault["streams"] >= 1 and fault["pause_max_s"] > 0 for fault in report["faults"])
    assert len(report["streams"]) >= 4
    assert all(stream["equal"] and stream["tokens"] == 128 for stream in report["streams"])
    assert any(stream["resumes"] for stream in report["streams"])  # through the gateway's death
    after = cluster.local.pids()
    assert {name for name in before if after.get(name) != before[name]} == {"n1", "g1"}
    assert "PASSED" in html.read_text()


def test_it_ends_itself_and_mends_what_it_broke(cluster: Cluster, tmp_path: Path) -> None:
    """A stop of five minutes lasts no longer than until streams have waited for too long."""
    plan = tmp_path / "day.toml"
    plan.write_text(
        "streams = 2\ntokens = 128\npause_max_s = 3\n"
        '[[faults]]\nat_s = 0\nkind = "stop"\ntarget = "g1"\nfor_s = 300\n'
        '[[faults]]\nat_s = 0\nkind = "kill"\ntarget = "n1"\n'
    )
    before = cluster.local.pids()
    done = kfadmin(cluster, "chaos", "run", str(plan), "-o", "json", limit_s=120.0)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert not report["ok"]
    assert "3 s are the limit" in report["why"]
    assert [fault["outcome"] for fault in report["faults"]] == ["home", "not begun"]
    assert report["faults"][0]["pause_max_s"] > 3
    assert report["lasted_s"] < 100
    assert all(stream["equal"] for stream in report["streams"])
    assert cluster.local.pids() == before
