"""The admin API on a Unix socket: kfadmin on the same host sends no token to a port."""

from __future__ import annotations

import asyncio
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.contract.address import admin_socket
from controlplane.kfadmin.client import AdminClient, NotAllowed, Unreachable
from controlplane.kfadmin.rundir import Endpoints, admin_endpoints
from controlplane.main import _admin_server
from tests.web.admin_service import MemoryService
from web.admin.app import build_app
from web.admin.local_socket import serve_locally

LIMIT_S = 20.0


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of c1."""
    run_dir = tmp_path_factory.mktemp("r")
    path = admin_socket(run_dir, "c1")
    assert path is not None
    server = _admin_server(build_app(MemoryService(), "token"))

    async def serve() -> None:
        held = asyncio.Event()
        task = asyncio.create_task(serve_locally(server, run_dir, "c1", held))
        await asyncio.sleep(0)
        assert not path.exists(), "a process without its name takes nothing"
        held.set()
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        started.set()
        await task

    started = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(LIMIT_S)
    try:
        yield path
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)


def test_kfadmin_asks_the_socket(served: Path) -> None:
    assert stat.S_IMODE(served.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.parent.stat().st_mode) == 0o700
    gone = served.with_name("c2.sock")
    endpoints = admin_endpoints(Endpoints((), ("http://127.0.0.1:1",), (str(gone), str(served))))
    with AdminClient(endpoints, "token") as client:
        assert client.status().nodes
    with AdminClient(endpoints, "wrong") as client, pytest.raises(NotAllowed, match=r"^the admin token"):
        client.status()
    with AdminClient([f"unix:{gone}"], "token") as client, pytest.raises(Unreachable, match=str(gone)):
        client.status()


def test_a_path_that_is_too_long_leaves_the_ports(tmp_path: Path) -> None:
    assert admin_socket(tmp_path / ("x" * 110), "c1") is None
    assert admin_endpoints(Endpoints((), ("http://127.0.0.1:1",))) == ["http://127.0.0.1:1"]


def test_no_authority_is_read_where_nobody_has_a_certificate(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read the system's takes longer than all the rest of a question, for each endpoint."""

    def read(*_: object, **__: object) -> ssl.SSLContext:
        raise AssertionError("authorities are read")

    monkeypatch.setattr(ssl, "create_default_context", read)
    endpoints = admin_endpoints(Endpoints((), ("http://127.0.0.1:1",), (str(served),)))
    for asked in (endpoints, ["http://127.0.0.1:1", *endpoints]):
        with AdminClient(asked, "token") as client:
            assert client.status().nodes
