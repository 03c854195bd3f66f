"""A whole cluster on IPv6, on a host name, and on every address of its host: clients, links, reports and kfadmin."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from controlplane.contract.address import bound, join, port_of
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.kfadmin import rundir
from controlplane.kfadmin.loadgen import sample_prompts
from controlplane.kfadmin.rundir import port_is_free
from tests.e2e.cluster import Cluster

PROMPTS = sample_prompts(4, 40)


def free_run(host: str, count: int) -> int:
    """The first of so many free ports in a row, below those that the kernel gives to connections."""
    found = 0
    for port in range(20000, 32768):
        found = found + 1 if port_is_free(host, port) else 0
        if found == count:
            return port - count + 1
    raise AssertionError("no free ports")


def test_addresses_as_urls_and_grpc_want_them() -> None:
    assert [join(host, 80) for host in ("::1", "[::1]", "10.0.0.1", "a.example")] == [
        "[::1]:80",
        "[::1]:80",
        "10.0.0.1:80",
        "a.example:80",
    ]


@pytest.mark.parametrize("host", ["::1", "[::1]", "127.0.0.1", "localhost", "::", "0.0.0.0"])
def test_a_port_is_taken_only_if_somebody_has_it(host: str) -> None:
    with bound(host, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(host, port)
    assert port_is_free(host, port)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.9.* is not an address of this machine"):
        port_is_free("203.0.113.9", 20202)


def test_a_port_that_is_not_to_be_had_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on \[fe80::1\]:20202: Invalid argument"):
        port_is_free("fe80::1", 20202)  # of which interface?
    for host in ("a..b", ".", "a" * 64):
        with pytest.raises(ConfigError, match="is not a host name"):
            port_is_free(host, 20202)

    def refused(host: str, port: int) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(rundir, "bound", refused)  # root may bind any
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:81: Permission denied"):
        port_is_free("127.0.0.1", 81)


def test_who_binds_every_address_says_which_one_is_registered() -> None:
    with pytest.raises(ValueError, match="advertise"):
        ClusterConfig("r", "m", (), host="0.0.0.0")
    with pytest.raises(ValueError, match="advertise"):
        ClusterConfig("r", "m", (), host="127.0.0.1", advertise="::")
    assert (
        ClusterConfig("r", "m", (), host="0.0.0.0", advertise="10.1.2.3", insecure=True).advertised
        == "10.1.2.3"
    )
    assert ClusterConfig("r", "m", (), host="::1").advertised == "::1"


@pytest.mark.parametrize(
    ("host", "advertise", "registered"),
    [("::1", "", "[::1]"), ("0.0.0.0", "127.0.0.1", "127.0.0.1"), ("localhost", "", "localhost")],
)
def test_a_cluster_serves_there(host: str, advertise: str, registered: str, etcd_binary: None) -> None:
    open_to_all = host == "0.0.0.0"  # which takes certificates
    first = free_run(host, 9)
    ports = {"controller_ports": f"{first}", "node_ports": f"{first + 1}-{first + 4}"}
    ports["link_ports"] = f"{first + 5}-{first + 8}"
    with Cluster(
        host=host, advertise=advertise, secure=open_to_all, controllers=1, instances=2, stages=2, **ports
    ) as cluster:
        scheme = "https" if open_to_all else "http"
        assert cluster.local.gateway_url.startswith(f"{scheme}://{registered}:")
        status = cluster.local.status()
        for where in (
            *(node.rpc_address for node in status.nodes),
            *(controller.admin_address for controller in status.controllers),
            *(gateway.address for gateway in status.gateways),
        ):
            assert where.startswith(f"{registered}:"), where
        for node in status.nodes:
            (tcp,) = (part for part in node.link_address.split(",") if part.startswith("tcp="))
            assert socket.getaddrinfo(tcp[4:].rpartition(":")[0].strip("[]"), None)
            number = int(node.node.removeprefix("n"))
            assert port_of(node.rpc_address) == first + 1 + number
            assert port_of(tcp) == first + 5 + number
        asyncio.run(cluster.references(PROMPTS))
        asyncio.run(cluster.expect_equal(asyncio.run(cluster.generator.streams(PROMPTS))))
