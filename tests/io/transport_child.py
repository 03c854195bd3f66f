"""A node's transport in a process of its own, for `test_transport_processes.py`: prints its address, then obeys.

Arguments: kind (of NETWORKED), name, incarnation, secret (hex). Lines on stdin: `connect NODE INCARNATION ADDRESS`,
`send NODE INCARNATION BYTES`. A message `echo ...` is sent back on our own link to its sender. Lines on stdout:
`address A`, `up NODE`, `down NODE REASON`, `got NODE BYTES` for other messages.
"""

from __future__ import annotations

import asyncio
import sys

from controlplane.contract.ids import Member
from dataplane.transport.base import TransportConfig
from dataplane.transport.links import LinkTransport
from tests.io.transport_nodes import driver


def say(*words: str) -> None:
    print(*words, flush=True)


async def main(kind: str, name: str, incarnation: str, secret: str) -> None:
    def on_message(peer: Member, data: memoryview) -> None:
        if bytes(data[:4]) == b"echo":
            transport.send(peer, [data])
        else:
            say("got", peer.node, str(len(data)))

    transport = LinkTransport(
        TransportConfig(member=Member(name, incarnation), cluster="test", secret=bytes.fromhex(secret)),
        [driver(kind)],
        on_message=on_message,
        on_link_up=lambda peer: say("up", peer.node),
        on_link_down=lambda peer, reason: say("down", peer.node, reason),
    )
    address = await transport.start()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    say("address", address)
    while line := await reader.readline():
        match line.decode().split():
            case ["connect", node, wanted, where]:
                transport.connect(Member(node, wanted), where)
            case ["send", node, wanted, count]:
                assert transport.send(Member(node, wanted), [bytes(int(count))])
            case other:
                raise ValueError(other)
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
