"""The admin API's OpenAPI document (pure)."""

from __future__ import annotations

from typing import Any

import msgspec

from controlplane.contract.audit import AuditEntry
from controlplane.contract.credentials import CredentialChange
from controlplane.contract.events import Event
from controlplane.contract.incidents import Incident
from controlplane.contract.lives import Lives
from controlplane.contract.protection import Protection
from controlplane.contract.records import GROUP_WIDE, Operation, OperationKind
from controlplane.contract.revocations import Revocation, RevokeRequest
from controlplane.contract.status import Check, ClusterStatus, OperationAnswer, OperationRequest
from web.describe import (
    ANY,
    EVENTS,
    INTEGER,
    JSON,
    STRING,
    TEXT,
    Api,
    Endpoint,
    Schema,
    array,
    parameter,
    record,
    ref,
)

KINDS = (
    ClusterStatus, Check, Operation, OperationAnswer, OperationRequest, Event, Incident, AuditEntry, Protection, Lives,
    Revocation, RevokeRequest, CredentialChange,
)  # fmt: skip
HTML = "text/html"
NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
COOKIE_OR_BEARER: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": "kevlarflow_admin"},
}


def document(version: str) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(KINDS, ref_template="#/components/schemas/{name}")
    schemas["OperationRequest"] = _operation_request(schemas["OperationRequest"])
    schemas["RevokeRequest"] = _revoke_request(schemas["RevokeRequest"])
    error = record({"error": record({"message": STRING, "code": INTEGER})})
    return Api("KevlarFlow admin", version, _endpoints(), schemas, error, COOKIE_OR_BEARER).document()


def _operation_request(schema: Schema) -> Schema:
    """What the types do not say: how names are written, and which kinds need one."""
    name = {"type": "string", "pattern": NAME}
    kinds = sorted(kind.value for kind in OperationKind)
    wide = sorted(kind.value for kind in GROUP_WIDE)
    properties = schema["properties"] | {
        "id": name,
        "kind": {"enum": kinds},
        "substitute": {"anyOf": [name, {"type": "null"}], "default": None},
    }
    about_node = {"properties": {"kind": {"enum": kinds}, "node": name}, "required": ["node"]}
    about_group = {"properties": {"kind": {"enum": wide}, "node": {"anyOf": [name, {"const": ""}]}}}
    return schema | {"properties": properties, "anyOf": [about_node, about_group]}


def _revoke_request(schema: Schema) -> Schema:
    """Either of the two."""
    name: Schema = {"type": "string", "pattern": r"^[^\x00-\x1f\x7f]{1,256}$"}
    token: Schema = {"type": "string", "minLength": 1}
    either: list[Schema] = [
        {"properties": {"name": name, "token": {"const": ""}}, "required": ["name"]},
        {"properties": {"token": token, "name": {"const": ""}}, "required": ["token"]},
    ]
    return schema | {"anyOf": either}


