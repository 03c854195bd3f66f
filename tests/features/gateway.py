"""A gateway without HTTP, and clients that follow their streams from one gateway to the next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, cast

from controlplane.contract.ids import Member
from controlplane.contract.requests import GatewayMessage, Recalled, Refused, SchedulerMessage, Tokens
from controlplane.contract.topology import Topology
from tests.features.outcome import Outcome
from tests.features.requests import Asked
from web.gateway.errors import ApiError
from web.gateway.http.connection import EXTENSION
from web.gateway.http.generation_response import GenerationResponse
from web.gateway.resume.start_or_resume import Visit, start_or_resume
from web.gateway.resume.tickets import Tickets
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.routing.events import (
    Event,
    RecalledReceived,
    RefusalReceived,
    StreamDown,
    StreamUp,
    TokensReceived,
    TopologySeen,
)
from web.gateway.routing.policy import Policy
from web.gateway.service import Service

if TYPE_CHECKING:
    from tests.features.line import Line

OWNER = bytes(32)
KINDS = {"chat/completions": "chat", "completions": "completion", "responses": "responses"}
DEATHS_MAX = 10  # before a request's first token: it is no poison here
TRIES_MAX = 6  # connections of one client


class Streams:
    """Stands where the dispatcher's gRPC streams are."""

    def __init__(self, gateway: Gateway, line: Line) -> None:
        self._gateway, self._line = gateway, line
        self._sessions: dict[Member, int] = {}

    def open(self, member: Member) -> None:
        asyncio.get_running_loop().call_soon(self._opened, member)

    def _opened(self, member: Member) -> None:
        node = self._line.nodes[member]
        if node.alive and self._gateway.alive and member not in self._sessions:
            self._sessions[member] = node.opened(self._gateway)
            self._gateway.feed(StreamUp(member))

    def close(self, member: Member) -> None:
        if (session := self._sessions.pop(member, None)) is not None:
            self._line.nodes[member].closed(session)

    def lost(self, member: Member) -> None:
        if self._sessions.pop(member, None) is not None:
            self._gateway.feed(StreamDown(member))

    def send(self, member: Member, message: GatewayMessage) -> None:
        session = self._sessions.get(member)
        if session is not None and self._gateway.alive:
            asyncio.get_running_loop().call_soon(self._line.nodes[member].heard, session, message)

    async def aclose(self) -> None:
        for member in list(self._sessions):
            self.close(member)


class Gateway:
    def __init__(self, line: Line, name: str) -> None:
        self.name, self.alive, self.open = name, True, True
        metrics = line.parts.metrics
        self.dispatcher = Dispatcher(Policy(deaths_max=DEATHS_MAX), "", metrics)
        self._streams = Streams(self, line)
        self.dispatcher.links = cast(Any, self._streams)
        self.service = Service(line.parts.model, self.dispatcher, metrics, 1, lambda: 0.0, Tickets("s"))
        self.answers: set[asyncio.Task[None]] = set()

    def saw(self, topology: Topology) -> None:
        self.feed(TopologySeen(topology))

    def feed(self, event: Event) -> None:
        if self.alive:
            self.dispatcher.feed(event)

    def heard(self, member: Member, message: SchedulerMessage) -> None:
        match message:
            case Tokens():
                self.feed(TokensReceived(member, message))
            case Refused():
                self.feed(RefusalReceived(member, message))
            case Recalled():
                self.feed(RecalledReceived(member, message))

    def lost(self, member: Member) -> None:
        self._streams.lost(member)

    def stop(self) -> None:
        """It was told to: clients of streams are sent elsewhere, the rest may finish."""
        self.open = False
        self.dispatcher.hand_over()

    def die(self) -> None:
        """kill -9: nothing is said any more, to anybody."""
        self.alive = self.open = False
        for answer in self.answers:
            answer.cancel()
        for member in list(self._streams._sessions):
            self._streams.close(member)

    async def close(self) -> None:
        for answer in self.answers:
            answer.cancel()
        await asyncio.gather(*self.answers, return_exceptions=True)
        await self.dispatcher.aclose()

    async def answer(self, asked: Asked, visit: Visit, client: Client) -> None:
        """Raises ApiError for a request that is refused."""
        hold = self.service.memory.hold(OWNER)
        body = json.dumps(asked.body).encode()
        started = await start_or_resume(self.service, KINDS[asked.api], body, visit, hold)
        response = GenerationResponse(self.service, started)
        await response({"headers": [], "extensions": {EXTENSION: Wire(client.took)}}, _never, client.sent)


class Wire:
    paused = False

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write

    def watch(self, on_writable: Callable[[], None] | None, on_quiet: Callable[[], None] | None) -> None:
        pass


async def _never() -> Any:
    await asyncio.Event().wait()


class Client:
    """Asks, and asks again at another gateway for what it has not had."""

    def __init__(self, line: Line, asked: Asked, key: str) -> None:
        self.outcome = Outcome()
        self.connections = 0
        self._line, self._asked, self._key = line, asked, key
        self._gateway = line.gateways[0]
        self._raw = b""
        self._status = 0

    async def run(self) -> Outcome:
        while not self.outcome.done:
            assert self.connections < TRIES_MAX, f"it does not end: {self.outcome.error}"
            gateway = self._gateway = next(gateway for gateway in self._line.gateways if gateway.open)
            self.connections += 1
            self._raw, self._status = b"", 0
            visit = Visit(OWNER, "", self._key, self.outcome.last_id or None)
            if self.outcome.last_id:
                visit = Visit(OWNER, "", None, self.outcome.last_id)
            task = asyncio.create_task(gateway.answer(self._asked, visit, self))
            gateway.answers.add(task)
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                task.cancel()
                raise
            gateway.answers.discard(task)
            if task.cancelled():
                continue
            try:
                task.result()
            except ApiError as error:
                if error.status != 503 or gateway.open:
                    raise
        return self.outcome

    async def sent(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif self._status == 503 and not self._gateway.open:
            pass  # it is asked again elsewhere
        elif self._status != 200:
            raise AssertionError(f"refused: {message['body'][:300]!r}")
        elif self._asked.streams:
            self.took(message["body"])
        else:
            self._raw += message["body"]
            if not message["more_body"]:
                self.outcome.whole(json.loads(self._raw))

    def took(self, data: bytes) -> None:
        *events, self._raw = (self._raw + data).split(b"\n\n")
        for event in events:
            self.outcome.event(event.decode())
