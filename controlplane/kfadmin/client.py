"""The admin API's client: asks every controller it knows until one answers."""

from __future__ import annotations

import contextlib
import math
import ssl
import time
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from controlplane.contract.audit import AuditEntry
from controlplane.contract.credentials import CredentialChange
from controlplane.contract.errors import ConfigError, KevlarFlowError, PeerError, RequestError, Unavailable
from controlplane.contract.events import Event
from controlplane.contract.incidents import Incident
from controlplane.contract.lives import Lives
from controlplane.contract.protection import Protection
from controlplane.contract.records import Operation
from controlplane.contract.revocations import Revocation, RevokeRequest
from controlplane.contract.status import Check, ClusterStatus, OperationAnswer, OperationRequest
from controlplane.unreadable import UNREADABLE

T = TypeVar("T")

ANSWER_S = 5.0
CONNECT_S = 1.0
SOCKET = "unix:"
SOCKET_DOMAIN = "sock.invalid"  # no name of any network


class Unreachable(Unavailable):
    """No controller answered."""


class NotAllowed(KevlarFlowError):
    """The controllers do not accept the token."""


class Refused(KevlarFlowError):
    """The cluster's state forbids it (the operation is over, its id is taken): nothing was changed."""


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    code: int = 0


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorBody


class EventRow(msgspec.Struct, frozen=True):
    """One event and its place in the history."""

    id: int
    event: Event


class _Id(msgspec.Struct, frozen=True):
    id: int


class _Events(msgspec.Struct, frozen=True):
    events: list[msgspec.Raw]


class _Checks(msgspec.Struct, frozen=True):
    checks: tuple[Check, ...]


class _Incidents(msgspec.Struct, frozen=True):
    incidents: list[Incident]


class _Audit(msgspec.Struct, frozen=True):
    entries: list[AuditEntry]


class _Operations(msgspec.Struct, frozen=True):
    operations: list[Operation]


def trust(url: str, ca: str) -> ssl.SSLContext | bool:
    """For httpx, whose certificates count at `url`: those of the system's authorities, or of $SSL_CERT_FILE, and of the
    file `ca`. Raises ConfigError."""
    if not url.startswith("https:"):
        return False  # there are none; to read the system's takes as long as all of a request
    context = ssl.create_default_context()
    if ca:
        try:
            context.load_verify_locations(ca)
        except OSError as error:  # an SSLError is one
            raise ConfigError(f"cannot read authorities from {ca}: {error.strerror or error}") from error
    return context