def bounded(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def pages(*statuses: int) -> dict[int, dict[str, Schema]]:
    """Answers that people read."""
    return {status: {HTML: STRING} for status in statuses}


def _endpoints() -> list[Endpoint]:
    position = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
    after = parameter("after", "query", position, "The id of the last event that is known.")
    limit = parameter("limit", "query", bounded(1, 1000), "How many at most.")
    seen = parameter("Last-Event-ID", "header", STRING, "As a browser sends it when it connects again.")
    operation = parameter("operation_id", "path", STRING, "The operation's.")
    page = parameter("path", "path", STRING, "A file of the dashboard.")
    words = {200: {TEXT: STRING}}
    token = record({"token": STRING})
    session = record({"name": STRING, "role": STRING, "expiry_unix_s": INTEGER})
    figures = record({"columns": array(STRING), "rows": array({"type": "array"})})
    operations = record({"operations": array(ref("Operation"))})
    events = record({"events": array(ref("Event"))})
    incidents = record({"incidents": array(ref("Incident"))})
    audit = record({"entries": array(ref("AuditEntry"))})
    named = {"type": "string", "maxLength": 100}
    identifier = {"type": "string", "minLength": 1, "maxLength": 160}
    of_operation = parameter("operation", "query", named, "Only entries of the operation with this id.")
    submitted = {200: {JSON: ref("OperationAnswer")}, 409: {JSON: ref("OperationAnswer")}}
    changes = (403, 404, 409)
    base = "/admin/v1"
    return [
        Endpoint("GET", "/livez", "Whether the process answers", words, open=True),
        Endpoint(
            "GET", "/readyz", "Whether the cluster's state is known", words | {503: {TEXT: STRING}}, open=True
        ),
        Endpoint("GET", "/", "The dashboard", {200: {HTML: STRING}}, (404,), open=True),
        Endpoint("GET", "/ui", "The dashboard", {200: {HTML: STRING}}, (404,), open=True),
        Endpoint(
            "GET",
            "/ui/{path}",
            "The dashboard's files",
            {200: {"*/*": ANY}},
            (404,),
            parameters=(page,),
            open=True,
        ),
        Endpoint("POST", "/session", "A cookie for the token", {204: {}}, (401,), token, open=True),
        Endpoint("GET", "/session", "Who asks", {200: {JSON: session}}),
        Endpoint(
            "GET", "/oidc", "The login provider", {200: {JSON: record({"provider": STRING})}}, open=True
        ),
        Endpoint(
            "GET",
            "/oidc/login",
            "To the login provider",
            {303: {}, **pages(400, 502, 503)},
            (404,),
            open=True,
        ),
        Endpoint(
            "GET",
            "/oidc/callback",
            "Back from the login provider",
            {303: {}, **pages(400, 403, 502, 503)},
            (404,),
            parameters=[
                parameter(name, "query", STRING, "As the provider gives it.")
                for name in ("code", "state", "iss", "error")
            ],
            open=True,
        ),
        Endpoint("DELETE", "/session", "Sign out: the session is revoked", {204: {}}, (403,)),
        Endpoint(
            "POST",
            f"{base}/revocations",
            "Revoke a token, or all that has one name",
            {200: {JSON: ref("Revocation")}},
            changes,
            ref("RevokeRequest"),
        ),
        Endpoint(
            "POST",
            f"{base}/credentials",
            "Have the audit tell what was done to a key or a token",
            {204: {}},
            (403,),
            ref("CredentialChange"),
        ),
        Endpoint("GET", "/metrics", "For Prometheus", words),
        Endpoint("GET", f"{base}/status", "The cluster", {200: {JSON: ref("ClusterStatus")}}),
        Endpoint(
            "GET", f"{base}/quorum", "etcd's health", {200: {JSON: record({"checks": array(ref("Check"))})}}
        ),
        Endpoint("GET", f"{base}/events", "What happened", {200: {JSON: events}}, parameters=(limit, after)),
        Endpoint("GET", f"{base}/incidents", "Failures", {200: {JSON: incidents}}, parameters=(limit,)),
        Endpoint(
            "GET",
            f"{base}/protection",
            "What the loss of each node would cost",
            {200: {JSON: ref("Protection")}},
        ),
        Endpoint(
            "GET",
            f"{base}/figures",
            "What it did, for charts",
            {200: {JSON: figures}},
            parameters=(
                parameter("seconds", "query", bounded(60, 86_400), "How far back from now."),
                parameter("rows", "query", bounded(1, 2000), "How many at most, spread evenly."),
            ),
        ),
        Endpoint(
            "GET",
            f"{base}/audit",
            "Who did what",
            {200: {JSON: audit}},
            (403,),
            parameters=(limit, after, of_operation),
        ),
        Endpoint(
            "GET",
            f"{base}/requests",
            "The life of one request",
            {200: {JSON: ref("Lives")}},
            (403,),
            parameters=(parameter("id", "query", identifier, "As in its answer.") | {"required": True},),
        ),
        Endpoint("GET", f"{base}/settings", "What it runs with", {200: {JSON: {"type": "object"}}}, (403,)),
        Endpoint("GET", f"{base}/operations", "What operators asked for", {200: {JSON: operations}}),
        Endpoint("POST", f"{base}/operations", "Ask for one", submitted, (403,), ref("OperationRequest")),
        Endpoint(
            "DELETE",
            f"{base}/operations/{{operation_id}}",
            "Cancel it",
            {200: {JSON: ref("Operation")}},
            changes,
            parameters=(operation,),
        ),
        Endpoint(
            "GET",
            f"{base}/stream",
            "Status and events as they come",
            {200: {EVENTS: ANY}},
            parameters=(after, seen),
        ),
    ]
