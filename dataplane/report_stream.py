"""One stream of reports, kept open: of a node or of a host's relay, to a controller or to the relay."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import grpc

from controlplane.backoff import Backoff
from controlplane.contract import rpc
from controlplane.contract.identity import PLAIN, Identity, ProcessName
from controlplane.contract.reports import ReportAck

log = logging.getLogger(__name__)

STREAM = (
    # Each attempt has its own connection: the back-off is ours, and not gRPC's as well.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the longest time that one connection attempt takes
)
# A controller behind a path that has healed hears this node again within 3 s: TCP alone sends again, and tries to
# connect, at intervals that double for as long as the path is cut.
OPTIONS = (
    *STREAM,
    ("grpc.keepalive_time_ms", 10_000),
    (
        "grpc.keepalive_timeout_ms",
        2_000,
    ),  # also the longest time without TCP's acknowledgement of a heartbeat
)
SOCKET = "relay.sock"  # in the run directory
SOCKET_PATH_BYTES_MAX = 107  # of the kernel: sockaddr_un


async def keep_reporting(
    address: str,
    token: str,
    backoff: Backoff,
    batches: Callable[[], AsyncIterator[Any]],
    acknowledged: Callable[[ReportAck], None] = lambda _: None,
    broken: Callable[[str], None] = lambda _: None,
    options: tuple[tuple[str, int], ...] = OPTIONS,
    identity: Identity = PLAIN,
    peer: ProcessName = PLAIN.me,
) -> NoReturn:
    """Until cancelled: send what `batches()` gives, anew on each stream. `broken(why)` follows the end of each.
    `peer`: who has to be found at `address`, where `identity` has certificates.

    To end for any other reason would be to fall silent, which controllers take for death."""
    while True:
        why = "it ended the stream"
        try:
            async with identity.channel(address, peer, options) as channel:
                call = channel.stream_stream(
                    rpc.CONTROL_REPORT, request_serializer=rpc.encode, response_deserializer=rpc.decode_ack
                )(batches(), metadata=(("authorization", f"Bearer {token}"),))
                async for ack in call:
                    backoff.succeeded()
                    acknowledged(ack)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
            log.debug("reports to %s: %s", address, why)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # grpc.aio cancels the call, and so this task, when a report could not be made or encoded.
            why = "a report could not be made"
            log.warning("the stream of reports to %s broke off: %s", address, why)
        except Exception as error:  # an answer that cannot be read (None to grpc), or taken in
            why = f"{type(error).__name__}: {error}"
            log.exception(
                "the stream of reports to %s broke off (%d in a row)", address, backoff.attempts + 1
            )
        broken(why)
        await backoff.pause()


def relay_address(run_dir: Path) -> str:
    """Where the relay of this host listens, for gRPC. Raises OSError if the run directory cannot be opened."""
    path = run_dir.absolute() / SOCKET
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        return f"unix:{path}"
    return f"unix:/proc/self/fd/{_opened(path.parent)}/{SOCKET}"


@cache
def _opened(folder: Path) -> int:
    """Stays open as long as this process lives: its number is a short name of the folder."""
    return os.open(folder, os.O_PATH | os.O_DIRECTORY)
