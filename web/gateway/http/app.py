"""The FastAPI application: routes, and how errors become answers."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from web import bodies
from web.gateway.errors import ApiError, shorten
from web.gateway.http.api_keys import ApiKeys, Caller, Right
from web.gateway.http.generation_response import EVENT_HEADERS, GenerationResponse
from web.gateway.http.guard import BODY_BYTES_MAX, METRICS, Guard
from web.gateway.http.openapi import document
from web.gateway.openai.chat import Prompting, chat_prompt
from web.gateway.openai.chat_output import check_tools
from web.gateway.openai.generation import count_error
from web.gateway.openai.requests import DetokenizeRequest, TokenizeRequest, parse
from web.gateway.openai.sampling import check_chars, check_tokens
from web.gateway.openai.tools import tool_use
from web.gateway.request_memory import Hold
from web.gateway.resume.find_group import group_of_stream
from web.gateway.resume.start_or_resume import Visit, reopen, start_or_resume
from web.gateway.service import Service
from web.gateway.services import Services
from web.manners import HEAD, Manners, own_request_id

log = structlog.get_logger()

DETOKENIZE_MAX = 1 << 18  # tokens
INLINE_TOKENS_MAX = 4096  # more take milliseconds, in which no stream would go on
GENERATES = {"/v1/completions": "completion", "/v1/chat/completions": "chat", "/v1/responses": "responses"}
BODY_S = 30.0  # a client that takes longer to send its request is not waited for


def build_app(serving: Service | Services, keys: ApiKeys, origins: Sequence[str] = ()) -> ASGIApp:
    """The whole application, guarded. `origins`: see Manners."""
    services = Services(serving) if isinstance(serving, Service) else serving
    service = services.first
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _health_routes(app, services)
    _model_routes(app, services)
    _generation_routes(app, services)
    _token_routes(app, services)
    _described_route(app, service)
    _error_handlers(app, service)
    return Manners(Guard(_straight(app), keys), lambda: app.routes, origins)


def _straight(app: FastAPI) -> ASGIApp:
    """The application, but that requests which generate go to their functions at once: FastAPI's middlewares and its
    routing do nothing for them, and their first token would wait for it."""
    functions = {r.path: r.app for r in app.routes if isinstance(r, Route) and r.path in GENERATES}
    handlers = dict(app.exception_handlers), dict[int, Any]()

    async def straight(scope: Scope, receive: Receive, send: Send) -> None:
        function = functions.get(scope["path"]) if scope["method"] == "POST" else None
        if function is not None:
            scope["starlette.exception_handlers"] = handlers
            await function(scope, receive, send)
        else:
            await app(scope, receive, send)

    return straight


def _health_routes(app: FastAPI, services: Services) -> None:
    def state(request: Request) -> Response:
        """200 only while a request could be served: a pipeline of some group is up and its scheduler can be reached.
        What is wrong names nodes and more: for those with a key, for all models."""
        known = hasattr(request.state, "caller") and all(_may_use(s, request) for s in services.all)
        if services.first.dispatcher.router.closing:
            raise ApiError(503, "this gateway is shutting down", retry_after_s=1)
        reasons = list(_reasons(services))
        models = {service.model.name: service.dispatcher.router.reachable for service in services.all}
        if not any(models.values()):
            more = f": {'; '.join(reasons)}" if known else ""
            raise ApiError(503, f"no pipeline is up and reachable{more}", retry_after_s=1)
        status = "degraded" if reasons else "ok"  # requests are served, but not everything is mended
        if not known:
            return _json({"status": status})
        body = {"status": status, "pipelines": sum(models.values()), "reasons": reasons}
        return _json(body | ({"models": models} if services.several else {}))

    @app.get("/livez")
    async def livez() -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        return state(request)

    @app.get("/health")
    async def health(request: Request) -> Response:
        return state(request)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": services.first.version})

    @app.get("/load")
    async def load(request: Request) -> Response:
        """Of all clients, for whoever runs the cluster; a client is told of its own."""
        caller = _caller(request)
        return _json({"server_load": caller.usage.running if caller.right is Right.USE else services.live})

    @app.get(METRICS)
    async def metrics(request: Request) -> Response:
        if _caller(request).right is Right.USE:  # they are of all clients
            raise ApiError(
                403, "a client's API key does not read metrics: `kfadmin keys create NAME --metrics`"
            )
        text, kind = services.first.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind, "vary": "accept"})


def _described_route(app: FastAPI, service: Service) -> None:
    making = asyncio.Lock()
    made = b""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        nonlocal made
        # At the first question: it takes as long as all else that a start makes of the application.
        async with making:
            made = made or await asyncio.to_thread(_described, service)
        return Response(made, headers={"content-type": "application/json"})


def _described(service: Service) -> bytes:
    return msgspec.json.encode(document(service.model, service.version, service.priority_floor))


def _reasons(services: Services) -> Iterator[str]:
    """What is not as it should be; of which model, where there are several."""
    for service in services.all:
        said = [*service.dispatcher.router.troubles(time.monotonic()), *service.troubles()]
        yield from (f"{service.model.name}: {text}" for text in said) if services.several else said
    yield from (f"{path}: {why}" for path, why in services.absent.items())


def _model_routes(app: FastAPI, services: Services) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        usable = [service for service in services.all if _may_use(service, request)]
        return _json({"object": "list", "data": [_card(service) for service in usable]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request) -> Response:
        # A typed parameter would have FastAPI import pydantic.v1.
        service = services.named(request.path_params["name"])
        _check_key(service, request)
        return _json(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model.name,
        "object": "model",
        "created": service.started_unix_s,
        "owned_by": "kevlarflow",
        "root": service.model.name,
        "parent": None,
        "max_model_len": service.model.max_model_len,
    }


def _generation_routes(app: FastAPI, services: Services) -> None:
    async def generate(kind: str, request: Request) -> GenerationResponse:
        hold = _begin(services, request)
        body = await read_body(request, hold)
        service = services.of_body(body)
        _check_key(service, request)
        return GenerationResponse(service, await start_or_resume(service, kind, body, _visit(request), hold))

    for path, kind in GENERATES.items():
        app.add_route(path, functools.partial(generate, kind), methods=["POST"])

    @app.get("/v1/streams/{stream}", response_model=None)
    async def streams(request: Request) -> Response:
        stream: str = request.path_params["stream"]
        if getattr(request.state, HEAD, False):  # nothing is taken from whoever reads it
            services.first.tickets.read(stream.partition(".")[0], request.state.caller.owner)
            return Response(headers={name.decode(): value.decode() for name, value in EVENT_HEADERS})
        hold = _begin(services, request)
        service = await group_of_stream(services, stream, _visit(request))
        _check_key(service, request)
        return GenerationResponse(service, await reopen(service, stream, _visit(request), hold))


def _token_routes(app: FastAPI, services: Services) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        hold = _begin(services, request)
        body = parse(TokenizeRequest, await read_body(request, hold))
        service = services.named(body.model)
        _check_key(service, request)
        model = service.model
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages is required", "prompt")
        if body.messages is not None:
            use = tool_use(body.tools, None)
            if use is not None:
                check_tools(model, use)
            how = Prompting.of(body, body.chat_template_kwargs)
            ids = list(await chat_prompt(service, body.messages, how, int(time.time()), use))
        else:
            text = body.prompt or ""
            check_chars(model, len(text), "prompt")
            ids = await model.encode(text, body.add_special_tokens is not False)
        names = [model.tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None
        limit = model.max_model_len
        return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names})

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        _check_key(services.first, request)
        model = services.first.model
        template = model.template.source if model.template is not None else None
        limit = {"model_max_length": model.max_model_len, "chat_template": template}
        return _json({"tokenizer_class": "PreTrainedTokenizerFast", **model.special_tokens, **limit})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        hold = _begin(services, request)
        body = parse(DetokenizeRequest, await read_body(request, hold))
        service = services.named(body.model)
        _check_key(service, request)
        model = service.model
        if len(body.tokens) > DETOKENIZE_MAX:
            raise ApiError(400, f"at most {DETOKENIZE_MAX} tokens at once", "tokens")
        ids = list(check_tokens(model, body.tokens, "tokens"))
        if len(ids) <= INLINE_TOKENS_MAX:
            return _json({"prompt": model.decode(ids)})
        return _json({"prompt": await asyncio.to_thread(model.decode, ids)})


def _error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        count_error(service, error)
        if (kind := GENERATES.get(request.url.path)) is not None:
            name = own_request_id(request.headers.get("x-request-id"))
            service.dispatcher.lives.turned_away(name, kind, _caller(request).name, error.status, time.time())
        return _json(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {shorten(request.url.path)}: {error.detail}"
        wrapped = ApiError(error.status_code, text)
        count_error(service, wrapped)
        return _json(wrapped.body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        wrapped = ApiError(500, "internal error of the gateway")
        count_error(service, wrapped)
        return _json(wrapped.body, 500, wrapped.headers)


async def read_body(request: Request, hold: Hold) -> bytes:
    """The body, refused as soon as it exceeds its bound or its client's memory. Raises ApiError."""
    try:
        return await bodies.read_body(request, BODY_BYTES_MAX, BODY_S, hold.grow)
    except bodies.BodyError as error:
        raise ApiError(error.status, error.message) from None


def _visit(request: Request) -> Visit:
    headers, caller = request.headers, _caller(request)
    return Visit(
        caller.owner,
        headers.get("x-request-id", ""),
        headers.get("idempotency-key"),
        headers.get("last-event-id") or None,  # an empty one says that nothing has come yet
        caller.limits.priority_floor,
    )


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _begin(services: Services, request: Request) -> Hold:
    """A request that its key's limits let pass; it is over when what it holds is released. Raises ApiError."""
    caller = _caller(request)
    limits = caller.limits
    if limits.models and services.names.isdisjoint(limits.models):
        raise ApiError(403, "this API key may use none of the models that are served here", "model")
    caller.usage.begin(time.monotonic())
    return services.first.memory.hold(caller.owner, limits.memory_bytes, caller.usage)


def _check_key(service: Service, request: Request) -> None:
    """Raises ApiError 403."""
    if not _may_use(service, request):
        name = service.model.name
        raise ApiError(403, f"this API key may not use the model {name}", "model")


def _may_use(service: Service, request: Request) -> bool:
    models = _caller(request).limits.models
    return not models or service.model.name in models


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, "application/json")
