"""The relay process of a host: its nodes report to it over a Unix socket, and it to each controller on one stream.

    node =gRPC, unix:RUN_DIR/relay.sock=> core/relay.py =gRPC=> every controller that etcd knows

    python -m dataplane.relay --config FILE        (kf-relay; the launcher starts it)

What it costs a controller to hear a host is then one stream and one message a heartbeat. Nothing depends on it: a node
whose relay does not answer reports by itself (core/paths.py). It also tells the launcher which nodes to
run (hosted.py).
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import grpc
import structlog

from controlplane.backoff import Backoff
from controlplane.contract import auth, rpc
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.identity import PLAIN, RELAY_NAME, Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.keys import Keys
from controlplane.contract.lifetime import begin, run_to_exit
from controlplane.contract.logs import configure_logging
from controlplane.contract.reports import REPORT_SCHEMA, RelayedBatch, ReportAck
from controlplane.etcd.client import EtcdClient
from controlplane.keyspace.connect import etcd_client
from controlplane.keyspace.view import View
from controlplane.unreadable import UNREADABLE
from dataplane.core.relay import Line, Relay, Source
from dataplane.hosted import tell_launcher
from dataplane.lifeline import Lifelines
from dataplane.report_stream import SOCKET, STREAM, keep_reporting, relay_address

log = structlog.get_logger()

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
# A connection on which nothing passes any more is found in 2 s (gRPC sends at most one ping a second). Its controller
# may suspect the nodes meanwhile; it condemns none of them, since their links stand.
OPTIONS = (
    *STREAM,
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 1_000),  # a minute by default, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),
)
# A relay that is to end speaks for its nodes until they have streams of their own, and stays on the controllers' for as
# long again: on a busy machine some are late.
HAND_OVER_S = 0.5
WITHOUT = "nodes report by themselves, at a higher cost for controllers, until a relay can run"


@dataclass(slots=True, eq=False)
class _Node:
    """The stream of one node."""

    source: Source | None = None
    taken: int = 0  # batches
    due: asyncio.Event = field(default_factory=asyncio.Event)  # an answer


@dataclass(slots=True, eq=False)
class _Controller:
    address: str
    task: asyncio.Task[NoReturn]
    due: asyncio.Event = field(default_factory=asyncio.Event)  # something to send
    line: Line | None = None


class _Refused(Exception):
    """What a node sends is not to be passed on; the text says why."""


class RelayServer:
    """Raises ConfigError if the socket cannot be made, or another relay runs in the run directory."""

    def __init__(
        self,
        config: ClusterConfig,
        token: str,
        identity: Identity = PLAIN,
        beside: Callable[[EtcdClient, ClusterConfig], Coroutine[Any, Any, NoReturn]] | None = None,
    ) -> None:
        """`beside`: what else is done for the host, until the relay stops."""
        self._beside = beside
        self.relay = Relay(config.timing.heartbeat_s)
        self._config = config
        self._token = token
        self._identity = identity
        self._run_dir = Path(config.run_dir)
        self._nodes: dict[_Node, None] = {}  # in the order in which they came
        self._controllers: dict[str, _Controller] = {}
        self._handing_over = False  # nodes are to report by themselves
        self._leaving = False  # their streams end because this relay does
        self._stop = asyncio.Event()
        self._lifelines = Lifelines(self._run_dir, self._ended)

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped. Raises what following etcd raised."""
        with self._only_one():
            server = await self._listen()
            client = etcd_client(self._config, self._identity)
            follow = asyncio.create_task(self._follow(client))
            stop = asyncio.create_task(self._stop.wait())
            tasks: set[asyncio.Task[Any]] = {follow, stop}
            if self._beside is not None:
                tasks.add(asyncio.create_task(self._beside(client, self._config)))
            log.info("relay is up", socket=str(self._run_dir / SOCKET))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await self._hand_over()
                self._leaving = True
                self._lifelines.close()
                await server.stop(grace=0)
                if self._nodes and self._controllers:
                    await asyncio.sleep(HAND_OVER_S)
                self.set_controllers({})
                await client.close()

    async def _hand_over(self) -> None:
        """Nodes report by themselves as soon as they are told that nobody hears them through this relay. Until they do,
        it passes on what they say."""
        self._handing_over = True
        self._tell()
        if self._nodes and self._controllers:
            await asyncio.sleep(HAND_OVER_S)

    def _only_one(self) -> IO[str]:
        """A lock that is held until it is closed."""
        path = self._run_dir / "relay.lock"
        try:
            lock = path.open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another relay runs in {self._run_dir}") from None
        except OSError as error:
            raise ConfigError(f"cannot lock {path}: {error.strerror}; {WITHOUT}") from error
        return lock

    async def _listen(self) -> Any:
        """A socket file that a relay left when it was killed is replaced; we hold the lock."""
        server = grpc.aio.server()
        handler = rpc.stream_handler(rpc.CONTROL, "Report", self._report, None)
        server.add_generic_rpc_handlers((handler,))
        before = os.umask(0o177)
        try:
            server.add_insecure_port(relay_address(self._run_dir))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot make the socket {self._run_dir / SOCKET} ({error}); {WITHOUT}"
            ) from error
        finally:
            os.umask(before)
        await server.start()
        return server

    # ---- nodes

    async def _report(self, _requests: Any, context: Any) -> None:
        headers = {key: value for key, value in context.invocation_metadata() or ()}
        if not auth.bearer_matches(headers.get("authorization"), self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        node = _Node()
        self._nodes[node] = None
        answering = asyncio.create_task(self._answer(node, context))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self._take(node, message)
                node.taken += 1
                node.due.set()
        except _Refused as error:
            log.warning("a node has to report by itself", member=_name(node), error=str(error))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            # Also when the node was killed: grpc cancels this task as soon as the connection breaks.
            answering.cancel()
            if not self._leaving:
                self._nodes.pop(node, None)
                if node.source is not None:
                    self.relay.leave(node.source)
                    self._kick()

    def _ended(self, member: Member) -> None:
        """The process has. Its connection breaks only when the kernel has taken its memory apart."""
        self.relay.end(member)
        self._kick()

    async def _answer(self, node: _Node, context: Any) -> None:
        while True:
            await node.due.wait()
            node.due.clear()
            source = None if self._handing_over else node.source
            heard_by = () if source is None else self.relay.heard_by(source)
            await context.write(ReportAck(node.taken, heard_by=heard_by, report_s=self.relay.report_s()))

    def _take(self, node: _Node, message: bytes) -> None:
        """Raises _Refused for what a controller would refuse the whole host for, or might: another schema, too."""
        now = time.monotonic()
        try:
            batch = rpc.decode_relayed(message)
            if batch.schema != REPORT_SCHEMA:
                raise _Refused(rpc.refusal_of_reports(batch.schema))
            for _, raw in batch.reports:
                report = rpc.decode_report(raw)
                if node.source is None:
                    node.source = self.relay.join(report.member)
                    self._lifelines.follow(report.member)
                elif node.source.member != report.member:
                    raise _Refused(f"one stream speaks for one node, not for {report.member} as well")
                self.relay.report(
                    node.source,
                    raw,
                    now,
                    urgent=not batch.calm,
                    recoveries=bool(report.recoveries),
                    counters=bool(report.counters),
                )
        except UNREADABLE as error:
            raise _Refused(f"not a batch of reports: {error}") from error
        if batch.beats:
            if node.source is None:
                raise _Refused("a beat before the first report")
            self.relay.beat(node.source, now)
        if batch.reports:
            self._kick()

    # ---- controllers

    async def _follow(self, client: EtcdClient) -> None:
        keys = Keys.of(self._config)
        view = View(keys, self._config.group)
        async for batch in client.watch_prefix(keys.controllers):
            view.apply(batch)
            self.set_controllers({record.rpc_address: name for name, record in view.controllers.items()})

    def set_controllers(self, wanted: Mapping[str, str]) -> None:
        """Report to exactly these from now on: names by address."""
        for address in self._controllers.keys() - wanted.keys():
            self._controllers.pop(address).task.cancel()
            self._broken(address)
        for address in sorted(wanted.keys() - self._controllers.keys()):
            peer = ProcessName(ProcessRole.CONTROLLER, wanted[address])
            task = asyncio.create_task(self._keep(address, peer), name=f"relay-{address}")
            self._controllers[address] = _Controller(address, task)

    async def _keep(self, address: str, peer: ProcessName) -> NoReturn:
        await asyncio.sleep(0)  # let set_controllers store our part first
        controller = self._controllers[address]
        await keep_reporting(
            address,
            self._token,
            Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S),
            lambda: self._batches(controller),
            lambda ack: self._acknowledged(controller, ack),
            lambda _: self._broken(address),
            OPTIONS,
            self._identity,
            peer,
        )

    async def _batches(self, controller: _Controller) -> AsyncIterator[RelayedBatch]:
        line = controller.line = self.relay.open(controller.address, time.monotonic())
        dropped = 0
        while True:
            controller.due.clear()
            if line.dropped > dropped:
                log.warning(
                    "a controller took nothing for so long that its history lacks recoveries",
                    address=controller.address,
                    reports=line.dropped - dropped,
                )
                dropped = line.dropped
            batch = line.next(time.monotonic())
            if batch is not None:
                yield batch
            if (wait_s := line.due_at() - time.monotonic()) > 0:
                timer = asyncio.get_running_loop().call_later(wait_s, controller.due.set)
                await controller.due.wait()
                timer.cancel()

    def _acknowledged(self, controller: _Controller, ack: ReportAck) -> None:
        if controller.line is not None:
            controller.line.acknowledge(max(ack.beat_s, self._config.timing.heartbeat_s), ack.report_s)
            self._tell()

    def _broken(self, address: str) -> None:
        self.relay.close(address)
        self._tell()

    def _kick(self) -> None:
        """Whoever has something urgent sends it now."""
        for controller in self._controllers.values():
            if controller.line is not None and controller.line.due_at() == 0.0:
                controller.due.set()

    def _tell(self) -> None:
        """Who hears the nodes has changed: they are told at once."""
        for node in self._nodes:
            node.due.set()


def _name(node: _Node) -> str:
    return "" if node.source is None else str(node.source.member)


def run_relay(config: ClusterConfig) -> NoReturn:
    """Serve until stopped (SIGTERM, SIGINT), and end the process."""
    configure_logging("relay")
    begin()
    token = auth.derive(auth.load_secret(config.secret_file), "grpc")
    identity = Identity.of(config, ProcessRole.RELAY, RELAY_NAME)

    async def serve() -> None:
        server = RelayServer(config, token, identity, tell_launcher)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        await server.run()

    run_to_exit("relay", serve)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="kf-relay", description="Passes on what the nodes of a host report."
    )
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings (TOML or JSON)")
    arguments = parser.parse_args()
    try:
        run_relay(load_config(arguments.config))
    except KevlarFlowError as error:
        sys.exit(f"relay: {error}")


if __name__ == "__main__":
    main()
