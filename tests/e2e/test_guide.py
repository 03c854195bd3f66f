"""docs/guide-three-hosts.md, its commands as they stand there, on three hosts with nothing in common but a network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from controlplane.kfadmin.loadgen import LoadGenerator, Stream, sample_prompts
from tests.e2e import shells
from tests.e2e.cluster import until
from tests.matrix.namespaces import Network, why_not

GUIDE = Path(__file__).parents[2] / "docs" / "guide-three-hosts.md"
HOSTS = ("a", "b", "c")
GATEWAYS = ("b", "c")
PROMPTS = sample_prompts(6, 300)
PATIENCE_S = 8.0  # without a byte from a gateway


def sections() -> dict[str, list[tuple[str, str]]]:
    """Commands of the guide, (host, command) by the heading that they stand under."""
    found: dict[str, list[tuple[str, str]]] = {}
    heading = ""
    for line in GUIDE.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif match := re.fullmatch(r"([abc])# (.+)", line):
            found.setdefault(heading, []).append((match[1], match[2]))
    return found


def fleet_file() -> str:
    match = re.search(r"```toml fleet\.toml\n(.*?)```", GUIDE.read_text(), re.S)
    assert match is not None
    return match[1]


@contextlib.contextmanager
def three_hosts() -> Iterator[tuple[Network, dict[str, shells.Shell]]]:
    folder = Path(tempfile.mkdtemp(prefix="kf-guide-"))
    try:
        with Network(HOSTS) as network, contextlib.ExitStack() as stack:
            yield network, {host: stack.enter_context(shells.Shell(network, host, folder)) for host in HOSTS}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)  # some thirty processes begin, one after the other
def test_three_hosts_from_nothing_and_one_is_switched_off() -> None:
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        pytest.skip(str(error))
    if reason := why_not() or shells.why_not():
        pytest.skip(reason)
    guide = sections()
    with three_hosts() as (network, hosts):
        (hosts["a"].home / "fleet.toml").write_text(fleet_file())

        def play(heading: str) -> str:
            return "".join(hosts[host].play(command) for host, command in guide.pop(heading))

        try:
            play("One bundle for each host")
            assert "every pipeline serves" in play("On each host")
            assert "data: [DONE]" in play("A stream")
            # Clients are on b, where one of the gateways is.
            lib = hosts["b"].home.parent / "lib" / "kevlarflow"
            urls = [f"https://{network.address(host)}:8000" for host in GATEWAYS]
            key = (lib / "api-keys").read_text().strip()
            load = LoadGenerator(
                urls[0], key, "kevlar-demo", tuple(urls[1:]), str(lib / "certs/ca.pem"), PATIENCE_S
            )

            async def under_load(act: Callable[[], object]) -> None:
                streams = [Stream(prompt) for prompt in PROMPTS]
                async with asyncio.TaskGroup() as group:
                    group.create_task(load.streams(PROMPTS, streams))
                    await until(lambda: all(len(s.tokens) >= 4 for s in streams), "tokens of every stream")
                    await asyncio.to_thread(act)
                assert [s.answer for s in streams] == [e.answer for e in expected]

            with network.inside("b"):
                expected = asyncio.run(load.streams(PROMPTS))
                asyncio.run(under_load(lambda: play("New certificates")))
                switch_off, *looks = guide.pop("A host goes")
                asyncio.run(under_load(lambda: hosts["c"].play(switch_off[1])))
            told = "".join(hosts[host].play(command) for host, command in looks)
            assert "n2" in told or "n3" in told, told
        except BaseException:
            print("\n".join(shell.logs() for shell in hosts.values()))
            raise
    assert not guide, f"nobody plays {list(guide)}"
