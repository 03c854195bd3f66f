"""A client of a node's front door, as a gateway is one: no HTTP, no tokenizer, no event stream in the figures."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import grpc

from bench.peers.protocol import Answer
from controlplane.contract import rpc
from controlplane.contract.auth import derive, load_secret
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.ids import new_rid
from controlplane.contract.requests import GatewayMessage, Refused, Sampling, Submit, Token, Tokens
from controlplane.kfadmin.local import LocalCluster

LIMIT_S = 600.0
CONNECT_S = 5.0
MESSAGE_BYTES_MAX = 64 << 20
OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.use_local_subchannel_pool", 1)]


class NotServed(KevlarFlowError):
    """The node refused a request, ended one early, or was too slow."""


class FrontDoor:
    """The scheduler of one of a cluster's pipelines."""

    def __init__(self, cluster: LocalCluster, pipeline: int = 0) -> None:
        status = cluster.status()
        chosen = status.pipelines[pipeline]
        scheduler = chosen.stages[0].serving[0]
        self._pipeline = chosen.id
        self._address = next(n.rpc_address for n in status.nodes if n.node == scheduler.node)
        token = derive(load_secret(cluster.config.secret_file), "grpc")
        self._metadata = (("authorization", f"Bearer {token}"),)

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling | None = None
    ) -> Answer:
        """All prompts at once, exactly `tokens` for each, greedy unless `sampling` says otherwise. Times from when all
        was sent. Raises NotServed."""
        return asyncio.run(self._generate(prompts, tokens, sampling))

    def submit(self, prompt: Sequence[int], tokens: int, sampling: Sampling | None = None) -> Submit:
        """A question: exactly `tokens`, greedy unless `sampling` says otherwise."""
        sampling = sampling or Sampling(max_tokens=tokens, seed=1, temperature=0.0)
        return Submit(new_rid(), self._pipeline, tuple(prompt), sampling)

    async def answers(self, questions: AsyncIterator[GatewayMessage]) -> AsyncGenerator[tuple[float, Token]]:
        """Every token that comes, and when (`time.perf_counter`); for as long as the caller goes on reading.
        Raises NotServed."""
        async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
            serve = channel.stream_stream(
                rpc.FRONTDOOR_SERVE,
                request_serializer=rpc.encode,
                response_deserializer=rpc.decode_scheduler_message,
            )
            call = serve(questions, metadata=self._metadata)
            try:
                async for message in call:
                    now = time.perf_counter()
                    match message:
                        case Refused(code=code, message=text):
                            raise NotServed(f"refused ({code}): {text}")
                        case Tokens(items=items):
                            for item in items:
                                yield now, item
            finally:
                call.cancel()

    async def _generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling | None
    ) -> Answer:
        submits = [self.submit(prompt, tokens, sampling) for prompt in prompts]
        rows = {submit.rid: row for row, submit in enumerate(submits)}
        answer = Answer([[] for _ in prompts], [[] for _ in prompts])
        missing = len(prompts)
        started = 0.0

        async def questions() -> AsyncIterator[GatewayMessage]:
            nonlocal started
            started = time.perf_counter()
            for submit in submits:
                yield submit
            await asyncio.Event().wait()  # the stream stays open while answers come

        async with asyncio.timeout(LIMIT_S), contextlib.aclosing(self.answers(questions())) as answers:
            async for now, item in answers:
                row = rows[item.rid]
                answer.times[row].append(now - started)
                answer.tokens[row].append(item.token)
                missing -= item.finish is not None
                if not missing:
                    break
        if any(len(stream) != tokens for stream in answer.tokens):
            raise NotServed(f"got {[len(s) for s in answer.tokens]} tokens and not {tokens}")
        return answer
