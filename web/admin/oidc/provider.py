"""What is asked of an OpenID Connect provider: its discovery document, a token for a code, its keys.

The discovery document is kept for a while; the keys are read for each login, so that one which is rotated or withdrawn
counts at once. Answers, times and logins at a time are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, TypeVar

import httpx
import msgspec

from controlplane.contract.errors import ConfigError
from controlplane.contract.oidc import Oidc, trusted
from web.admin.oidc.login import Login, LoginError
from web.admin.oidc.token import verified

T = TypeVar("T")
DISCOVERY = "/.well-known/openid-configuration"
METADATA_S = 600.0
REST_S = 2.0  # after a failure: until the discovery document is asked for again
ANSWER_S = 10.0  # for one answer of the provider
ANSWER_BYTES_MAX = 256 * 1024
LOGINS_MAX = 16  # that wait for the provider at a time
AWAY = "The login provider does not answer as it should. Try again in a moment. The cluster's own tokens go on working."
REFUSED = (
    "The login provider did not accept this login ({code}). Start again; if it stays so, tell whoever operates the"
    " cluster."
)
ELSEWHERE = "This answer did not come from the login provider of this cluster. Start again."
BUSY = "Too many people are signing in at this moment. Try again."


class Metadata(msgspec.Struct, frozen=True):
    """What counts of a discovery document."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False


class TokenAnswer(msgspec.Struct, frozen=True):
    id_token: str


class KeysDocument(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


class Provider:
    """Belongs to one event loop."""

    def __init__(self, settings: Oidc) -> None:
        """Raises ConfigError: the extra is not installed, or the authorities cannot be read."""
        try:
            import authlib.oauth2.auth
            import authlib.oauth2.rfc6749.parameters
            import authlib.oauth2.rfc7636
            import joserfc.jwt  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"oidc.toml needs the extra oidc: pip install 'kevlarflow[oidc]' ({error})"
            ) from error
        self._oauth: Any = authlib.oauth2
        self.config = settings.config
        self._secret = settings.client_secret
        self._tls = _tls(settings)
        self._metadata: Metadata | None = None
        self._failed: LoginError | None = None
        self._asked_at = 0.0
        self._asking = asyncio.Lock()
        self._logins = 0

    async def authorization_url(self, login: Login, redirect_url: str) -> str:
        """Where a browser goes to log in. Raises LoginError."""
        metadata = await self._discovered()
        url: str = self._oauth.rfc6749.parameters.prepare_grant_uri(
            metadata.authorization_endpoint,
            self.config.client_id,
            "code",
            redirect_url,
            " ".join(self.config.scopes),
            login.state,
            nonce=login.nonce,
            code_challenge=self._oauth.rfc7636.create_s256_code_challenge(login.verifier),
            code_challenge_method="S256",
        )
        return url

    async def claims(self, code: str, issuer: str, login: Login, redirect_url: str) -> Mapping[str, object]:
        """What the provider says in a signed ID token about who brings `code`. `issuer`: as the browser brought it
        (RFC 9207), or "". Raises LoginError."""
        if self._logins >= LOGINS_MAX:
            raise LoginError(503, BUSY, f"{LOGINS_MAX} logins wait for the provider")
        self._logins += 1
        try:
            metadata = await self._discovered()
            if issuer != metadata.issuer and (
                issuer or metadata.authorization_response_iss_parameter_supported
            ):
                raise LoginError(400, ELSEWHERE, f"the answer names the issuer {issuer!r:.300}")
            token = await self._id_token(code, metadata, login, redirect_url)
            document = await self._get(metadata.jwks_uri, KeysDocument)
            return verified(token, document.keys, self.config, login.nonce, time.time())
        finally:
            self._logins -= 1

    async def _discovered(self) -> Metadata:
        async with self._asking:  # one asks, the others wait for its answer
            age_s = time.monotonic() - self._asked_at
            if self._metadata is not None and age_s < METADATA_S:
                return self._metadata
            if (failed := self._failed) is not None and age_s < REST_S:
                raise LoginError(failed.status, failed.message, failed.cause)
            self._metadata = self._failed = None
            try:
                self._metadata = await self._discover()
            except LoginError as error:
                self._failed = error
                raise
            finally:
                self._asked_at = time.monotonic()
            return self._metadata

    async def _discover(self) -> Metadata:
        found = await self._get(self.config.issuer.removesuffix("/") + DISCOVERY, Metadata)
        if found.issuer != self.config.issuer:
            raise LoginError(
                502, AWAY, f"the issuer calls itself {found.issuer!r:.300}: oidc.toml has to say the same"
            )
        for url in (found.authorization_endpoint, found.token_endpoint, found.jwks_uri):
            if not trusted(url):
                raise LoginError(502, AWAY, f"the provider names an address that is not https: {url!r:.300}")
        return found

    async def _get(self, url: str, kind: type[T]) -> T:
        with _answering(url):
            answer = await self._ask("GET", url, {}, "")
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=kind)

    async def _id_token(self, code: str, metadata: Metadata, login: Login, redirect_url: str) -> str:
        body = self._oauth.rfc6749.parameters.prepare_token_request(
            "authorization_code", "", redirect_url, code=code, code_verifier=login.verifier
        )
        headers = {"content-type": "application/x-www-form-urlencoded"}
        auth = self._oauth.auth.ClientAuth(self.config.client_id, self._secret, self._auth_method(metadata))
        url, headers, body = auth.prepare("POST", metadata.token_endpoint, headers, body)
        with _answering(url):
            answer = await self._ask("POST", url, headers, body)
            if answer.status_code >= 500:
                answer.raise_for_status()
            if not answer.is_success:
                raise _refused(answer)
            return msgspec.json.decode(answer.content, type=TokenAnswer).id_token

    def _auth_method(self, metadata: Metadata) -> str:
        """In the body where that is possible: providers differ in how Basic writes a secret's special characters."""
        if not self._secret:
            return "none"
        supported = metadata.token_endpoint_auth_methods_supported
        return "client_secret_post" if "client_secret_post" in supported else "client_secret_basic"

    async def _ask(self, method: str, url: str, headers: dict[str, str], body: str) -> httpx.Response:
        """Redirects are not followed: nothing is sent to an address that the discovery document does not name."""
        transport = _BoundedTransport(verify=self._tls, proxy=self.config.proxy or None)
        sent = {"accept": "application/json", **headers}
        async with (
            asyncio.timeout(ANSWER_S),
            httpx.AsyncClient(transport=transport, trust_env=False) as client,
        ):
            return await client.request(method, url, headers=sent, content=body)


