"""What every request passes before anything looks at it: the API key, and the bound on its body."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.contract.errors import ConfigError
from web.gateway.errors import ApiError

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/version"})
BODY_BYTES_MAX = 4 << 20


class ApiKeys:
    """API keys as hashes: the process does not keep what would let somebody in."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """One key a line; empty lines and lines that start with # do not count. Raises ConfigError."""
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except OSError as error:
            raise ConfigError(f"cannot read the API keys {path}: {error.strerror}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{path} holds no API key: nobody could use the gateway")
        return cls(keys)

    def match(self, authorization: str | None) -> bytes | None:
        """The hash of the key that a header carries, or None; the time it takes does not depend on which."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        return digest if scheme.lower() == "bearer" and any(matches) else None


class Guard:
    """ASGI middleware; raw, because Starlette's own kind would stand in the way of disconnects."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None
        if scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            owner = self._keys.match(headers.get("authorization"))
            if owner is None:
                return await _refuse(
                    send, ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
                )
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > BODY_BYTES_MAX:
                return await _refuse(send, too_large())
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)
        return None


def too_large() -> ApiError:
    return ApiError(413, f"the body exceeds {BODY_BYTES_MAX} bytes")


async def _refuse(send: Send, error: ApiError) -> None:
    body = error.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
