"""kf-gateway: one OpenAI-compatible endpoint of a cluster."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import time
from pathlib import Path

import structlog

from controlplane import process
from controlplane.contract.address import join
from controlplane.contract.auth import derive, load_secret
from controlplane.contract.config import ClusterConfig, GatewayConfig, load_config
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.contract.ids import Member, new_incarnation
from controlplane.contract.keys import Keys, encode
from controlplane.contract.lifetime import begin, run_to_exit
from controlplane.contract.logs import configure_logging
from controlplane.contract.records import GatewayRecord
from controlplane.contract.version import code_version, settings_digest
from controlplane.etcd.errors import NameTaken
from controlplane.etcd.register import TAKE_OVER, Registration
from controlplane.keyspace.connect import etcd_client
from web.gateway.access_log import AccessLog
from web.gateway.figures import FiguresReporter
from web.gateway.groups import serve_group
from web.gateway.http.api_keys import ApiKeys
from web.gateway.http.app import build_app
from web.gateway.http.server import listen, make_server, serve, stop
from web.gateway.metrics import Metrics
from web.gateway.model import Model, load_model
from web.gateway.policy import policy_of
from web.gateway.request_memory import Memory
from web.gateway.resume.tickets import Tickets
from web.gateway.routing.cluster_watch import ClusterWatch
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.service import Service
from web.gateway.services import Services
from web.gateway.tracing import Tracer
from web.https import https_of

log = structlog.get_logger()

LEASE_S = 5
LEAVE_LIMIT_S = 2.0  # for what is left to do once every client has been told
GOODBYE_S = 2.0  # beyond the grace for answers: for what a stopping server says to its clients


def main() -> None:
    parser = argparse.ArgumentParser(prog="kf-gateway", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings, TOML or JSON")
    parser.add_argument("--id", default="g1", help="this gateway's name in the cluster (default: g1)")
    parser.add_argument("--take-over", metavar="INCARNATION", default="", help=TAKE_OVER)
    parser.add_argument("--port", type=int, help="0: any free one (default: gateway_port of the settings)")
    arguments = parser.parse_args()
    configure_logging(arguments.id)
    begin()
    run_to_exit("kf-gateway", lambda: _run(arguments), name_taken=(NameTaken,))


async def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config)
    port = config.gateway_port if arguments.port is None else arguments.port
    await run_gateway(config, arguments.id, port, arguments.take_over)


async def run_gateway(config: ClusterConfig, name: str, port: int, take_over: str = "") -> None:
    """Serve until told to stop. Raises ConfigError for what the operator has to mend, and NameTaken.

    `take_over`: the incarnation that has to give its name up to this process, if it has it.
    """
    secret = load_secret(config.secret_file)
    token = derive(secret, "grpc")
    identity = Identity.of(config, ProcessRole.GATEWAY, name)
    keys = ApiKeys.load(config.api_keys_file, config.keys_file)
    model = load_model(config)
    try:
        sock = listen(config.host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {join(config.host, port)}: {error.strerror}") from error
    address = join(config.advertised, sock.getsockname()[1])
    metrics = Metrics()
    dispatcher = Dispatcher(policy_of(config), token, metrics, identity)
    access = AccessLog(Path(folder), name) if (folder := config.gateway.access_log_dir) else None
    if access is not None:
        dispatcher.lives.listeners.append(access.put)
        metrics.attach_access_log(access)
    tracer = Tracer(to, name, code_version()) if (to := config.gateway.otlp_endpoint) else None
    if tracer is not None:
        dispatcher.lives.listeners.append(tracer.put)
        dispatcher.lives.traces = True
    async with etcd_client(config, identity) as etcd:
        me = Member(name, new_incarnation())
        record = GatewayRecord(
            id=name,
            address=address,
            pid=os.getpid(),
            incarnation=me.incarnation,
            version=code_version(),
            settings=settings_digest(config),
            process=process.identity(),
        )
        key = Keys.of(config).gateway(name)
        registration = Registration(etcd, key, encode(record), LEASE_S, supersedes=(take_over,))
        watch = ClusterWatch(etcd, config, dispatcher, me, registration, model.context)
        tickets = Tickets(derive(secret, "streams"))
        service = _service(config.gateway, model, dispatcher, metrics, watch, tickets, keys, identity)
        dispatcher.lives.gateway = name
        grace_s = config.timing.stop_grace_s
        services = Services(service)
        figures = FiguresReporter(me, token, metrics, watch.controllers, identity, services.lives)
        app = build_app(services, keys, config.gateway.cors_origins)
        server = make_server(app, grace_s, https_of(config, identity.me))
        background = [
            asyncio.create_task(watch.follow(), name="watch"),
            asyncio.create_task(registration.run(), name="registration"),
            asyncio.create_task(etcd.follow_health(), name="health"),
            asyncio.create_task(keys.follow(), name="keys"),
            asyncio.create_task(figures.run(), name="figures"),
            *(
                asyncio.create_task(serve_group(path, name, services), name=path)
                for path in config.gateway.groups
            ),
        ]
        gc.freeze()  # what start-up made stays: collections need not look at it again
        log.info("serving", address=address, model=model.name, max_model_len=model.max_model_len)
        serving = asyncio.create_task(serve(server, sock, services, grace_s))
        try:
            # None of the others ever ends by itself: if one does, it is a defect, and it ends the process.
            done, _ = await asyncio.wait([serving, *background], return_when=asyncio.FIRST_COMPLETED)
            if any(not task.cancelled() and isinstance(task.exception(), NameTaken) for task in done):
                stop(server, services, grace_s)  # its streams end as on SIGTERM: clients resume elsewhere
                await asyncio.wait([serving], timeout=grace_s + GOODBYE_S)
            for task in done:
                task.result()
        finally:
            for task in (*background, serving):
                task.cancel()
            try:
                async with asyncio.timeout(LEAVE_LIMIT_S):
                    await asyncio.gather(*background, serving, return_exceptions=True)
                    await registration.withdraw()
                    await dispatcher.aclose()
            except TimeoutError:
                log.warning("not everything was closed in time; the lease will expire")
            if access is not None:
                access.close()
            if tracer is not None:
                tracer.close()


def _service(
    limits: GatewayConfig,
    model: Model,
    dispatcher: Dispatcher,
    metrics: Metrics,
    watch: ClusterWatch,
    tickets: Tickets,
    keys: ApiKeys,
    identity: Identity,
) -> Service:
    metrics.attach(dispatcher.router, watch.age_s)
    metrics.attach_keys(keys.usages)
    return Service(
        model=model,
        dispatcher=dispatcher,
        metrics=metrics,
        started_unix_s=int(time.time()),
        etcd_age_s=watch.age_s,
        troubles=lambda: [
            *watch.troubles(),
            *dispatcher.links.troubles(),
            *identity.troubles(),
            *filter(None, [keys.trouble]),
        ],
        tickets=tickets,
        memory=Memory(limits.memory_bytes, limits.client_share),
        priority_floor=limits.priority_floor,
        prompt_tokens_details=limits.prompt_tokens_details,
        request_chat_template=limits.request_chat_template,
    )


if __name__ == "__main__":
    main()