class _BoundedTransport(httpx.AsyncHTTPTransport):
    """Reads no more than `ANSWER_BYTES_MAX` of an answer, and none that would have to be inflated."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "identity"
        response = await super().handle_async_request(request)
        if (coding := response.headers.get("content-encoding", "identity")) != "identity":
            await response.aclose()
            raise httpx.DecodingError(f"the answer is encoded as {coding[:40]!r}, which was not asked for")
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _BoundedStream(response.stream)
        return response


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                raise httpx.ReadError(f"the answer exceeds {ANSWER_BYTES_MAX} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextlib.contextmanager
def _answering(url: str) -> Iterator[None]:
    """What goes wrong with an answer from `url`, as LoginError."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise LoginError(503, AWAY, f"{url}: HTTP {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # TimeoutError, too
        raise LoginError(503, AWAY, f"{url}: {type(error).__name__}: {error}") from error
    except (ValueError, TypeError) as error:  # what should be JSON, of a certain shape
        raise LoginError(502, AWAY, f"{url}: the answer cannot be understood: {error}") from error


def _refused(answer: httpx.Response) -> LoginError:
    """By a token endpoint, with one of OAuth's error codes."""
    try:
        found = msgspec.json.decode(answer.content)
    except ValueError:
        found = None
    code = found.get("error") if isinstance(found, dict) else None
    told = (
        code[:40] if isinstance(code, str) and code.isascii() and code.isidentifier() else "no reason given"
    )
    return LoginError(
        502, REFUSED.format(code=told), f"the token endpoint: HTTP {answer.status_code}, {code!r:.300}"
    )


def _tls(settings: Oidc) -> ssl.SSLContext:
    if settings.ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:  # ssl.SSLError, too
        raise ConfigError(f"ca_file: cannot read authorities from {settings.ca_file}: {error}") from error
