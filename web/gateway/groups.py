"""Other groups behind this gateway (`gateway.groups`): each with settings, etcd, secret, certificates and model of its
own. What is wrong with one is said in its own words and tried again, and the others never notice."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import structlog

from controlplane.backoff import Backoff
from controlplane.contract.auth import derive, load_secret
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.keyspace.connect import etcd_client
from web.gateway.model import Model, load_model
from web.gateway.policy import policy_of
from web.gateway.routing.cluster_watch import ClusterWatch
from web.gateway.routing.dispatch import Dispatcher
from web.gateway.services import Services

log = structlog.get_logger()

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 10.0


async def serve_group(path: str, name: str, services: Services) -> NoReturn:
    """Until cancelled: serve the group that the settings file `path` is about, as the gateway `name`. While it cannot
    be served `services.absent` says why."""
    backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
    services.absent[path] = "its settings are being read"
    while True:
        began = time.monotonic()
        try:
            config = await asyncio.to_thread(load_config, Path(path))
            model = await asyncio.to_thread(load_model, config)
            await _serve(path, config, model, name, services)
        except ConfigError as error:
            why = str(error)
        except Exception as error:  # a defect there is none of the other groups' business
            log.error("a group cannot be served", settings=path, exc_info=error)
            why = f"{type(error).__name__}: {error}"
        if services.absent.get(path) != why:
            log.warning("a group is not served", settings=path, reason=why)
        services.absent[path] = why
        if time.monotonic() - began > BACKOFF_MAX_S:
            backoff.succeeded()
        await asyncio.sleep(backoff.next_s())


async def _serve(path: str, config: ClusterConfig, model: Model, name: str, services: Services) -> NoReturn:
    """Raises ConfigError, and whatever following the group raises."""
    home = services.first
    token = derive(load_secret(config.secret_file), "grpc")
    identity = Identity.of(config, ProcessRole.GATEWAY, name)
    dispatcher = Dispatcher(policy_of(config), token, home.metrics, identity)
    lives, theirs = dispatcher.lives, home.dispatcher.lives
    lives.gateway, lives.listeners, lives.traces = name, theirs.listeners, theirs.traces
    async with etcd_client(config, identity) as etcd:
        watch = ClusterWatch(etcd, config, dispatcher, context=model.context)
        service = replace(
            home,
            model=model,
            dispatcher=dispatcher,
            etcd_age_s=watch.age_s,
            troubles=lambda: [*watch.troubles(), *dispatcher.links.troubles(), *identity.troubles()],
            prompt_tokens_details=config.gateway.prompt_tokens_details,
            request_chat_template=config.gateway.request_chat_template,
        )
        services.add(service)
        services.absent.pop(path, None)
        home.metrics.add(dispatcher.router)
        log.info("serving another group", settings=path, group=config.group, model=model.name)
        following = asyncio.create_task(watch.follow()), asyncio.create_task(etcd.follow_health())
        try:
            done, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise AssertionError("a watch never ends by itself")
        finally:
            services.remove(service)
            home.metrics.remove(dispatcher.router)
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            dispatcher.shut_down()
            await dispatcher.aclose()