class AdminClient:
    """Calls the admin API of one cluster. Not for use from several threads at once.

    Every method raises Unreachable, NotAllowed, Refused, RequestError (the request itself is wrong) or
    PeerError (it answered with something that is not the admin API).
    """

    def __init__(self, endpoints: Sequence[str], token: str, limit_s: float = 0.0, ca: str = "") -> None:
        """`endpoints`: "http://HOST:PORT", "https://HOST:PORT" or "unix:PATH". `limit_s`: after which nothing is asked
        any more, from now on; 0: never. `ca`: see `trust`."""
        self._endpoints = list(endpoints)
        self._limit_s = limit_s
        self._until = time.monotonic() + limit_s if limit_s else math.inf
        secure = next((url for url in endpoints if url.startswith("https:")), "")
        # Loopback and management networks are not reached through a proxy of the environment.
        # A Unix socket is a host of its own for httpx, reached by its own transport.
        self._urls = {
            endpoint: f"http://{number}.{SOCKET_DOMAIN}"
            for number, endpoint in enumerate(endpoints)
            if endpoint.startswith(SOCKET)
        }
        mounts = {
            url: httpx.HTTPTransport(uds=endpoint.removeprefix(SOCKET), verify=False)  # see `trust`
            for endpoint, url in self._urls.items()
        }
        headers = {"authorization": f"Bearer {token}"}
        self._http = httpx.Client(headers=headers, trust_env=False, verify=trust(secure, ca), mounts=mounts)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def status(self) -> ClusterStatus:
        return self._read("/admin/v1/status", ClusterStatus)

    def current(self) -> ClusterStatus:
        """The status as the leader has it, who is asked first from now on. Only where no endpoint that was named leads,
        as another controller has it: `answered_by` is then not `leader`.

        The leader's address, of which others tell, is not gone to: the token is for the endpoints that were named."""
        first = found = self.status()
        for endpoint in list(self._endpoints):
            if not found.leader or found.answered_by == found.leader:
                return found
            with contextlib.suppress(Unreachable):
                found = self._read("/admin/v1/status", ClusterStatus, (endpoint,))
                if found.answered_by == found.leader:
                    self._endpoints.remove(endpoint)
                    self._endpoints.insert(0, endpoint)
        return found if found.answered_by == found.leader else first

    def incidents(self, limit: int = 50) -> list[Incident]:
        """The newest failures, oldest first."""
        return self._read(f"/admin/v1/incidents?limit={limit}", _Incidents).incidents

    def protection(self) -> Protection:
        return self._read("/admin/v1/protection", Protection)

    def lives(self, request: str) -> Lives:
        """What the gateways remember of a request."""
        return self._read(f"/admin/v1/requests?id={quote(request, safe='')}", Lives)

    def audit(self, limit: int = 50, after: int = 0, operation: str = "") -> list[AuditEntry]:
        """The newest `limit` entries with an id above `after`, oldest first; of one operation, if one is named."""
        query = f"limit={limit}&after={after}&operation={quote(operation, safe='')}"
        return self._read(f"/admin/v1/audit?{query}", _Audit).entries

    def settings(self) -> dict[str, Any]:
        """What a controller runs with, without passwords."""
        return self._read("/admin/v1/settings", dict[str, Any])

    def metrics(self) -> str:
        return _checked(self._send("GET", "/metrics")).text

    def events(self, limit: int = 50, after: int = 0) -> list[EventRow]:
        """The newest `limit` events with an id above `after`, oldest first."""
        rows = self._read(f"/admin/v1/events?limit={limit}&after={after}", _Events).events
        return [
            EventRow(_decode(bytes(row), _Id).id, msgspec.json.decode(bytes(row), type=Event)) for row in rows
        ]

    def operations(self) -> list[Operation]:
        return self._read("/admin/v1/operations", _Operations).operations

    def quorum(self) -> tuple[Check, ...]:
        """Whether the cluster can be changed, and would still be after one more loss."""
        return self._read("/admin/v1/quorum", _Checks).checks

    def submit(self, request: OperationRequest) -> OperationAnswer:
        """Sent again to the next controller when one breaks off: the id makes that harmless."""
        response = self._send("POST", "/admin/v1/operations", msgspec.json.encode(request))
        if response.status_code == 409:
            try:
                return msgspec.json.decode(response.content, type=OperationAnswer)
            except UNREADABLE:
                pass  # an error and not a refused operation
        return _decode(_checked(response).content, OperationAnswer)

    def cancel(self, operation_id: str) -> Operation:
        return _decode(
            _checked(self._send("DELETE", f"/admin/v1/operations/{quote(operation_id, safe='')}")).content,
            Operation,
        )

    def revoke(self, request: RevokeRequest) -> Revocation:
        body = msgspec.json.encode(request)
        return _decode(_checked(self._send("POST", "/admin/v1/revocations", body)).content, Revocation)

    def note(self, change: CredentialChange) -> None:
        """Have the audit tell of it."""
        _checked(self._send("POST", "/admin/v1/credentials", msgspec.json.encode(change)))

    def _read(self, path: str, kind: type[T], endpoints: Sequence[str] = ()) -> T:
        return _decode(_checked(self._send("GET", path, endpoints=endpoints)).content, kind)

    def _send(
        self, method: str, path: str, body: bytes | None = None, endpoints: Sequence[str] = ()
    ) -> httpx.Response:
        troubles = []
        for endpoint in list(endpoints or self._endpoints):
            left_s = self._until - time.monotonic()
            if left_s <= 0:
                troubles.append(f"no answer within {self._limit_s:g} s")
                break
            limits = httpx.Timeout(min(ANSWER_S, left_s), connect=min(CONNECT_S, left_s))
            try:
                response = self._http.request(
                    method, self._urls.get(endpoint, endpoint) + path, content=body, timeout=limits
                )
            except httpx.TransportError as error:
                troubles.append(f"{endpoint}: {error or type(error).__name__}")
            else:
                if response.status_code != 503:
                    return response
                troubles.append(f"{endpoint}: {_message(response)}")
            # The next call begins with one that has not just failed.
            self._endpoints.append(self._endpoints.pop(self._endpoints.index(endpoint)))
        raise Unreachable("no controller answered (" + "; ".join(troubles) + ")")


def _checked(response: httpx.Response) -> httpx.Response:
    match response.status_code:
        case 200 | 204:
            return response
        case 401 | 403:
            where = f"{response.url.host}:{response.url.port}: "
            raise NotAllowed(("" if SOCKET_DOMAIN in where else where) + _message(response))
        case 409:
            raise Refused(_message(response))
        case 400 | 404 | 413 | 422:
            raise RequestError(_message(response))
        case code:
            raise PeerError(f"{response.url}: HTTP {code}: {_message(response)}")


def _message(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(response.content, type=ErrorAnswer).error.message
    except UNREADABLE:
        return response.text[:200] or f"HTTP {response.status_code}"


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except UNREADABLE as error:
        raise PeerError(f"the admin API's answer is not understood: {error}") from error
