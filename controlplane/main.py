"""kf-controller: one candidate for leader, with its admin API. Everything runs on one event loop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvicorn
from fastapi import FastAPI

from controlplane import process
from controlplane.contract.address import bound, join, ports_of
from controlplane.contract.auth import Caller, derive, load_secret
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.credentials import CredentialChange
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.contract.ids import Member, new_incarnation
from controlplane.contract.keys import Keys, encode
from controlplane.contract.lifetime import begin, run_to_exit
from controlplane.contract.logs import configure_logging
from controlplane.contract.oidc import FILE as OIDC_FILE
from controlplane.contract.oidc import Oidc, load_oidc
from controlplane.contract.records import ControllerRecord
from controlplane.contract.version import code_version, settings_digest
from controlplane.core.controller import Controller
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.election import Election
from controlplane.etcd.errors import NameTaken
from controlplane.etcd.register import TAKE_OVER, Registration
from controlplane.history.credentials import line_of
from controlplane.history.store import HistoryStore
from controlplane.history.writer import HistoryWriter
from controlplane.keyspace.connect import etcd_client
from controlplane.shell.figures import Recorder
from controlplane.shell.hearing import tell_hearing
from controlplane.shell.inbox import Inbox
from controlplane.shell.metrics import Sources
from controlplane.shell.performer import Performer
from controlplane.shell.registry import Registry
from controlplane.shell.rpc import ReportServer
from controlplane.shell.runtime import Runtime
from controlplane.shell.service import Parts, Service
from web.admin.app import build_app
from web.admin.local_socket import serve_locally
from web.https import ContextFactory, https_of
from web.protocol import BoundedProtocol

if TYPE_CHECKING:
    from web.admin.oidc.provider import Provider

log = structlog.get_logger()

EXIT_LIMIT_S = 1.2
# Objects between two collections. The reports of a large group are many objects, none in a cycle: with Python's 700 the
# collector took a fifth to a quarter of the time.
YOUNG_MAX = 50_000


class AdminServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process decides when it ends, open streams or not."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: ClusterConfig,
    me: str,
    admin_socket: socket.socket,
    stop: asyncio.Event,
    take_over: str = "",
    oidc: Oidc | None = None,
) -> None:
    """Be one controller until `stop` is set or it is retired. Raises what any of its tasks raised.

    `take_over`: the incarnation that has to give its name up to this process, if it has it. `oidc`: who signs people in
    to the dashboard, besides tokens.
    """
    secret = load_secret(config.secret_file)
    provider = _provider(oidc)
    keys = Keys.of(config)
    inbox = Inbox()
    identity = Identity.of(config, ProcessRole.CONTROLLER, me)
    client = etcd_client(config, identity)
    store = HistoryStore(config.database, config.scope, me)
    history = HistoryWriter(store)
    token = derive(secret, "grpc")
    recorder = Recorder(token, history, lambda: runtime.is_leader, identity)
    reports = ReportServer(token, inbox, config.timing, identity, [recorder.handler()])
    record = ControllerRecord(
        id=me,
        rpc_address=await reports.start(config.host, config.advertise, ports_of(config.controller_ports, me)),
        admin_address=join(config.advertised, admin_socket.getsockname()[1]),
        pid=os.getpid(),
        incarnation=new_incarnation(),
        version=code_version(),
        settings=settings_digest(config),
        process=process.identity(),
    )
    timing = config.timing
    presence = Registration(
        client, keys.controller(me), encode(record), timing.node_lease_s, supersedes=(take_over,)
    )
    lease_s = timing.leader_lease_s
    election = Election(client, keys.leader, encode(record), ttl_s=lease_s, guards=presence.guard)
    controller = Controller(config, me)
    registry = Registry(client, keys, config.group, inbox, Member(me, record.incarnation), presence)
    performer = Performer(client, keys, config.group, inbox, history, registry.view)
    runtime = Runtime(controller, inbox, registry, performer, election)
    sources = Sources(inbox, registry, reports, runtime, performer, history, client.counters)
    parts = Parts(controller, registry, client, history, sources, recorder, identity)
    service = Service(config, me, parts)

    def note(change: CredentialChange, caller: Caller) -> None:
        known = registry.view.topology
        history.put(line_of(change, caller, time.time(), 0 if known is None else known.counter))

    app = build_app(service, derive(secret, "admin"), provider, note)
    admin, local = _admin_server(app, https_of(config, identity.me)), _admin_server(app)
    gc.freeze()  # what start-up made stays: collections need not look at it again
    gc.set_threshold(YOUNG_MAX, *gc.get_threshold()[1:])
    log.info("controller starts", id=me, admin=record.admin_address, rpc=record.rpc_address, pid=record.pid)
    jobs = {
        "runtime": runtime.run(),
        "performer": performer.run(),
        "registry": registry.run(),
        "campaign": runtime.campaign(),
        "presence": presence.run(),
        "hearing": tell_hearing(client, keys, me, controller, presence, registry.view),
        "health": client.follow_health(),
        "history": history.run(),
        "figures": recorder.run(service.status),
        "admin": admin.serve(sockets=[admin_socket]),
        "admin-socket": serve_locally(local, Path(config.run_dir), me, presence.held),
        "retired": registry.retired.wait(),
        "stop": stop.wait(),
    }
    tasks = [asyncio.create_task(job, name=name) for name, job in jobs.items()]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    app.state.feed.close()
    for task in tasks:
        task.cancel()
    await _leave(runtime, presence, reports, history, store, client, tasks)
    for task in done:
        task.result()
        if task.get_name() not in ("stop", "retired"):
            raise KevlarFlowError(f"the task {task.get_name()} ended by itself")


def _provider(oidc: Oidc | None) -> Provider | None:
    """Raises ConfigError."""
    if oidc is None:
        return None
    # Not before it is needed: its HTTP client takes as long to import as much of the rest.
    from web.admin.oidc.provider import Provider

    log.info("people sign in with a provider", issuer=oidc.config.issuer, provider=oidc.config.provider)
    return Provider(oidc)


def _admin_server(app: FastAPI, https: ContextFactory | None = None) -> AdminServer:
    return AdminServer(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the audit has who connected: anybody on this host could send another address
            lifespan="off",
            ssl_context_factory=https,
            timeout_graceful_shutdown=1,
        )
    )


async def _leave(
    runtime: Runtime,
    presence: Registration,
    reports: ReportServer,
    history: HistoryWriter,
    store: HistoryStore,
    client: EtcdClient,
    tasks: Sequence[asyncio.Task[object]],
) -> None:
    """Give leadership away first, then everything else; bounded, because leases end by themselves."""
    try:
        async with asyncio.timeout(EXIT_LIMIT_S):
            await asyncio.wait(tasks, timeout=0.3)
            await asyncio.gather(
                runtime.resign(),
                presence.withdraw(0.5),
                reports.stop(),
                history.flush(0.5),
                return_exceptions=True,
            )
            await store.close()
            await client.close()
    except TimeoutError:
        log.warning("not everything was handed over in time; leases will expire")


def bind(host: str, wanted: int | None, default: int) -> socket.socket:
    """The admin API's socket: the port that was asked for, else the configured one, else any free one.

    Raises ConfigError when a port that was asked for by name is taken.
    """
    try:
        return bound(host, default if wanted is None else wanted)
    except OSError as error:
        if wanted is not None:
            raise ConfigError(f"cannot listen on {join(host, wanted)}: {error.strerror}") from error
    return bound(host, 0)


async def _run(options: argparse.Namespace) -> None:
    """Be a controller until a signal."""
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    config = load_config(options.config)
    oidc = load_oidc(options.oidc or Path(config.run_dir) / OIDC_FILE, required=options.oidc is not None)
    admin_socket = bind(config.host, options.admin_port, config.admin_port)
    await serve(config, options.id, admin_socket, stop, options.take_over, oidc)


def main() -> None:
    """Entry point of `kf-controller`."""
    parser = argparse.ArgumentParser(prog="kf-controller", description="A KevlarFlow controller.")
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings (TOML or JSON)")
    parser.add_argument("--id", required=True, help="this controller's name, unique in the cluster")
    parser.add_argument("--take-over", metavar="INCARNATION", default="", help=TAKE_OVER)
    parser.add_argument("--admin-port", type=int, help="port of the admin API; 0: any free one")
    parser.add_argument(
        "--oidc", type=Path, help=f"settings of a login provider (default: {OIDC_FILE} in the run directory)"
    )
    options = parser.parse_args()
    configure_logging(options.id)
    begin()
    run_to_exit("kf-controller", lambda: _run(options), name_taken=(NameTaken,))


if __name__ == "__main__":
    main()
