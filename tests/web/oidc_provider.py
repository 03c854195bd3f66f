"""An OpenID Connect provider over real HTTP: RS256 keys that can be rotated, PKCE, codes that are good once.

Tokens are signed by `cryptography` alone, so that what verifies them is not tested by itself.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

CLIENT_ID = "kevlarflow"
CLIENT_SECRET = "the client's own secret"
PLAIN_PAGE = "<!doctype html><title>Provider</title><h1>Provider</h1><a href='{url}'>Continue as alice</a>"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@dataclass
class SigningKey:
    kid: str = field(default_factory=lambda: secrets.token_hex(4))
    private: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))

    def jwk(self) -> dict[str, str]:
        public = self.private.public_key().public_numbers()
        return {
            "kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid, "n": number(public.n), "e": number(public.e),
        }  # fmt: skip

    def sign(self, claims: dict[str, Any], **header: str) -> str:
        parts = [{"alg": "RS256", "typ": "JWT", "kid": self.kid, **header}, claims]
        said = ".".join(b64(json.dumps(part).encode()) for part in parts)
        return f"{said}.{b64(self.private.sign(said.encode(), padding.PKCS1v15(), SHA256()))}"


@dataclass
class Asked:
    """What a browser has brought to the authorization endpoint."""

    nonce: str
    challenge: str
    redirect_uri: str


class LocalProvider:
    """`claims` replaces claims of the tokens, or leaves those out that are None."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset(SigningKey())

    def reset(self, key: SigningKey) -> None:
        self.keys = [key]  # in the JWKS document; the last one signs
        self.signs: SigningKey | None = None  # in place of it
        self.claims: dict[str, Any] = {}
        self.header: dict[str, str] = {}
        self.metadata: dict[str, Any] = {}  # replaces what the discovery document says
        self.broken: dict[str, tuple[int, bytes]] = {}  # answers by path in place of the right ones
        self.token_requests: list[dict[str, str]] = []
        self.asked_for: list[str] = []  # paths
        self.codes: dict[str, Asked] = {}

    def document(self) -> dict[str, Any]:
        return {
            "issuer": self.url, "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token", "jwks_uri": f"{self.url}/jwks",
            "response_types_supported": ["code"], **self.metadata,
        }  # fmt: skip

    def authorize(self, query: dict[str, str]) -> str:
        """Where the browser goes on to, with a code of somebody who has shown a password."""
        assert query["response_type"] == "code"
        assert query["client_id"] == CLIENT_ID
        assert query["code_challenge_method"] == "S256"
        assert "openid" in query["scope"].split()
        code = secrets.token_urlsafe(16)
        self.codes[code] = Asked(query["nonce"], query["code_challenge"], query["redirect_uri"])
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def token(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        self.token_requests.append(form)
        basic = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        if "client_secret_post" in self.metadata.get("token_endpoint_auth_methods_supported", []):
            known = (form.get("client_id"), form.get("client_secret")) == (CLIENT_ID, CLIENT_SECRET)
        else:
            known = authorization == f"Basic {basic}"
        if not known:
            return 401, {"error": "invalid_client"}
        asked = self.codes.pop(form.get("code", ""), None)
        proof = b64(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if asked is None or proof != asked.challenge or form.get("redirect_uri") != asked.redirect_uri:
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": CLIENT_ID, "sub": "alice", "iat": now, "exp": now + 300, "nonce": asked.nonce,
            "groups": ["everybody", "kf-operators"], **self.claims,
        }  # fmt: skip
        said = {name: value for name, value in claims.items() if value is not None}
        signed = (self.signs or self.keys[-1]).sign(said, **self.header)
        return 200, {"access_token": "opaque", "token_type": "Bearer", "expires_in": 300, "id_token": signed}


class Handler(BaseHTTPRequestHandler):
    provider: LocalProvider

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.provider.asked_for.append(parts.path)
        if self._is_broken(parts.path):
            return
        match parts.path:
            case "/.well-known/openid-configuration":
                self._json(200, self.provider.document())
            case "/jwks":
                self._json(200, {"keys": [key.jwk() for key in self.provider.keys]})
            case "/authorize":
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                url = self.provider.authorize(query)
                self._send(200, PLAIN_PAGE.format(url=url.replace("&", "&amp;")).encode(), "text/html")
            case _:
                self._json(404, {})

    def do_POST(self) -> None:
        if self._is_broken(self.path):
            return
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        form = {name: values[0] for name, values in parse_qs(body).items()}
        self._json(*self.provider.token(form, self.headers.get("authorization", "")))

    def _is_broken(self, path: str) -> bool:
        if path in self.provider.broken:
            status, body = self.provider.broken[path]
            self._send(status, body, "application/json")
        return path in self.provider.broken

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client need not read all of an answer that is too long
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def provider(host: str = "127.0.0.1") -> Iterator[LocalProvider]:
    """`host`: as its addresses name it; "localhost" is another site than 127.0.0.1 to a browser."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = LocalProvider(f"http://{host}:{server.server_port}")
    server.RequestHandlerClass = type("Bound", (Handler,), {"provider": served})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
