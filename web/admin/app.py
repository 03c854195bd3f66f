"""The admin API and the dashboard's page, as one ASGI app over an `AdminService`.

    GET    /livez /readyz                    no token; with one /readyz says what is wrong
    GET    / , /ui, /ui/...                  the dashboard, no token
    POST   /session                          {"token": ...} -> an HttpOnly cookie; DELETE revokes and forgets it
    GET    /session                          {"name", "role", "expiry_unix_s"} of who asks
    GET    /oidc, /oidc/login, /oidc/callback    login with a provider, no token: web/admin/oidc/routes.py
    GET    /metrics                          Prometheus text
    GET    /openapi.json                     all of this, for machines
    GET    /admin/v1/status                  ClusterStatus
    GET    /admin/v1/events?limit=&after=    {"events": [{"id": ..., and Event's fields}]}, oldest first
    GET    /admin/v1/quorum                  {"checks": [Check]}
    GET    /admin/v1/incidents?limit=        {"incidents": [Incident]}, oldest first
    GET    /admin/v1/figures?seconds=&rows=  {"columns": [...], "rows": [[...]]}, oldest first: for charts
    GET    /admin/v1/audit?limit=&after=&operation=    {"entries": [AuditEntry]}, oldest first; operators only
    GET    /admin/v1/requests?id=            Lives of one request; operators only
    GET    /admin/v1/settings                ClusterConfig without passwords; operators only
    GET    /admin/v1/operations              {"operations": [Operation]}
    POST   /admin/v1/operations              OperationRequest -> OperationAnswer; 409: refused
    DELETE /admin/v1/operations/{id}         cancel -> Operation
    POST   /admin/v1/revocations             RevokeRequest -> Revocation; the cluster's own token only
    POST   /admin/v1/credentials             CredentialChange, for the audit -> 204; the cluster's own token only
    GET    /admin/v1/stream?after=           server-sent events: "status", "difference", "events", "history",
                                             "incidents", "figures"

Errors are `{"error": {"message", "code"}}`; 503 means that etcd or the database is away, try again.
"""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from controlplane.contract.auth import ADMIN_CALLER, TOKEN_S_MAX, Caller, identify
from controlplane.contract.credentials import CredentialChange
from controlplane.contract.errors import Unavailable
from controlplane.contract.records import GROUP_WIDE, OperationKind, OperationState
from controlplane.contract.revocations import Revocation, RevokeRequest, name_id
from controlplane.contract.status import OperationAnswer, OperationRequest
from web import bodies
from web.admin.auth import (
    COOKIE,
    CREDENTIALS,
    READY,
    REVOCATIONS,
    SESSION_S,
    Guard,
    caller_of,
    error,
    is_known,
    session_of,
    set_session,
)
from web.admin.describe import NAME, document
from web.admin.feed import Feed, FeedResponse, event_rows, figure_rows
from web.admin.oidc.routes import add_login
from web.admin.service import AdminService
from web.admin.static import StaticFile, load_files
from web.describe import package_version
from web.manners import HEAD, Manners

if TYPE_CHECKING:
    from web.admin.oidc.provider import Provider

BODY_BYTES_MAX = 64 * 1024
BODY_S = 10.0  # a client that takes longer to send its request is not waited for
EVENTS_MAX = 1000
FIGURES_S_MAX = 24 * 3600  # older ones are not kept
FIGURES_ROWS_MAX = 2000
T = TypeVar("T")
Note = Callable[[CredentialChange, Caller], None]  # has the audit tell of it; never waits

ID_PREFIXES = ("cmpl-", "chatcmpl-", "resp_")
OWN_TOKEN = "the cluster's own token is not revoked: give the cluster another secret"
REVOCABLE = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
SEEN = re.compile(r"[0-9]{1,18}")
NAMED = re.compile(NAME.removesuffix("$"))  # `fullmatch` is stricter: Python's $ lets a line end pass


class SessionRequest(msgspec.Struct, frozen=True):
    token: str


