"""Peers that ping often, and pings that come all at once, end no stream; and every option is one that gRPC has."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from controlplane.contract.address import port_of
from controlplane.contract.config import TimingConfig
from controlplane.shell.inbox import Inbox
from controlplane.shell.rpc import ReportServer
from dataplane.frontdoor import Frontdoor

ROOT = Path(__file__).parents[2]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7  # RFC 9113, section 6
ACK = 1
PINGS = 20  # by default the third one is too many


def frame(kind: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


async def frontdoor() -> tuple[str, Callable[[], Awaitable[None]]]:
    server = Frontdoor("token", lambda _, __: None, lambda _: None)
    return await server.start("127.0.0.1"), server.close


async def reports() -> tuple[str, Callable[[], Awaitable[None]]]:
    server = ReportServer("token", Inbox(), TimingConfig())
    return await server.start("127.0.0.1"), server.stop


@pytest.mark.parametrize("serve", [frontdoor, reports])
def test_pings_that_a_busy_machine_has_delayed_cut_no_connection(
    serve: Callable[[], Awaitable[tuple[str, Callable[[], Awaitable[None]]]]],
) -> None:
    async def go() -> None:
        address, close = await serve()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(address))
        try:
            writer.write(PREFACE + frame(SETTINGS))
            answered = 0
            async with asyncio.timeout(20):
                # Their own answers go out also before the end of the connection: one more tells whether it stands.
                for count in (PINGS, 1):
                    writer.write(frame(PING, bytes(8)) * count)
                    wanted = answered + count
                    while answered < wanted:
                        head = await reader.readexactly(9)
                        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                        assert head[3] != GOAWAY, payload[8:]
                        answered += head[3] == PING and bool(head[4] & ACK)
        finally:
            writer.close()
            await close()

    asyncio.run(go())


def test_every_option_is_one_that_grpc_has() -> None:
    """It passes over a name that it does not know."""
    known = Path(cygrpc.__file__).read_bytes()
    used = {
        name
        for folder in ("controlplane", "dataplane", "web", "tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"""["'](grpc\.[a-z0-9_.]+)["']""", path.read_text())
    }
    assert len(used) > 10
    assert sorted(name for name in used if name.encode() not in known) == []
