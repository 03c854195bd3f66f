"""A real kf-controller takes its login provider from `oidc.toml` in the run directory, and says what is wrong there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from controlplane.contract.auth import create_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.keys import encode
from controlplane.kfadmin.rundir import free_port

GOOD = """
issuer = "https://login.example"
client_id = "kevlarflow"
redirect_urls = ["https://h1.example:8100/oidc/callback"]
provider = "corp"
"""
LIMIT_S = 150.0  # of a machine that has much else to do


def controller(folder: Path, settings: str, *more: str) -> subprocess.Popen[str]:
    """Without etcd, which is not needed for this."""
    folder.mkdir()
    config = ClusterConfig(str(folder), "model", (f"127.0.0.1:{free_port('127.0.0.1', set())}",))
    (folder / "cluster.json").write_bytes(encode(config))
    create_secret(config.secret_file)
    (folder / "oidc.toml").write_text(settings)
    (folder / "oidc.toml").chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "controlplane.main",
        "--config",
        str(folder / "cluster.json"),
        "--id",
        "c1",
    ]
    return subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(400)
def test_a_controller_offers_the_provider_of_its_run_directory(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", set())
    wrong = controller(tmp_path / "wrong", GOOD.replace("https://login", "http://login"), "--admin-port", "0")
    with controller(tmp_path / "good", GOOD, "--admin-port", str(port)) as good:
        try:
            _, told = wrong.communicate(timeout=LIMIT_S)
            assert wrong.returncode == 2, told
            assert "oidc.toml: issuer = 'http://login.example': plain http is for loopback only" in told
            deadline, answer = time.monotonic() + LIMIT_S, None
            while answer is None:
                assert good.poll() is None
                assert time.monotonic() < deadline
                try:
                    answer = httpx.get(f"http://127.0.0.1:{port}/oidc", trust_env=False, verify=False)
                except httpx.TransportError:
                    time.sleep(0.05)
            assert answer.json() == {"provider": "corp"}
        finally:
            wrong.kill()
            good.kill()
