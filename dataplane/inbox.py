"""What waits for a node's worker, in the order in which it came, and which steps of it may run as one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import assert_never

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.topology import Topology
from dataplane.core.messages import Meta, Ping, StepMeta, step_tokens
from dataplane.transport.frames import Buffer

INBOX_MAX = 20_000
LOOK_MAX = 64  # items that are looked through for company


@dataclass(frozen=True, slots=True)
class Message:
    """One message from a link, or from this node to itself."""

    peer: Member
    meta: Meta
    payload: Buffer = b""
    tokens: tuple[int, ...] = ()  # stage 0 only
    came: float = 0.0  # MOMENT.now(); only emulated devices ask for it


@dataclass(frozen=True, slots=True)
class LinkChanged:
    node: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a turn for copies that wait for time to pass."""


Item = Message | Topology | LinkChanged | Wake


class Inbox:
    """A queue for one reader that can also look at what waits."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None  # set: somebody waits for an item

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> bool:
        """False, and the item is dropped: INBOX_MAX wait already. A topology always has room."""
        if len(self._items) >= INBOX_MAX and not isinstance(item, Topology):
            return False
        self._items.append(item)
        self._tell()
        return True

    def put_back(self, items: Iterable[Message]) -> None:
        """Before all others, in this order: their time has come."""
        self._items.extendleft(reversed(list(items)))
        self._tell()

    async def get(self) -> Item:
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()

    async def more(self, seconds: float) -> None:
        """For the reader: returns when one more item has come, or after so long."""
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([self._reader], timeout=seconds)
        finally:
            self._reader = None

    def _tell(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def take_company(self, first: StepMeta, tokens_max: int) -> list[Message]:
        """See `company`; what it names leaves the queue."""
        taken: list[Message] = []
        if not self._items:
            return taken
        for place, message in reversed(company(self._items, first, tokens_max)):
            del self._items[place]
            taken.append(message)
        return taken[::-1]

    def take_other(self, pipeline: PipelineId, kinds: tuple[type, ...]) -> Message | None:
        """The first message of another pipeline, if it is of these kinds; what it overtakes is as in `company`."""
        for place, item in enumerate(islice(self._items, LOOK_MAX)):
            if isinstance(item, Topology | LinkChanged):
                return None
            if (
                isinstance(item, Message)
                and not isinstance(item.meta, Ping)
                and item.meta.pipeline != pipeline
            ):
                if not isinstance(item.meta, kinds):
                    return None
                del self._items[place]
                return item
        return None

    def waits_only(self, pipeline: PipelineId) -> bool:
        """Whether nothing waits but what comes behind this pipeline's step, which is about to run."""
        return all(
            isinstance(item, Wake)
            or (isinstance(item, Message) and (isinstance(item.meta, Ping) or item.meta.pipeline == pipeline))
            for item in self._items
        )


def company(waiting: Iterable[Item], first: StepMeta, tokens_max: int) -> list[tuple[int, Message]]:
    """The steps of other pipelines, with their places, that may run together with `first` before it is their turn.

    Only what is first of its pipeline comes forward, so a pipeline's items keep their order. Items of different
    pipelines may change places: they have nothing in common but the pool of blocks, where each has its quota. Nothing
    overtakes a topology or a change of links, which concern all pipelines. Together the steps have at most
    `tokens_max` tokens."""
    left = tokens_max - step_tokens(first)
    seen = {first.pipeline}
    found: list[tuple[int, Message]] = []
    for place, item in enumerate(islice(waiting, LOOK_MAX)):
        if left <= 0:
            break
        match item:
            case Wake():
                pass
            case Message(_, meta):
                if isinstance(meta, Ping):
                    continue
                if meta.pipeline not in seen and isinstance(meta, StepMeta):
                    tokens = step_tokens(meta)
                    if 0 < tokens <= left:
                        found.append((place, item))
                        left -= tokens
                seen.add(meta.pipeline)
            case Topology() | LinkChanged():
                break
            case _:
                assert_never(item)
    return found
