"""Errors as a client sees them: a status and vLLM's nested error body."""

from __future__ import annotations

from typing import Any

import msgspec

from web.gateway.routing.events import FailCode

ECHO_CHARS_MAX = 80  # of a client's own bad input, in messages

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    409: "ConflictError",
    410: "GoneError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

# Also a scheduler's words, which compares where two bodies come at once: its code for them says INVALID, as of old.
OTHER_BODY = "this Idempotency-Key was used with another body"

FAIL_STATUS = {
    FailCode.OVERLOADED: 429,
    FailCode.UNAVAILABLE: 503,
    FailCode.INVALID: 400,
    FailCode.QUARANTINED: 500,
    FailCode.MISMATCH: 500,
    FailCode.ENGINE: 500,
    FailCode.SUPERSEDED: 409,
}


class ApiError(Exception):
    """A request ends with this `status`; `retry_after_s` > 0 tells the client when to come back."""

    def __init__(
        self, status: int, message: str, param: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s > 0:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if (self.status >= 500 and self.status != 503) or self.status == 409:
            # A poison request must not be sent again by the SDK, and two connections must not take turns.
            headers["x-should-retry"] = "false"
        return headers

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)


def of_fail(code: FailCode, message: str, retry_after_s: float) -> ApiError:
    status = 422 if code is FailCode.INVALID and message == OTHER_BODY else FAIL_STATUS[code]
    return ApiError(status, message, retry_after_s=retry_after_s)


def shorten(value: object) -> str:
    """A client's value for an error message: quoted, and never long."""
    text = repr(value)
    return text if len(text) <= ECHO_CHARS_MAX else text[: ECHO_CHARS_MAX - 3] + "..."
