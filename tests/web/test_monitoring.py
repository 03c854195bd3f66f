"""The board, the alert rules and their pages: what they name is exported, and promtool reads them."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from dataplane.core.stats import SchedulerStats
from tests.core.control.test_exposition import in_pieces, status_of
from web.gateway.key_usage import KeyUsage
from web.gateway.metrics import Metrics
from web.gateway.routing.policy import Policy
from web.gateway.routing.router import Router

DOCS = Path(__file__).parents[2] / "docs"
ALERTS = DOCS / "monitoring" / "alerts.yml"
BOARD = DOCS / "monitoring" / "grafana.json"
RUNBOOKS = DOCS / "runbooks"
NAME = re.compile(r"\b(kevlarflow_[a-z0-9_]+)(?:\{([^}]*)\})?")
SUFFIXES = ("_bucket", "_sum", "_count")
# What nodes count beside the stats of their schedulers, as dataplane/node.py names it.
OF_NODES = ("checksum_failures", "compute_ms", "link_bytes_sent")
# Exported by gateways and controllers alike: of the process that answers.
OF_EACH = {"kevlarflow_topology_counter", "kevlarflow_etcd_watch_age_seconds"}


def families(text: str) -> dict[str, tuple[str, str]]:
    """Name -> kind and help."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    words = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.M))
    assert kinds.keys() == words.keys()
    return {name: (kinds[name], words[name]) for name in kinds}


@functools.cache
def of_controllers() -> str:
    counters = {f"scheduler_{field.name}": 1 for field in fields(SchedulerStats)} | dict.fromkeys(OF_NODES, 1)
    status = status_of(16)
    nodes = tuple(replace(node, counters=counters) for node in status.nodes)
    return in_pieces(replace(status, nodes=nodes))[1].decode()


@functools.cache
def of_gateways() -> str:
    metrics = Metrics()
    metrics.attach(Router(Policy()), lambda: 0.0)
    metrics.attach_keys(list[KeyUsage])
    return metrics.render()[0].decode()


EXPORTED = families(of_controllers()) | families(of_gateways())


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> list[str]:
    panels = json.loads(BOARD.read_text())["panels"]
    of_board = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(of_board) > 20
    return [*(rule["expr"] for rule in rules()), *of_board]


def family_of(name: str) -> str | None:
    if name in EXPORTED:
        return name
    base = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")
    return base if EXPORTED.get(base, ("",))[0] == "histogram" else None


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_named_is_exported(expression: str) -> None:
    found = NAME.findall(expression)
    assert found
    for name, _ in found:
        assert family_of(name), f"nobody exports {name}"
    if "histogram_quantile" in expression:
        assert all(name.endswith("_bucket") for name, _ in found)
        assert " by (le" in expression


@pytest.mark.parametrize("expression", expressions())
def test_every_label_that_is_named_is_exported(expression: str) -> None:
    text = of_controllers() + of_gateways()
    own = {"le", "instance"}  # Prometheus' own, or of every histogram
    grouped = {
        label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")
    }
    for name, matchers in NAME.findall(expression):
        wanted = grouped | set(re.findall(r"(\w+)\s*[=!]~?\s*\"", matchers))
        samples = re.findall(rf"^{name}\{{(.*)\}} ", text, re.M)
        if samples:  # a labelled metric of a gateway has none before something happens
            exported = set(re.findall(r'(\w+)="', samples[0]))
            assert wanted <= exported | own, f"{name} has {exported}"


def test_a_name_means_the_same_thing_everywhere() -> None:
    controllers, gateways = families(of_controllers()), families(of_gateways())
    assert controllers.keys() & gateways.keys() == OF_EACH
    for name in OF_EACH:
        assert controllers[name] == gateways[name]


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    pages = set()
    for rule in rules():
        page = DOCS.parent / rule["annotations"]["runbook"]
        assert page.read_text().startswith(f"# {rule['alert']}\n"), page
        assert rule["labels"]["severity"] in ("critical", "warning")
        pages.add(page.name)
    assert pages == {path.name for path in RUNBOOKS.glob("*.md")}
    for page in RUNBOOKS.glob("*.md"):
        for linked in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert (RUNBOOKS / linked).exists(), f"{page.name} links {linked}"


CASES = """
rule_files: [{alerts}]
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {{series: 'kevlarflow_available{{instance="c1"}}', values: '1x8 0x20'}}
      - {{series: 'kevlarflow_is_leader{{instance="c1"}}', values: '1x30'}}
      - {{series: 'kevlarflow_fenced_rejections_total{{kind="mismatch"}}', values: '0x8 1x20'}}
    alert_rule_test:
      - {{eval_time: 1m, alertname: KevlarFlowUnavailable, exp_alerts: []}}
      - {{eval_time: 1m, alertname: KevlarFlowTokenMismatch, exp_alerts: []}}
      - {{eval_time: 5m, alertname: KevlarFlowNoLeader, exp_alerts: []}}
      - eval_time: 5m
        alertname: KevlarFlowUnavailable
        exp_alerts:
          - exp_labels: {{severity: critical}}
            exp_annotations:
              summary: "No pipeline serves, or no controller leads"
              runbook: docs/runbooks/unavailable.md
      - eval_time: 5m
        alertname: KevlarFlowTokenMismatch
        exp_alerts:
          - exp_labels: {{severity: critical}}
            exp_annotations:
              summary: "A position was computed twice with different tokens"
              runbook: docs/runbooks/token-mismatch.md
"""


def promtool(*arguments: str, given: str = "", well: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, check=False)
    assert done.returncode in well, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_reads_the_rules_and_they_fire(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS))
    cases = tmp_path / "cases.yml"
    cases.write_text(CASES.format(alerts=ALERTS))
    promtool("test", "rules", str(cases))
    for text in (of_controllers(), of_gateways()):
        promtool("check", "metrics", given=text, well=(0, 3))  # 3: it reads it, and has advice on style
