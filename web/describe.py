"""OpenAPI documents: what every endpoint of an API takes, and every way in which it answers (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Schema = dict[str, Any]
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
ANY: Schema = {}
REQUEST_ID: Schema = {
    "description": "The request's own (up to 128 visible ASCII characters), else a new one; also in logs.",
    "required": True,
    "schema": {"type": "string"},
}
ALLOW: Schema = {"description": "The path's methods.", "required": True, "schema": {"type": "string"}}
COMMON_ERRORS = (
    400,
    405,
    431,
    500,
    501,
    503,
    505,
)  # of any request: what is no HTTP, or has an endless head; no connection
BODY_ERRORS = (408, 413, 415)  # of any body
WORDS = {
    405: "the path has other methods: see Allow",
    408: "the request did not arrive in time",
    409: "a conflict with what is under way",
    413: "the body is too large, or what it decompresses to",
    415: "a Content-Encoding that is not gzip, deflate or identity",
    422: "Idempotency-Key or Last-Event-ID belong to another body",
    429: "too many requests, or too much memory in use: see Retry-After",
    431: "the head of the request is too long",
    501: "a Transfer-Encoding other than chunked",
    505: "a version of HTTP other than 1.1 and 1.0",
}


def package_version() -> str:
    try:
        return version("kevlarflow")
    except PackageNotFoundError:
        return "0"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`answers`: media types and schemas of those that are no errors, by status; `errors`: besides the common ones."""

    method: str
    path: str
    summary: str
    answers: Mapping[int, Mapping[str, Schema]]
    errors: Sequence[int] = ()
    body: Schema | None = None
    parameters: Sequence[Schema] = ()
    description: str = ""
    open: bool = False  # no credentials are needed


@dataclass(frozen=True, slots=True)
class Api:
    title: str
    version: str
    endpoints: Sequence[Endpoint]
    schemas: Mapping[str, Schema]
    error: Schema
    security: Mapping[str, Schema] = field(
        default_factory=lambda: {"bearer": {"type": "http", "scheme": "bearer"}}
    )

    def document(self) -> dict[str, Any]:
        """OpenAPI 3.1. HEAD and OPTIONS are those of `manners.py`, which every path has."""
        paths: dict[str, dict[str, Any]] = {}
        for endpoint in self.endpoints:
            operations = paths.setdefault(endpoint.path, {"options": self._operation(_options(endpoint))})
            operations[endpoint.method.lower()] = self._operation(endpoint)
            if endpoint.method == "GET":
                operations["head"] = self._operation(replace(endpoint, method="HEAD"))
        return {
            "openapi": "3.1.0",
            "info": {"title": self.title, "version": self.version},
            "paths": paths,
            "components": {
                "schemas": {**self.schemas, "Error": self.error},
                "securitySchemes": dict(self.security),
            },
        }

    def _operation(self, endpoint: Endpoint) -> dict[str, Any]:
        errors = {*COMMON_ERRORS, *endpoint.errors, *(() if endpoint.open else (401,))}
        bodies, methods = endpoint.method != "HEAD", endpoint.method == "OPTIONS"
        if methods:
            errors.discard(405)
        if endpoint.body is not None:
            errors |= set(BODY_ERRORS)
        responses: dict[str, Any] = {}
        for status, content in endpoint.answers.items():
            media = {kind: {"schema": schema} for kind, schema in content.items() if bodies}
            responses[str(status)] = {
                "description": HTTPStatus(status).phrase,
                **({"content": media} if media else {}),
            }
        for status in sorted(errors - set(endpoint.answers)):
            said = WORDS.get(status, HTTPStatus(status).phrase)
            told = {"content": {JSON: {"schema": ref("Error")}}} if bodies else {}
            responses[str(status)] = {"description": said, **told}
        for response in responses.values():
            response["headers"] = {"X-Request-Id": REQUEST_ID}
        responses["204" if methods else "405"]["headers"]["Allow"] = ALLOW
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "description": endpoint.description or endpoint.summary,
            "operationId": f"{endpoint.method.lower()}{endpoint.path.replace('/', '_').translate(_PLAIN)}",
            "responses": responses,
            "security": [] if endpoint.open else [{name: []} for name in self.security],
        }
        if endpoint.parameters:
            operation["parameters"] = list(endpoint.parameters)
        if endpoint.body is not None:
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": endpoint.body}}}
        return operation


def _options(endpoint: Endpoint) -> Endpoint:
    """Of the path that this endpoint has."""
    places = [each for each in endpoint.parameters if each["in"] == "path"]
    what = "Which methods the path has"
    return Endpoint("OPTIONS", endpoint.path, what, {204: {}}, parameters=places, open=True)


_PLAIN = str.maketrans("", "", "{}:.")


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def parameter(name: str, where: str, schema: Schema, description: str) -> Schema:
    """`where`: path, query or header."""
    required = {"required": True} if where == "path" else {}
    return {"name": name, "in": where, "schema": schema, "description": description, **required}


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these members."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
