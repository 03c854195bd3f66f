"""Which way a link takes: what both nodes know, the best of it first, the next one if that does not open."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from controlplane.contract.ids import Member
from dataplane.transport import libucp, sockets
from dataplane.transport.base import TransportConfig
from dataplane.transport.choose import Kind, open_transport
from dataplane.transport.driver import parse_address
from dataplane.transport.links import LinkTransport
from dataplane.transport.sockets import SocketDriver

from .transport_nodes import SECRET, run, until


@contextlib.asynccontextmanager
async def started(name: str, kind: Kind) -> AsyncIterator[tuple[LinkTransport, str, list[bytes]]]:
    heard: list[bytes] = []
    ignore: Any = lambda *_: None  # noqa: E731
    transport = open_transport(
        kind,
        TransportConfig(member=Member(name, "1"), cluster="test", secret=SECRET, retry_min_s=0.001),
        on_message=lambda _, data: heard.append(bytes(data)),
        on_link_up=ignore,
        on_link_down=ignore,
    )
    try:
        yield transport, await transport.start(), heard
    finally:
        await transport.close()


@pytest.fixture
def rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were an RDMA device; libucp itself then finds only TCP."""
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    monkeypatch.setattr(libucp, "RDMA_CLASS", tmp_path)


def elsewhere(address: str) -> str:
    """The address as a node on another host has it."""
    offers = parse_address(address)
    offers["local"] = "0123456789abcdef/" + offers["local"].partition("/")[2]
    return ",".join(f"{kind}={where}" for kind, where in offers.items())


async def carried(near: Kind, far: Kind, *, same_host: bool = True) -> str | None:
    async with started("a", near) as (a, _, _), started("b", far) as (_, address, heard):
        b = Member("b", "1")
        a.connect(b, address if same_host else elsewhere(address))
        await until(lambda: a.connected(b))
        assert a.send(b, [b"x", bytes(100_000)])
        await until(lambda: heard == [b"x" + bytes(100_000)])
        return a.carried_by(b)


def test_within_a_host_and_between_hosts() -> None:
    async def work() -> None:
        assert await carried("auto", "auto") == "local"
        assert await carried("auto", "auto", same_host=False) == "tcp"

    run(work())


@pytest.mark.usefixtures("rdma")
def test_a_faster_device_makes_ucx_the_choice_between_hosts() -> None:
    async def work() -> None:
        assert libucp.rdma_devices() == ["mlx5_0"]
        assert await carried("auto", "auto") == "local"
        assert await carried("auto", "auto", same_host=False) == "ucx"
        assert await carried("auto", "ucx") == "ucx"

    run(work())


def test_nodes_of_different_abilities_agree() -> None:
    async def work() -> None:
        assert await carried("auto", "sockets") == "tcp"
        assert await carried("sockets", "auto") == "tcp"

    run(work())


def test_nothing_in_common_is_no_link_and_no_end() -> None:
    async def work() -> None:
        async with started("a", "sockets") as (a, _, _), started("b", "ucx") as (_, address, _):
            b = Member("b", "1")
            with structlog.testing.capture_logs() as logs:
                a.connect(b, address)
                await until(lambda: len(logs) >= 3)  # it goes on trying
            assert {log["error"] for log in logs} == {"we speak ['tcp'], the peer offers ['ucx']"}
            assert not a.connected(b)
            async with started("b", "sockets") as (_, right, heard):
                a.connect(b, right)
                await until(lambda: a.connected(b))
                assert a.send(b, [b"now"])
                await until(lambda: heard == [b"now"])

    run(work())


def test_the_next_way_is_tried_if_the_best_does_not_open() -> None:
    async def work() -> None:
        async with started("a", "auto") as (a, _, _), started("b", "auto") as (_, address, _):
            offers = parse_address(address)
            closed = f"local={offers['local']}-gone,tcp={offers['tcp']}"
            a.connect(Member("b", "1"), closed)
            await until(lambda: a.carried_by(Member("b", "1")) == "tcp")

    run(work())


def test_a_peer_of_another_user_comes_over_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        assert await carried("auto", "auto") == "local"
        monkeypatch.setattr(sockets, "uid_of", lambda _: os.geteuid() + 1)
        assert await carried("auto", "auto") == "tcp"

    run(work())


def test_who_connects_to_a_unix_socket_is_known() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert sockets.uid_of(near) == os.geteuid()


def test_an_address_parses_or_says_why_not() -> None:
    assert parse_address("tcp=[::1]:7,local=a/b") == {"tcp": "[::1]:7", "local": "a/b"}
    for junk in ("", "127.0.0.1:1", "tcp=h:1,", "tcp=h:1,x"):
        with pytest.raises(ValueError, match="not an address"):
            parse_address(junk)


def test_the_way_within_a_host_is_offered_to_that_host_only() -> None:
    driver = SocketDriver()
    assert driver.usable("tcp", "10.0.0.1:7")
    assert not driver.usable("local", "0123456789abcdef/name")
