"""Fixed ports: who tries which, what happens when they are taken, and what a host's file may say."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.contract.address import ANY_PORT, bound, port_of, port_range, ports_of
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.ids import Member
from controlplane.contract.version import settings_digest
from controlplane.kfadmin.fleet import plan, read_fleet
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from dataplane.frontdoor import Frontdoor
from dataplane.transport.driver import parse_address
from dataplane.transport.sockets import resolve, split_address
from tests.io.test_hosts import FLEET

from .transport_nodes import cluster, link, run, until

HOST = "127.0.0.1"


@contextlib.contextmanager
def reserved(count: int) -> Iterator[tuple[int, ...]]:
    """Ports in a row that nobody listens on: bound, so that nobody is given one, but open to who asks for it."""
    for first in range(20000, 32768 - count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(bound(HOST, port))
            except OSError:
                continue
            yield tuple(range(first, first + count))
            return
    raise AssertionError("no free ports")


@given(st.integers(1, 65535), st.integers(1, 200), st.integers(0, 10**6))
def test_each_process_tries_every_port_once_and_begins_with_its_own(
    first: int, size: int, number: int
) -> None:
    last = min(first + size - 1, 65535)
    tried = ports_of(f"{first}-{last}", f"n{number}")
    assert sorted(tried) == list(range(first, last + 1))
    assert tried[0] == first + number % len(tried)


def test_without_a_setting_any_port_will_do() -> None:
    assert ports_of("", "n3") == ANY_PORT
    assert ports_of("7100", "n3") == (7100,)
    assert ports_of("7100-7102", "berlin") == (7100, 7101, 7102)
    for wrong in ("0", "7-6", "65536", "1-70000"):
        with pytest.raises(ValueError, match="1 to 65,535"):
            port_range(wrong)


def test_front_doors_and_controllers_take_the_first_port_that_is_free_and_say_when_none_is() -> None:
    async def work() -> None:
        with reserved(2) as ports:
            doors = [Frontdoor("t", lambda *_: None, lambda _: None) for _ in range(2)]
            with bound(HOST, ports[0]) as other:
                other.listen()
                assert port_of(await doors[0].start(HOST, "10.1.2.3", ports)) == ports[1]
                with pytest.raises(
                    ConfigError, match=rf"ports {ports[0]} to {ports[1]} are taken.*node_ports"
                ):
                    await doors[1].start(HOST, "", ports)
            reports = ReportServer("t", Inbox(), TimingConfig())
            assert await reports.start(HOST, "10.1.2.3", ports) == f"10.1.2.3:{ports[0]}"
            with pytest.raises(ConfigError, match=rf"port {ports[0]} is taken.*controller_ports"):
                await ReportServer("t", Inbox(), TimingConfig()).start(HOST, "", ports[:1])
            with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.9:7100 for .*node_ports"):
                await doors[1].start("203.0.113.9", "", (7100,))
            await doors[0].close()
            await reports.stop()

    run(work())


@pytest.mark.parametrize("kind", ["sockets", "ucx"])
def test_links_take_the_first_port_that_is_free_and_say_when_none_is(kind: str) -> None:
    async def work() -> None:
        with reserved(2) as ports:
            async with cluster(kind) as make:
                a = await make("a", ports=ports)
                b = await make("b", ports=ports, advertise="10.1.2.3")
                assert (a.port, b.port) == ports
                (where,) = (w for k, w in parse_address(b.address).items() if k != "local")
                assert where.startswith("10.1.2.3:")
                with pytest.raises(
                    ConfigError, match=rf"ports {ports[0]} to {ports[1]} are taken.*link_ports"
                ):
                    await make("c", ports=ports)
                await a.transport.close()
                again = await make("d", ports=ports)
                assert again.port == ports[0]

    run(work())


def link_local() -> str:
    """An address with its zone, as "fe80::1%eth0", that this machine has."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, interface = line.split()
        if int(scope, 16) == 0x20:
            return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{interface}"
    pytest.skip("no interface here has a link-local address")


def test_links_on_a_link_local_address_keep_its_zone() -> None:
    async def work() -> None:
        host = link_local()
        async with cluster("sockets") as make:
            a, b = await make("a", host=host), await make("b", host=host)
            (where,) = (w for k, w in parse_address(b.address).items() if k != "local")
            assert split_address(where) == (host, b.port)
            b.address = ",".join(o for o in b.address.split(",") if not o.startswith("local="))
            await link(a, b)
            a.transport.send(b.member, [b"across"])
            await until(lambda: b.messages)

    run(work())


