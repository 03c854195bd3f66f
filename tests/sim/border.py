"""Where production code meets the outside, and what stands there in the simulator: time, gRPC, links, secrets.

Everything inside is the real thing. This list is all that has to follow when production code changes what it asks of
the outside; how its objects are put together is in parts.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import msgspec
import numpy as np
import structlog

import controlplane.process
import controlplane.shell.performer
import controlplane.shell.runtime
import controlplane.shell.service
import dataplane.core.peers
import dataplane.kvcache
import dataplane.node
import dataplane.relay
from controlplane.contract import auth, keys
from controlplane.contract.ids import Member
from controlplane.etcd import wire
from controlplane.etcd.values import WatchEvent
from dataplane.core.messages import Fence
from tests.sim.links import open_transport
from tests.sim.network import Network
from tests.sim.relays import lifelines_of, relay_address
from tests.sim.rpc import SimChannel, SimServer
from tests.sim.world import OURS, World, replaced, virtual_time

TICK_S = 0.15  # of nodes and controllers, in place of 0.05: a third of the work
PING_S = 0.4  # on links that are otherwise silent, in place of 0.2
LINGER_S = 2.0  # of links that nobody wants, in place of 30: some runs are shorter


@contextlib.contextmanager
def simulated(world: World, net: Network) -> Iterator[None]:
    """Production code that runs within sees the simulated world."""

    def current() -> Any:
        assert world.current is not None, "production code runs outside of every process"
        return world.current

    def channel(address: str, options: Any = None) -> SimChannel:
        return SimChannel(net, current(), address)

    def server(**_: Any) -> SimServer:
        return SimServer(net, current())

    def transport(kind: str, config: Any, emulate: None = None, **callbacks: Any) -> Any:
        return open_transport(net, current(), config, **callbacks)

    def token_bytes(size: int | None = None) -> bytes:
        return world.random.randbytes(size or 32)

    replacements = (
        # msgspec mixes the address of a type into the hashes of its objects: a set of them has another order in each
        # process.
        (Member, "__hash__", lambda self: hash((self.node, self.incarnation))),
        (Fence, "__hash__", lambda self: hash((self.epoch, self.round))),
        (grpc.aio, "insecure_channel", channel),
        (grpc.aio, "server", server),
        (secrets, "token_bytes", token_bytes),
        (auth, "load_secret", _load_secret),
        (controlplane.process, "identity", lambda: repr(current())),
        (
            controlplane.process,
            "is_dead",
            lambda other: any(repr(p) == other and not p.alive for p in world.processes),
        ),
        (keys, "msgspec", _Msgspec()),
        (wire, "watch_events", _shared_events()),
        (controlplane.shell.performer, "encode", _newer(world)),
        (controlplane.shell.service, "encode", _newer(world)),
        (dataplane.node, "open_transport", transport),
        (dataplane.node, "TICK_S", TICK_S),
        # All hosts share one run directory here, and a killed process keeps the lock on a file of it.
        (dataplane.relay, "relay_address", lambda _: relay_address(current().name)),
        (dataplane.relay.RelayServer, "_only_one", lambda _: contextlib.nullcontext()),
        (dataplane.relay, "Lifelines", lifelines_of(world, current)),
        (dataplane.core.peers, "PING_S", PING_S),
        (dataplane.core.peers, "LINGER_S", LINGER_S),
        (controlplane.shell.runtime, "TICK_S", TICK_S),
        (dataplane.kvcache, "huge_zeros", lambda size, shared=False: np.zeros(size, np.uint8)),
    )
    with replaced(replacements), virtual_time(world):
        yield


_load_secret = functools.cache(auth.load_secret)


LATER = "later"  # a field that only newer code knows


def _newer(world: World) -> Callable[..., bytes]:
    """How values are written: by newer code with one more field in each record, at every level."""

    def add(item: Any, code: int) -> Any:
        if isinstance(item, dict):
            return {LATER: code} | {key: add(each, code) for key, each in item.items()}
        return [add(each, code) for each in item] if isinstance(item, list) else item

    def encode(value: msgspec.Struct, before: bytes | None = None) -> bytes:
        encoded = keys.encode(value, before)
        assert world.current is not None
        code = world.current.code
        return encoded if code == OURS else msgspec.json.encode(add(msgspec.json.decode(encoded), code))

    return encode


class _Msgspec:
    """What controlplane/contract/keys.py takes from msgspec. All processes of a run read the same values of etcd, and
    nobody changes what came of them, so each is parsed once; values that cannot be parsed raise each time."""

    MsgspecError = msgspec.MsgspecError

    def __init__(self) -> None:
        self.json = self
        self._decoded: dict[tuple[bytes, Any], Any] = {}

    def decode(self, value: bytes, type: Any) -> Any:
        found = self._decoded.get((value, type))
        if found is None:
            found = self._decoded[value, type] = msgspec.json.decode(value, type=type)
        return found


SHARED_MAX = 64


def _shared_events() -> Callable[..., tuple[WatchEvent, ...]]:
    """Watchers that got the same message of the simulated etcd, which sends one to all, take it apart once."""
    real = wire.watch_events
    made: dict[tuple[int, int], tuple[Any, tuple[WatchEvent, ...]]] = {}

    def watch_events(messages: Any, after_revision: int) -> tuple[WatchEvent, ...]:
        which = id(messages), after_revision  # the message is kept, so that no other one gets its id
        if which not in made:
            if len(made) >= SHARED_MAX:
                made.clear()
            made[which] = messages, real(messages, after_revision)
        return made[which][1]

    return watch_events


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Production code has much to say about faults; World.note says what matters here."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that a kill leaves behind
            yield
    finally:
        logging.disable(logging.NOTSET)
        structlog.reset_defaults()
