"""What a node may rely on when it sends to another node.

A link is one way: a node's own link carries its messages to the peer; what the peer answers comes back on the
peer's link. A link belongs to one incarnation of each side, is authenticated both ways before the first message,
and ends once, for good; a new one is opened while the caller still wants it.

Guarantees, per link: messages arrive whole, in the order sent, at most once. A message accepted by `send` is lost
if the link ends before it arrived, and nobody is told which one: acknowledge what matters.
Not promised: to notice a peer that was stopped but not killed, or a path that goes silent. Keep heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from controlplane.contract.address import ANY_PORT
from controlplane.contract.ids import Member, NodeId

if TYPE_CHECKING:
    from dataplane.transport.sealing import LinkIdentity

Part = bytes | bytearray | memoryview
"""One piece of a message: any C-contiguous buffer does (a numpy array too, through `memoryview`)."""

OnMessage = Callable[[Member, memoryview], None]
OnLinkUp = Callable[[Member], None]
OnLinkDown = Callable[[Member, str], None]

# Of dataplane/transport/frames.py. Here, as a link needs no more of it, and no numpy with threads of its own.
FRAMES_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """Who we are and what we allow. `secret` is shared by the whole cluster. `ports` are tried in turn; 0 takes a
    free one."""

    member: Member
    cluster: str
    secret: bytes
    host: str = "127.0.0.1"
    advertise: str = ""
    """The host that peers connect to; "": the one that is bound."""
    ports: tuple[int, ...] = ANY_PORT
    connect_timeout_s: float = 2.0
    """A link that is not open and authenticated by then is given up and tried again."""
    retry_min_s: float = 0.05
    retry_max_s: float = 1.0
    message_bytes_max: int = 1 << 30
    queue_bytes_max: int = 256 << 20
    """Bound of `queued_bytes` of one peer. One message of any allowed size is taken by an empty queue."""
    identity: LinkIdentity | None = None
    """Of a node with certificates: links that leave the host are sealed."""
    unauthenticated_max: int = 64
    """Incoming connections that have not yet proved themselves, of the network and of this host each; where more come,
    the oldest of them ends."""

    def __post_init__(self) -> None:
        if len(self.secret) < 16:
            raise ValueError("the cluster secret must have at least 16 bytes")


@dataclass(slots=True)
class TransportStats:
    """Counters since start; bytes are payload."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    auth_failures: int = 0
    """Connections that spoke wrongly, proved nothing in time, or until too many others were pending."""
    links_down: int = 0
    sends_refused: int = 0


class Transport(Protocol):
    """Single-threaded: every call and every callback is on the event loop that ran `start`.

    Callbacks, given at construction, must not block:
    - `on_message(peer, data)`: `data` is writable memory that belongs to the receiver from now on.
    - `on_link_up(peer)`: our link to `peer` is open; `send` works.
    - `on_link_down(peer, reason)`: once for each link that was up and ended without our asking, ours or the
      peer's, typically within a millisecond of the peer's death; and once for a peer that speaks another version, to
      which no link can be opened. Not called for `disconnect`, `close`, or a link replaced by a newer one of the same
      node.
    """

    stats: TransportStats

    async def start(self) -> str:
        """Listens; returns the address for peers to `connect` to. Raises ConfigError (ports in use, host not ours)."""
        ...

    def connect(self, peer: Member, address: str) -> None:
        """Wants a link to `peer`: opened in the background, and again with back-off whenever it ends, until
        `disconnect`. Idempotent; a link to an older incarnation or another address of the node is replaced."""
        ...

    def disconnect(self, node: NodeId) -> None:
        """Wants no link to `node` any more; what is queued for it is dropped. Idempotent."""
        ...

    def refuse(self, peer: Member, reason: str) -> None:
        """Ends the link from exactly this incarnation: what it brings cannot be read. `on_link_down` tells of it."""
        ...

    def connected(self, peer: Member) -> bool:
        """Our link to exactly this incarnation is open and authenticated."""
        ...

    def send(self, peer: Member, parts: Sequence[Part]) -> bool:
        """Sends one message, the concatenation of `parts`. Never blocks. False, and counted: no open link to
        this incarnation, its queue would pass the bound, or the message is over `message_bytes_max`.
        `parts` are kept alive and must not change until sent, that is until `queued_bytes` has passed them."""
        ...

    def last_heard(self, node: NodeId) -> float | None:
        """`time.monotonic()` of the last message from `node`, whichever incarnation; None: never."""
        ...

    def queued_bytes(self, node: NodeId) -> int:
        """Payload bytes given to `send` and not yet handed to the network; 0 without a link."""
        ...

    @property
    def queued_total(self) -> int:
        """`queued_bytes` over all nodes: 0 when nothing waits to leave this one."""
        ...

    async def close(self) -> None:
        """Ends everything, after at most half a second to send what is queued. Idempotent."""
        ...
