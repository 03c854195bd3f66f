"""etcd at its shutdown, and proxies, may end a call with status CANCELLED: an error like any other.

Real etcd cannot be made to do it at will, so here a gRPC server of our own does; everything else in these
tests talks to real etcd.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdUnavailable, EtcdUnknown
from controlplane.etcd.proto import rpc_pb2, rpc_pb2_grpc
from tests.io.etcd_proxy import eventually


class CancellingKv(rpc_pb2_grpc.KVServicer):
    async def Range(self, request: Any, context: Any) -> Any:
        if request.key == b"cancelled":
            await context.abort(grpc.StatusCode.CANCELLED, "context canceled")
        return rpc_pb2.RangeResponse(header=rpc_pb2.ResponseHeader(revision=5))

    async def Put(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.CANCELLED, "context canceled")


class CancellingWatch(rpc_pb2_grpc.WatchServicer):
    async def Watch(self, request_iterator: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.CANCELLED, "etcdserver: watch canceled")
        yield


class CancellingLease(rpc_pb2_grpc.LeaseServicer):
    def __init__(self) -> None:
        self.streams = 0

    async def LeaseGrant(self, request: Any, context: Any) -> Any:
        return rpc_pb2.LeaseGrantResponse(ID=7, TTL=request.TTL)

    async def LeaseKeepAlive(self, request_iterator: Any, context: Any) -> Any:
        self.streams += 1
        await context.abort(grpc.StatusCode.CANCELLED, "context canceled")
        yield


def test_cancelled_by_the_server_neither_ends_a_watch_nor_counts_as_a_refusal() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        lease = CancellingLease()
        generated: Any = rpc_pb2_grpc  # without types
        generated.add_KVServicer_to_server(CancellingKv(), server)
        generated.add_WatchServicer_to_server(CancellingWatch(), server)
        generated.add_LeaseServicer_to_server(lease, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with EtcdClient([f"127.0.0.1:{port}"], timeout_s=0.4) as client:
                with pytest.raises(EtcdUnknown):
                    await client.put("k", b"")
                with pytest.raises(EtcdUnavailable):
                    await client.get("cancelled")
                watch = client.watch_prefix("p/")
                assert (await asyncio.wait_for(anext(watch), 5)).revision == 5
                await eventually(lambda: watch.reconnects >= 3, 5, "the watch goes on trying")
                keeper = await client.lease_keeper(2)
                await eventually(lambda: lease.streams >= 3, 5, "the keeper goes on trying")
                await asyncio.wait_for(keeper.lost.wait(), 5)
                assert "not renewed" in keeper.lost_reason
        finally:
            await server.stop(None)

    asyncio.run(main())