def build_app(
    service: AdminService, token: str, provider: Provider | None = None, note: Note | None = None
) -> FastAPI:
    """The app of one controller. `token` is `derive(secret, "admin")`; `provider` signs people in to the dashboard.

    `app.state.feed.close()` ends the open streams before an exit.
    """
    # A slash at the end is nothing that anybody's path has when it comes here (Manners): who was sent there came back.
    app = FastAPI(title="KevlarFlow admin", docs_url=None, redoc_url=None, redirect_slashes=False)
    described = document(package_version())
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.add_middleware(Guard, token=token, revoked=service.is_revoked)
    app.add_middleware(Manners, routes=lambda: app.routes)  # the last one is the outermost
    _add_errors(app)
    _add_health(app, service)
    _add_page(app)
    _add_sessions(app, service, token)
    _add_credentials(app, note)
    add_login(app, token, provider, service.is_revoked)
    _add_reads(app, service)
    _add_operations(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Unavailable)
    async def unavailable(_request: Request, problem: Unavailable) -> JSONResponse:
        return error(503, str(problem), {"retry-after": "1"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, problem: RequestValidationError) -> JSONResponse:
        words = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in problem.errors())
        return error(400, words)

    @app.exception_handler(HTTPException)
    async def other(_request: Request, problem: HTTPException) -> JSONResponse:
        return error(problem.status_code, problem.detail, dict(problem.headers or {}))


