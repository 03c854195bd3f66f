"""Names are fenced: a second launcher, controller and gateway of the same names cost the first ones nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from controlplane.contract.config import TimingConfig
from controlplane.contract.lifetime import EXIT_NAME_TAKEN
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from controlplane.kfadmin.local import LocalCluster, StartFailed
from tests.e2e.cluster import Cluster, until, while_streaming

PROMPTS = sample_prompts(6, 300)
LEASE_S = 2


def another_host(cluster: Cluster, folder: Path) -> Path:
    """Settings of a second run directory of the same cluster, as on a host that was set up twice."""
    config = cluster.local.config
    shutil.copy2(config.secret_file, folder / "secret")
    shutil.copy2(config.api_keys_file, folder / "api-keys")
    path = folder / "cluster.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, run_dir=str(folder))))
    return path


def begin(settings: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "--config", str(settings), *arguments]
    with (settings.parent / f"{module}.out").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def said(settings: Path, name: str) -> str:
    path = settings.parent / name
    return path.read_text() if path.exists() else ""


@pytest.mark.usefixtures("etcd_binary")
def test_a_second_launcher_controller_and_gateway_of_the_same_names(tmp_path: Path) -> None:
    with Cluster(instances=2, stages=1, controllers=1, timing=TimingConfig(node_lease_s=LEASE_S)) as cluster:
        asyncio.run(cluster.references(PROMPTS))
        settings = another_host(cluster, tmp_path)
        pids = cluster.local.node_pids()
        before = asyncio.run(cluster.status())
        strangers = []

        async def clash(streams: list[Stream]) -> None:
            await until(lambda: sum(len(s.tokens) for s in streams) >= 60, "tokens flow")
            strangers.append(begin(settings, "dataplane.launcher"))
            strangers.append(begin(settings, "controlplane.main", "--id", "c1", "--admin-port", "0"))
            strangers.append(begin(settings, "web.gateway.main", "--id", "g1", "--port", "0"))

        try:
            streams = asyncio.run(while_streaming(cluster, PROMPTS, clash))
            asyncio.run(cluster.expect_equal(streams))
            launcher, controller, gateway = strangers
            assert controller.wait(60) == EXIT_NAME_TAKEN
            assert "controllers/c1 is taken by another process" in said(settings, "controlplane.main.out")
            assert gateway.wait(60) == EXIT_NAME_TAKEN
            holder = f"pid {before.gateways[0].pid} on"
            assert holder in said(settings, "web.gateway.main.out"), "it says who has the name"

            def given_up(node: str) -> bool:
                return f"nodes/{node} is taken by another process" in said(settings, f"logs/{node}.log")

            def launched(event: str, node: str) -> list[dict[str, str]]:
                lines = map(msgspec.json.decode, said(settings, "dataplane.launcher.out").splitlines())
                return [line for line in lines if line["event"] == event and line["child"] == node]

            # Who has the name is told where an operator looks: by the launcher, and by the cluster that it disturbs.
            for node in pids:
                asyncio.run(until(lambda node=node: given_up(node), f"the second {node} gave up"))  # type: ignore[misc]
                asyncio.run(
                    until(lambda node=node: launched("died", node), f"its launcher sees {node}'s end")
                )  # type: ignore[misc]
                assert f"pid {pids[node]} on" in launched("died", node)[0]["said"]
            assert "Traceback" not in said(settings, "logs/n0.log") + said(settings, "logs/n1.log")
            assert f"pid {pids['n0']} on" in said(settings, "logs/n0.log")
            # It goes on trying, but not in a hot loop: each attempt waits for a lease to end.
            for node in pids:
                starts = [datetime.fromisoformat(line["timestamp"]) for line in launched("started", node)]
                assert all((b - a).total_seconds() >= LEASE_S for a, b in pairwise(starts)), starts
            troubles = "\n".join(asyncio.run(cluster.status()).troubles)
            for name, pid in (("n0", pids["n0"]), ("n1", pids["n1"])):
                assert f"nodes/{name} belongs to one process (incarnation" in troubles, troubles
                assert f"pid {pid} on" in troubles

            after = asyncio.run(cluster.status())
            assert cluster.local.node_pids() == pids
            assert [(p.id, p.epoch) for p in after.pipelines] == [(p.id, p.epoch) for p in before.pipelines]
            assert [(n.node, n.incarnation) for n in after.nodes] == [
                (n.node, n.incarnation) for n in before.nodes
            ]
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(30)
            second = msgspec.structs.replace(
                cluster.local.config, run_dir=str(tmp_path / "up"), gateway_port=0, admin_port=0
            )
            up = LocalCluster(second, controllers=1)
            with pytest.raises(
                StartFailed, match=r"is taken by another process \(incarnation .*, pid \d+ on"
            ):
                up.start()  # as `kfadmin up` does
            assert up.node_pids() == {}
            streams = asyncio.run(while_streaming(cluster, PROMPTS[:2], nothing))
            asyncio.run(cluster.expect_equal(streams))
            assert cluster.local.node_pids() == pids
        finally:
            for process in strangers:
                process.kill()
                process.wait(10)


@pytest.mark.usefixtures("etcd_binary")
def test_a_killed_node_has_its_name_back_before_its_lease_has_ended() -> None:
    with Cluster(instances=2, stages=1, controllers=1, timing=TimingConfig(node_lease_s=60)) as cluster:
        old = {n.node: n.incarnation for n in asyncio.run(cluster.status()).nodes}
        killed_at = cluster.kill("n1")

        def back(status: object) -> bool:
            found = {n.node: n for n in status.nodes}["n1"]  # type: ignore[attr-defined]
            return found.incarnation != old["n1"] and found.state.value == "green"

        asyncio.run(cluster.wait_for(back, "the fresh process is registered", 20.0))
        assert time.monotonic() - killed_at < 20, "a lease of a minute was not waited for"
        asyncio.run(cluster.wait_all_home())


async def nothing(_streams: list[Stream]) -> None:
    pass
