"""A release as pods: from Secrets and a rendered plan to streams that outlive the end of a pod, told and untold."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from controlplane.kfadmin.loadgen import LoadGenerator, Stream, sample_prompts
from tests.deploy.chart import example
from tests.deploy.pods import Pods
from tests.e2e.cluster import until
from tests.matrix.namespaces import why_not

PROMPTS = sample_prompts(4, 300)


MACHINES = {"n0": "m0", "n1": "m1"}
# One stage: as few processes as it takes. Names and leadership outlast a busy machine.
TIMING = {"node_lease_s": 20, "leader_lease_s": 10}
VALUES = {
    **example("one-machine"),
    "settings": {"cluster": "kevlarflow", "instances": 2, "stages": 1, "timing": TIMING},
}


@pytest.mark.timeout(600)
def test_a_release_serves_and_its_pods_come_and_go() -> None:
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        pytest.skip(str(error))
    if reason := why_not():
        pytest.skip(reason)
    if missing := [tool for tool in ("unshare", "nsenter") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with (
        tempfile.TemporaryDirectory(prefix="kf-pods-", ignore_cleanup_errors=True) as folder,
        Pods(VALUES, ("e0", "c0", "g0", *MACHINES), Path(folder)) as pods,
    ):
        try:
            play(pods)
        except BaseException:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}")
            raise


def play(pods: Pods) -> None:
    for name in pods.network.hosts:
        pods.start(name, MACHINES.get(name, "m2"))

    def whole() -> None:
        done = pods.exec("c0", ["kfadmin", "host", "wait"])
        assert done.returncode == 0, done.stderr

    def asked(*verb: str) -> Any:
        return json.loads(pods.exec("c0", ["kfadmin", *verb, "-o", "json"]).stdout)

    whole()
    for name, what in itertools.product(MACHINES, ("livenessProbe", "readinessProbe")):
        done = pods.exec(name, pods.hook(name, what))
        assert done.returncode == 0, done.stderr
    key = (pods.run_dir("g0") / "api-keys").read_text().strip()
    url = f"https://{pods.network.address('g0')}:8000"
    load = LoadGenerator(url, key, "kevlar-demo", ca=str(pods.folder / "certs" / "ca.pem"))

    async def under_load(act: Callable[[], object]) -> None:
        streams = [Stream(prompt) for prompt in PROMPTS]
        async with asyncio.TaskGroup() as group:
            group.create_task(load.streams(PROMPTS, streams))
            await until(lambda: all(len(s.tokens) >= 4 for s in streams), "tokens of every stream")
            await asyncio.to_thread(act)
        assert [s.answer for s in streams] == [e.answer for e in expected]

    def leaves() -> None:
        done = pods.exec("n1", pods.hook("n1", "lifecycle", "preStop"))
        assert (done.returncode, done.stderr) == (0, "n1 has left\n")
        assert pods.exec("n1", pods.hook("n1", "readinessProbe")).returncode == 1
        assert pods.stop("n1") == 0

    with pods.network.inside("g0"):
        expected = asyncio.run(load.streams(PROMPTS))
        asyncio.run(under_load(leaves))
        pods.start("n1", MACHINES["n1"])
        whole()
        asyncio.run(under_load(lambda: pods.kill("n0")))
    pods.start("n0", MACHINES["n0"])
    whole()
    (left,) = asked("operations", "list", "--all")
    assert (left["kind"], left["node"], left["state"]) == ("replace", "n1", "done"), left
    nodes = {one["node"]: one for one in asked("nodes")}
    assert {name: one["fault_domain"]["host"] for name, one in nodes.items()} == MACHINES
    assert not any(one["cordoned"] for one in nodes.values())
    # What the launcher's children say is the container's output, and process 1 has reaped what ended.
    assert '"process": "n1"' in pods.log("n1").read_text()
    assert "Z" not in pods.exec("n1", ["sh", "-c", "cat /proc/[0-9]*/stat | sed 's/.*) //' | cut -c1"]).stdout