def _add_health(app: FastAPI, service: AdminService) -> None:
    @app.get("/livez")
    async def livez() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get(READY)
    async def readyz(request: Request) -> PlainTextResponse:
        if service.ready:  # also with troubles: it serves, and says what is wrong to who may read the status
            troubles = service.troubles() if is_known(request.scope) else ()
            return PlainTextResponse("".join(f"{line}\n" for line in ("ok", *troubles)))
        return PlainTextResponse("the cluster's state has not been read from etcd yet\n", 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    files = load_files()

    def answer(file: StaticFile | None) -> Response:
        if file is None:
            return error(404, "no such file")
        return Response(file.body, media_type=file.media_type, headers={"cache-control": "no-cache"})

    @app.get("/")
    @app.get("/ui")
    async def page() -> Response:
        return answer(files.get("index.html"))

    @app.get("/ui/{path:path}")
    async def asset(path: str) -> Response:
        return answer(files.get(path))


def _add_sessions(app: FastAPI, service: AdminService, token: str) -> None:
    @app.post("/session")
    async def log_in(request: Request) -> Response:
        given = await _body(request, SessionRequest)
        now = time.time()
        caller = identify(given.token, token, now)
        if caller is None or (caller.ids and service.is_revoked(caller.revoked_by)):
            return error(401, "the admin token is wrong")
        response = Response(status_code=204)
        set_session(response, token, now, caller, secure=request.url.scheme == "https")
        return response

    @app.get("/session")
    async def session(request: Request) -> Response:
        caller = caller_of(request.scope)
        return _json({"name": caller.name, "role": caller.role, "expiry_unix_s": caller.expiry_unix_s})

    @app.delete("/session")
    async def log_out(request: Request) -> Response:
        session = session_of(request.headers, token, time.time())
        if session is not None:
            wanted = Revocation(session.ids[0], session.name, session.expiry_unix_s, session.name)
            await service.revoke(wanted, caller_of(request.scope))
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    @app.post(REVOCATIONS)
    async def revoke(request: Request) -> Response:
        asked = await _body(request, RevokeRequest)
        if bool(asked.name) == bool(asked.token):
            raise HTTPException(400, "a name or a token: one of them")
        wanted = _revocation(asked, token, time.time())
        await service.revoke(wanted, caller_of(request.scope), audited=True)
        return _json(wanted)


def _add_credentials(app: FastAPI, note: Note | None) -> None:
    @app.post(CREDENTIALS)
    async def credentials(request: Request) -> Response:
        change = await _body(request, CredentialChange)
        if note is None:
            raise Unavailable("this controller keeps no audit of credentials")
        note(change, caller_of(request.scope))
        return Response(status_code=204)


def _revocation(asked: RevokeRequest, token: str, now_unix_s: float) -> Revocation:
    """Raises HTTPException 404, 409."""
    if asked.token:
        caller = identify(asked.token, token, now_unix_s)
        if caller is None:
            raise HTTPException(404, "not a token of this cluster, or it has expired")
        if not caller.ids:
            raise HTTPException(409, OWN_TOKEN)
        return Revocation(caller.ids[0], caller.name, caller.expiry_unix_s, ADMIN_CALLER.name)
    if asked.name == ADMIN_CALLER.name:
        raise HTTPException(409, OWN_TOKEN)
    if not REVOCABLE.fullmatch(asked.name):
        raise HTTPException(400, "name: 1 to 256 printable characters, as the audit has it")
    # Of somebody at a provider there are sessions alone.
    lasts_s = SESSION_S if ":" in asked.name else TOKEN_S_MAX
    return Revocation(name_id(asked.name), asked.name, int(now_unix_s) + lasts_s, ADMIN_CALLER.name)


def _add_reads(app: FastAPI, service: AdminService) -> None:
    feed = app.state.feed = Feed(service)

    @app.get("/admin/v1/status")
    async def status() -> Response:
        return _json(await service.status())

    @app.get("/admin/v1/quorum")
    async def quorum() -> Response:
        return _json({"checks": await service.quorum()})

    @app.get("/admin/v1/events")
    async def events(
        limit: int = Query(100, ge=1, le=EVENTS_MAX), after: int = Query(0, ge=0, lt=2**63)
    ) -> Response:
        return _json({"events": event_rows(await service.events(limit, after))})

    @app.get("/admin/v1/incidents")
    async def incidents(limit: int = Query(100, ge=1, le=EVENTS_MAX)) -> Response:
        return _json({"incidents": await service.incidents(limit)})

    @app.get("/admin/v1/protection")
    async def protection() -> Response:
        return _json(await service.protection())

    @app.get("/admin/v1/figures")
    async def figures(
        seconds: int = Query(3600, ge=60, le=FIGURES_S_MAX), rows: int = Query(500, ge=1, le=FIGURES_ROWS_MAX)
    ) -> Response:
        now = time.time()
        return _json(figure_rows(await service.figures(now - seconds, now, rows)))

    @app.get("/admin/v1/audit")
    async def audit(
        limit: int = Query(100, ge=1, le=EVENTS_MAX),
        after: int = Query(0, ge=0, lt=2**63),
        operation: str = Query("", max_length=100),
    ) -> Response:
        return _json({"entries": await service.audit(limit, after, operation)})

    @app.get("/admin/v1/requests")
    async def requests(id_: str = Query(alias="id", min_length=1, max_length=160)) -> Response:
        return _json(await service.lives(request_of(id_)))

    @app.get("/admin/v1/settings")
    async def settings() -> Response:
        return _json(service.settings())

    @app.get("/admin/v1/stream")
    async def stream(request: Request, after: int = Query(0, ge=0, lt=2**63)) -> Response:
        if getattr(request.state, HEAD, False):
            return Response(media_type=FeedResponse.media_type)
        # A browser that connects again says what it saw last.
        resumed = request.headers.get("last-event-id", "")
        caller = caller_of(request.scope)
        expiry = caller.expiry_unix_s
        left_s = expiry - time.time() if expiry else None  # a session that has expired reads no further

        def ended() -> bool:
            return bool(caller.ids) and service.is_revoked(caller.revoked_by)

        return FeedResponse(feed, int(resumed) if SEEN.fullmatch(resumed) else after, left_s, ended)


def _add_operations(app: FastAPI, service: AdminService) -> None:
    @app.get("/admin/v1/operations")
    async def operations() -> Response:
        return _json({"operations": await service.operations()})

    @app.post("/admin/v1/operations")
    async def submit(request: Request) -> Response:
        wanted = await _body(request, OperationRequest)
        names = {"id": wanted.id, "node": wanted.node, "substitute": wanted.substitute}
        for field, value in names.items():
            empty = value is None or (not value and field == "node" and wanted.kind in GROUP_WIDE)
            if not empty and not NAMED.fullmatch(str(value)):
                raise HTTPException(400, f"{field}: letters, digits, '.', '_' and '-' only, at most 100")
        if wanted.kind not in {kind.value for kind in OperationKind}:
            raise HTTPException(400, f"kind: one of {', '.join(kind.value for kind in OperationKind)}")
        answer: OperationAnswer = await service.submit(wanted, caller_of(request.scope))
        refused = not answer.accepted and any(check.level == "fail" for check in answer.checks)
        return _json(answer, 409 if refused else 200)

    @app.delete("/admin/v1/operations/{operation_id}")
    async def cancel(operation_id: str, request: Request) -> Response:
        operation = await service.cancel(operation_id, caller_of(request.scope))
        if operation is None:
            return error(404, f"there is no operation {operation_id[:100]}")
        if operation.state is not OperationState.CANCELLED:
            return error(409, f"operation {operation.id} has already ended: {operation.state.value}")
        return _json(operation)


def request_of(given: str) -> str:
    """A request's id as clients see it, without what its answer puts before it."""
    return next((given.removeprefix(prefix) for prefix in ID_PREFIXES if given.startswith(prefix)), given)


async def _body(request: Request, kind: type[T]) -> T:
    """Read and parse a bounded JSON body. Raises HTTPException 400, 408, 413 or 415."""
    try:
        body = await bodies.read_body(request, BODY_BYTES_MAX, BODY_S)
    except bodies.BodyError as problem:
        raise HTTPException(problem.status, problem.message) from None
    try:
        # PowerShell and others on Windows write a mark of UTF-8 first.
        return msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8), type=kind)
    except msgspec.MsgspecError as problem:
        raise HTTPException(400, str(problem)) from problem
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not UTF-8") from None
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply") from None


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
