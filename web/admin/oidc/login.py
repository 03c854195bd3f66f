"""One login, from the click to the session: its secrets, and who somebody is by the claims of the provider (pure).

Nothing is stored. A cookie holds the login's random seed and its end; state, nonce and PKCE verifier are functions of
the seed under the admin token. So a login goes on at any controller, and the verifier is never in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.contract.auth import Caller
from controlplane.contract.oidc import OidcConfig

LOGIN_COOKIE = "kevlarflow_login"
LOGIN_S = 600  # for somebody to show the provider a password and a second factor
WHO_CHARS_MAX = 200  # of a name in the audit
NAME_CHARS_MAX = 60  # of what is shown beside the subject


class LoginError(Exception):
    """A login that ends here. `status` and the text are for its page, `cause` is for the log."""

    def __init__(self, status: int, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Login:
    state: str
    nonce: str
    verifier: str  # of PKCE: 43 characters


def login_cookie(token: str, seed: str, now_unix_s: float) -> str:
    """`seed`: random, without dots. `token`: the admin token."""
    said = f"{int(now_unix_s) + LOGIN_S}.{seed}"
    return f"{said}.{_derived(token, 'cookie', said)}"


def login_of_cookie(value: str, token: str, now_unix_s: float) -> Login | None:
    """None: it was not made with `token`, or has expired."""
    said, _, signature = value.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _derived(token, "cookie", said).encode()):
        return None
    expiry, _, seed = said.partition(".")
    if int(expiry) <= now_unix_s:
        return None
    state, nonce, verifier = (_derived(token, purpose, seed) for purpose in ("state", "nonce", "verifier"))
    return Login(state, nonce, verifier)


def same_state(login: Login, given: str) -> bool:
    return hmac.compare_digest(login.state.encode(), given.encode())


def caller_of_claims(claims: Mapping[str, object], config: OidcConfig, now_unix_s: float) -> Caller:
    """Who it is, by claims that have been verified, for as long as a session may last. Raises LoginError."""
    subject = claims.get("sub")
    who = f"{config.provider}:{subject}"
    if (
        not isinstance(subject, str)
        or not subject
        or not who.isascii()
        or not who.isprintable()
        or len(who) > WHO_CHARS_MAX
    ):
        raise LoginError(
            502, "The provider's name for you cannot be written into the audit.", f"sub {subject!r:.300}"
        )
    role = config.roles.best(_texts(_claim(claims, config.roles_claim)))
    if role is None:
        raise LoginError(
            403,
            f"You are signed in at the provider as {subject}, and none of your groups or roles there gives you access"
            " to this cluster. Whoever operates it can change that in oidc.toml.",
            f"{who} has no role",
        )
    name = _claim(claims, config.name_claim) if config.name_claim else None
    if isinstance(name, str):
        shown = "".join(char for char in name if char.isprintable())[:NAME_CHARS_MAX]
        who = f"{who} ({shown})" if shown and len(who) + len(shown) + 3 <= WHO_CHARS_MAX else who
    return Caller(who, role, expiry_unix_s=int(now_unix_s) + config.session_s)


def _claim(claims: Mapping[str, object], name: str) -> object:
    """By its name, which may have dots (Auth0's are addresses), or else by a path of names."""
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _texts(value: object) -> frozenset[str]:
    if isinstance(value, str):
        return frozenset({value})
    return (
        frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()
    )


def _derived(token: str, purpose: str, text: str) -> str:
    digest = hmac.new(token.encode(), f"oidc/{purpose}/{text}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
