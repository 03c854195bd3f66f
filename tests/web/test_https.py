"""HTTPS of gateways and admin APIs: certificates are replaced while they serve, and plain HTTP gets nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding

from controlplane.certs.authority import load_chain
from controlplane.contract.config import ClusterConfig, TlsConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.kfadmin.client import trust
from tests.certificates import folder, settings
from web.gateway.http.server import GatewayServer, make_server
from web.https import https_of

G1 = ProcessName(ProcessRole.GATEWAY, "g1")


def config_of(**given: Any) -> ClusterConfig:
    return ClusterConfig(run_dir="r", model="m", etcd=(), cluster="test", **given)


async def hello(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, int]]:
    """(folder of certificates, port)"""
    made = folder(tmp_path / "certs", (G1.role, G1.name), hosts=("127.0.0.1",))
    config = config_of(host="127.0.0.1", tls=TlsConfig(https_cert=settings(made).cert))
    listener = socket.create_server(("127.0.0.1", 0))
    server: GatewayServer = make_server(hello, https=https_of(config, G1))
    thread = threading.Thread(target=lambda: asyncio.run(uvicorn.Server.serve(server, sockets=[listener])))
    thread.start()
    try:
        yield made, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)


def shown(port: int, ca: Path) -> bytes:
    """The certificate that a fresh connection is shown."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as end,
    ):
        found = end.getpeercert(binary_form=True)
        assert found is not None
        return found


def test_https_and_new_certificates_while_it_serves(served: tuple[Any, int]) -> None:
    made, port = served
    url = f"https://127.0.0.1:{port}/"
    with httpx.Client(verify=trust(url, str(made.ca)), trust_env=False, timeout=10) as client:
        assert client.get(url).text == "https"
        first = shown(port, made.ca)
        made.renew(datetime.now(UTC))
        second = shown(port, made.ca)
        assert second != first
        assert second == load_chain((made.path / "gateway-g1.pem").read_bytes())[0].public_bytes(Encoding.DER)
        (made.path / "gateway-g1.pem").write_text("half")
        assert shown(port, made.ca) == second
        assert client.get(url).text == "https", "a connection that stands goes on"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url, trust_env=False, timeout=10)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=10)


def test_where_https_is_spoken() -> None:
    tls = TlsConfig(ca="ca", cert="{process}.pem")
    assert config_of().https is None
    assert config_of(tls=tls).https is None, "on loopback only if it is asked for"
    assert config_of(tls=tls, host="10.0.0.1").https == ("{process}.pem", "{process}.pem")
    own = TlsConfig(ca="ca", cert="c", https_cert="web.pem", https_key="web.key")
    assert config_of(tls=own).https == ("web.pem", "web.key")
    assert https_of(config_of(), G1) is None
    with pytest.raises(ConfigError, match=r"web\.pem"):
        https_of(config_of(tls=own), G1)


@pytest.mark.parametrize("host", ["10.0.0.1", "node-1.example", "::", "0.0.0.0", "fe80::1"])
def test_other_addresses_than_loopback_need_certificates(host: str) -> None:
    given: dict[str, Any] = {"host": host, "advertise": "10.0.0.1"}
    with pytest.raises(ConfigError, match=r"kfadmin up.*insecure = true"):
        config_of(**given)
    assert config_of(**given, tls=TlsConfig(ca="a", cert="c")).https is not None
    assert config_of(**given, insecure=True).https is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_does_not(host: str) -> None:
    assert config_of(host=host).host == host
