"""A scheduler stand-in with a real gRPC front door; its tokens are a function of prompt, seed and position."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from controlplane.contract import rpc
from controlplane.contract.auth import bearer_matches
from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.prompt_scores import score_record
from controlplane.contract.requests import (
    Cancel,
    FinishReason,
    GatewayMessage,
    Log,
    Recall,
    Recalled,
    RefusalCode,
    Refused,
    SchedulerMessage,
    Submit,
    Token,
    Tokens,
)


def token_at(prompt: tuple[int, ...], seed: int, position: int, low: int = 300, count: int = 1000) -> int:
    """What the imaginary model says. By default only ids that are ordinary text in the demo's tokenizer."""
    mixed = (sum(prompt) * 31 + len(prompt) * 7 + seed * 1_000_003 + position * 7919) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 13)) * 0x5BD1E995 & 0xFFFFFFFF
    return low + (mixed >> 7) % count


def reference(prompt: tuple[int, ...], seed: int, count: int) -> list[int]:
    return [token_at(prompt, seed, position) for position in range(count)]


def scores_of(prompt: tuple[int, ...], top: int) -> bytes:
    """What the imaginary model thinks of a prompt: each token comes second, after the one with the next id."""
    records = np.zeros(len(prompt) - 1, score_record(top))
    for at, token in enumerate(prompt[1:]):
        likeliest = [token + 1, token, *range(token + 2, token + top)][:top]
        best = [(other, -0.125 * (at + 1) * (place + 1)) for place, other in enumerate(likeliest)]
        records[at] = (-0.25 * (at + 1), 2, best)
    return records.tobytes()


@dataclass(slots=True)
class Running:
    submit: Submit
    session: int
    position: int


@dataclass
class FakeNode:
    """Serves the pipelines of `epochs`. Its knobs are plain attributes, read at each step."""

    member: Member
    token: str = "t"
    epochs: dict[PipelineId, int] = field(default_factory=dict)
    step_s: float = 0.002
    burst: int = 1  # tokens of one request in one message
    held: bool = False  # issues no tokens
    duplicate: bool = False  # sends everything twice, the second time one token further back
    drop_next: int = 0  # so many tokens are made and not sent: gaps
    stale_next: int = 0  # so many batches are sent with the epoch before
    twist: bool = False  # another model: different tokens
    refuse: Callable[[Submit], RefusalCode | None] = lambda submit: None
    speak: Callable[[Submit, int], int] | None = None

    def __post_init__(self) -> None:
        self.address = ""
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.running: dict[int, Running] = {}
        self.known: dict[int, Running] = {}  # all there ever were: it forgets nothing by itself
        self.streams = 0
        self._outboxes: dict[int, asyncio.Queue[SchedulerMessage | None]] = {}
        self._server: grpc.aio.Server | None = None
        self._stepper: asyncio.Task[None] | None = None

    async def start(self) -> FakeNode:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                *rpc.PINGS_WELCOME,
            ]
        )
        handler = rpc.stream_handler(rpc.FRONTDOOR, "Serve", self._serve, rpc.decode_gateway_message)
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        self._stepper = asyncio.create_task(self._steps())
        return self

    async def stop(self) -> None:
        """Like a death: streams break, nothing is said."""
        if self._stepper is not None:
            self._stepper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stepper
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    def break_streams(self) -> None:
        for outbox in self._outboxes.values():
            outbox.put_nowait(None)

    async def _serve(
        self, requests: AsyncIterator[GatewayMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[SchedulerMessage]:
        metadata = dict(context.invocation_metadata() or ())
        if not bearer_matches(metadata.get("authorization"), self.token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        await context.send_initial_metadata(rpc.ACCEPTED)
        self.streams += 1
        session = self.streams
        outbox = self._outboxes[session] = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, session))
        try:
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            del self._outboxes[session]
            reader.cancel()

    async def _read(self, requests: AsyncIterator[GatewayMessage], session: int) -> None:
        async for message in requests:
            match message:
                case Cancel():
                    self.cancels.append(message)
                    run = self.running.get(message.rid)
                    if run is not None and run.session == session:
                        del self.running[message.rid]
                case Recall(rid):
                    self._outboxes[session].put_nowait(Recalled(rid, self._log(rid)))
                case Submit():
                    self.submits.append(message)
                    code = self.refuse(message)
                    if message.pipeline not in self.epochs:
                        code = RefusalCode.NOT_HERE
                    if code is not None:
                        refused = Refused(message.rid, message.pipeline, code, f"refused: {code}", 2.0)
                        self._outboxes[session].put_nowait(refused)
                    else:
                        self._accept(message, session)

    def _accept(self, message: Submit, session: int) -> None:
        old = self.running.get(message.rid)
        code = RefusalCode.SUPERSEDED
        if old is not None and message.reader < old.submit.reader:
            late = Refused(message.rid, message.pipeline, code, "superseded", reader=old.submit.reader)
            self._outboxes[session].put_nowait(late)
            return
        if old is not None and old.session != session and old.session in self._outboxes:
            ended = Refused(message.rid, old.submit.pipeline, code, "superseded")
            self._outboxes[old.session].put_nowait(ended)
        run = Running(message, session, len(message.emitted))
        self.running[message.rid] = run
        if message.context is not None:
            self.known[message.rid] = run

    def _log(self, rid: int) -> Log | None:
        run = self.known.get(rid)
        if run is None:
            return None
        submit = run.submit
        emitted = tuple(self._token(submit, position) for position in range(run.position))
        assert submit.context is not None
        return Log(submit.pipeline, submit.prompt, submit.sampling, emitted, submit.context, submit.reader)

    def _token(self, submit: Submit, position: int) -> int:
        speak = self.speak or (lambda s, p: token_at(s.prompt, s.sampling.seed, p))
        return speak(submit, position) + self.twist

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.held:
                continue
            batches: dict[tuple[int, PipelineId], list[Token]] = defaultdict(list)
            for rid, run in list(self.running.items()):
                if run.submit.pipeline not in self.epochs:
                    del self.running[rid]
                    continue
                for _ in range(self.burst):
                    token = self._next(run)
                    if self.drop_next:
                        self.drop_next -= 1
                    else:
                        batches[run.session, run.submit.pipeline].append(token)
                    if token.finish is not None:
                        del self.running[rid]
                        break
            for (session, pipeline), tokens in batches.items():
                self._send(session, pipeline, tokens)

    def _send(self, session: int, pipeline: PipelineId, tokens: list[Token]) -> None:
        outbox = self._outboxes.get(session)
        if outbox is None:
            return
        epoch = self.epochs[pipeline]
        if self.stale_next:
            self.stale_next -= 1
            epoch -= 1
        outbox.put_nowait(Tokens(pipeline, epoch, tuple(tokens)))
        if self.duplicate:
            outbox.put_nowait(Tokens(pipeline, epoch, tuple(tokens)))

    def _next(self, run: Running) -> Token:
        submit, position = run.submit, run.position
        sampling = submit.sampling
        run.position += 1
        token = self._token(submit, position)
        finish = None
        if token in sampling.stop_token_ids and position >= sampling.min_tokens:
            finish = FinishReason.STOP
        elif position + 1 >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if sampling.logprobs is not None:
            logprob = -0.25 * (position % 4)
            top = tuple((token + k, logprob - k) for k in range(sampling.logprobs))
        scores = None
        if sampling.prompt_logprobs is not None and position == 0:
            scores = scores_of(submit.prompt, sampling.prompt_logprobs)
        return Token(submit.rid, position, token, logprob, top, finish, prompt_scores=scores)
