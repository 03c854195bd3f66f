"""A client of a node's front door, as a gateway is one: no HTTP, no tokenizer, no event stream in the figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import grpc

from bench.peers.protocol import Answer
from controlplane.contract import rpc
from controlplane.contract.auth import derive, load_secret
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.ids import new_rid
from controlplane.contract.requests import GatewayMessage, Refused, Sampling, Submit, Tokens
from controlplane.kfadmin.local import LocalCluster

LIMIT_S = 600.0
CONNECT_S = 5.0
MESSAGE_BYTES_MAX = 64 << 20
OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.use_local_subchannel_pool", 1)]


class NotServed(KevlarFlowError):
    """The node refused a request, ended one early, or was too slow."""


class FrontDoor:
    """The scheduler of a cluster's first pipeline."""

    def __init__(self, cluster: LocalCluster) -> None:
        status = cluster.status()
        pipeline = status.pipelines[0]
        scheduler = pipeline.stages[0].serving[0]
        self._pipeline = pipeline.id
        self._address = next(n.rpc_address for n in status.nodes if n.node == scheduler.node)
        token = derive(load_secret(cluster.config.secret_file), "grpc")
        self._metadata = (("authorization", f"Bearer {token}"),)

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling | None = None
    ) -> Answer:
        """All prompts at once, exactly `tokens` for each, greedy unless `sampling` says otherwise. Times from when all
        was sent. Raises NotServed."""
        return asyncio.run(self._generate(prompts, tokens, sampling))

    async def _generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling | None
    ) -> Answer:
        sampling = sampling or Sampling(max_tokens=tokens, seed=1, temperature=0.0)
        submits = [Submit(new_rid(), self._pipeline, tuple(prompt), sampling) for prompt in prompts]
        rows = {submit.rid: row for row, submit in enumerate(submits)}
        answer = Answer([[] for _ in prompts], [[] for _ in prompts])
        async with (
            asyncio.timeout(LIMIT_S),
            grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel,
        ):
            await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
            serve = channel.stream_stream(
                rpc.FRONTDOOR_SERVE,
                request_serializer=rpc.encode,
                response_deserializer=rpc.decode_scheduler_message,
            )
            done = asyncio.Event()
            started = time.perf_counter()
            call = serve(_questions(submits, done), metadata=self._metadata)
            missing = len(prompts)
            async for message in call:
                now = time.perf_counter() - started
                match message:
                    case Refused(code=code, message=text):
                        raise NotServed(f"refused ({code}): {text}")
                    case Tokens(items=items):
                        for item in items:
                            row = rows[item.rid]
                            answer.times[row].append(now)
                            answer.tokens[row].append(item.token)
                            missing -= item.finish is not None
                if not missing:
                    break
            done.set()
            call.cancel()
        if any(len(stream) != tokens for stream in answer.tokens):
            raise NotServed(f"got {[len(s) for s in answer.tokens]} tokens and not {tokens}")
        return answer


async def _questions(submits: Sequence[Submit], done: asyncio.Event) -> AsyncIterator[GatewayMessage]:
    for submit in submits:
        yield submit
    await done.wait()  # the stream stays open while answers come