def test_ucx_refuses_a_link_local_address_which_it_would_not_reach() -> None:
    async def work() -> None:
        async with cluster("ucx") as make:
            with pytest.raises(ConfigError, match="UCX knows no link-local addresses"):
                await make("a", host=link_local())
            a = await make("a")
            a.transport.connect(Member("b", "1"), f"ucx=[{link_local()}]:7100")
            await asyncio.sleep(0.1)  # dials in vain, and does no harm
            assert not a.transport.connected(Member("b", "1"))

    run(work())


@pytest.mark.parametrize("kind", ["sockets", "ucx"])
@pytest.mark.parametrize("host", ["::1", "::"])
def test_links_on_ipv6_carry_messages(kind: str, host: str) -> None:
    """UCX also where the interfaces have IPv4 addresses, which it would take first: it died of that."""

    async def work() -> None:
        async with cluster(kind) as make:
            a, b = [await make(name, host=host, advertise="::1") for name in "ab"]
            b.address = ",".join(o for o in b.address.split(",") if not o.startswith("local="))
            await link(a, b)
            a.transport.send(b.member, [b"across"])
            await until(lambda: b.messages)

    run(work())


def test_an_address_is_resolved_with_its_zone_and_to_no_other_port() -> None:
    async def work() -> None:
        lo = socket.if_nametoindex("lo")
        for zone in ("lo", str(lo)):
            found = await resolve(f"[fe80::1%{zone}]:7100")
            assert (found.host, found.where) == ("fe80::1%lo", ("fe80::1", 7100, 0, lo))
        assert (await resolve("[::1]:7100")).host == "::1"
        assert (await resolve("127.0.0.1:7100")).where == ("127.0.0.1", 7100)
        with pytest.raises(ValueError, match="port out of range"):
            await resolve("127.0.0.1:99999")

    run(work())


@pytest.mark.parametrize("host", ["a..b", ".", "a" * 64])
def test_links_on_what_is_no_name_of_a_host_say_so(host: str) -> None:
    async def work() -> None:
        async with cluster("sockets") as make:
            with pytest.raises(ConfigError, match=r"cannot listen on .* is not a host name"):
                await make("a", host=host)

    run(work())


def test_ports_are_no_part_of_what_settings_do_and_may_not_overlap() -> None:
    plain = ClusterConfig("r", "m", ())
    fixed = ClusterConfig("r", "m", (), node_ports="7100-7103", link_ports="7200", controller_ports="7000")
    assert settings_digest(plain) == settings_digest(fixed)
    for wrong, said in (
        (
            {"node_ports": "7100-7103", "link_ports": "7103"},
            "node_ports = '7100-7103' and link_ports = '7103'",
        ),
        ({"node_ports": "8000"}, "gateway_port = 8000 and node_ports"),
        ({"controller_ports": "8099-8101"}, "admin_port = 8100 and controller_ports"),
        ({"node_ports": "9-8"}, "node_ports = '9-8': ports are"),
        ({"node_ports": "http"}, "node_ports = 'http': allowed is"),
    ):
        with pytest.raises(ValueError, match=said):
            ClusterConfig("r", "m", (), **wrong)


def test_a_host_may_have_ports_of_its_own_and_needs_one_for_each_node(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    ours = FLEET.replace("stages = 1\n", 'stages = 1\nnode_ports = "7100-7107"\n').replace(
        "[hosts.b]\n", '[hosts.b]\nnode_ports = "9100"\n'
    )
    path.write_text(ours)
    fleet = read_fleet(path)
    found = [plan(fleet, name).config(tmp_path, tmp_path, tmp_path) for name in ("a", "b")]
    assert [config.node_ports for config in found] == ["7100-7107", "9100"]
    path.write_text(
        ours.replace('nodes = ["n1"]', 'nodes = ["n1", "n2"]').replace("instances = 2", "instances = 3")
    )
    with pytest.raises(ConfigError, match=r"hosts\.b: node_ports = '9100' has 1 ports, and 2 processes"):
        read_fleet(path)
    path.write_text(ours.replace("7100-7107", "2300-2400"))
    with pytest.raises(ConfigError, match=r"hosts\.a: etcd_port = 2379 is in node_ports = '2300-2400'"):
        read_fleet(path)
