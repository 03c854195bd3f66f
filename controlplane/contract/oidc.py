"""Settings of the dashboard's login with an OpenID Connect provider: `oidc.toml` in the run directory.

A file of its own, because it says who may operate the cluster and names a secret: only controllers read it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from controlplane.contract.auth import Role
from controlplane.contract.config import MAYBE_PATH, is_loopback
from controlplane.contract.errors import ConfigError
from controlplane.contract.ranges import Range, SettingsError, Text, check_bounds, parsed

FILE = "oidc.toml"  # in the run directory
CALLBACK = "/oidc/callback"
SECRET_BYTES_MAX = 4096
LIST_MAX = 100
PORTS = {"https": 443, "http": 80}
URL = Text(r"https?://[!-~]{1,500}", "https://HOST...")
MAYBE_PROXY = Text(r"(https?://[!-~]{1,500})?", "http://HOST:PORT, or nothing")
CLAIM = Text(r"[!-~]{1,256}", "the name of a claim, or a path to it such as realm_access.roles")
MAYBE_CLAIM = Text(r"[!-~]{0,256}", "the name of a claim, or nothing")
WORD = Text(r"[!-~]{1,256}", "1 to 256 printable characters without spaces")
VALUE = Text(r"[^\x00-\x1f\x7f]{1,256}", "1 to 256 characters of text")
PROVIDER = Text(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", "1 to 32 letters, digits, '_' and '-'")


class OidcRoles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values of the claim that give a role. The cluster's own role, admin, cannot be given."""

    viewer: tuple[Annotated[str, VALUE], ...] = ()
    operator: tuple[Annotated[str, VALUE], ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, "roles.")

    def best(self, values: frozenset[str]) -> Role | None:
        """The role that may do most of those that the values give; None: none of them gives one."""
        if values.intersection(self.operator):
            return Role.OPERATOR
        return Role.VIEWER if values.intersection(self.viewer) else None


class OidcConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issuer: Annotated[str, URL]  # as the provider writes it; its discovery document lies below
    client_id: Annotated[str, WORD]
    # Where the provider sends browsers back to, as it is registered there: https://HOST:PORT/oidc/callback of each
    # controller. The one of the address that a browser uses is chosen.
    redirect_urls: tuple[Annotated[str, URL], ...]
    provider: Annotated[str, PROVIDER] = "oidc"  # what the dashboard and the audit call it
    # A file (mode 0600), from this file's folder. Empty: none, for a client that is registered as public.
    client_secret_file: Annotated[str, MAYBE_PATH] = ""
    ca_file: Annotated[str, MAYBE_PATH] = ""  # authorities of the provider's certificate; "": the usual ones
    proxy: Annotated[str, MAYBE_PROXY] = ""  # through which the provider is reached
    scopes: tuple[Annotated[str, WORD], ...] = ("openid", "profile")
    roles_claim: Annotated[str, CLAIM] = "groups"  # of the ID token: a text, or a list of them
    roles: OidcRoles = OidcRoles()  # nobody gets anything
    name_claim: Annotated[str, MAYBE_CLAIM] = ""  # shown beside the subject, such as email
    session_s: Annotated[int, Range(60, 43_200)] = 3600  # how long one login is good

    def __post_init__(self) -> None:
        check_bounds(self)
        if fault := _fault(self):
            raise SettingsError(fault)

    def redirect_url(self, host: str) -> str | None:
        """Of the address that a browser used, as its Host says; None: the provider does not know that address."""
        try:
            asked = urlsplit(f"//{host}")
            name, given_port = asked.hostname, asked.port
        except ValueError:
            return None
        for url in self.redirect_urls:
            parts = urlsplit(url)
            port = PORTS[parts.scheme]
            if (name, given_port or port) == (parts.hostname, parts.port or port):
                return url
        return None


def _fault(config: OidcConfig) -> str | None:
    for name, urls in (("issuer", (config.issuer,)), ("redirect_urls", config.redirect_urls)):
        for url in urls:
            if fault := _url_fault(url):
                return f"{name} = {url!r}: {fault}"
    if not config.redirect_urls or len(config.redirect_urls) > LIST_MAX:
        return f"redirect_urls: 1 to {LIST_MAX} addresses, such as https://HOST:8100{CALLBACK}"
    for url in config.redirect_urls:
        if not (urlsplit(url).path == CALLBACK and url.endswith(CALLBACK)):
            return f"redirect_urls = {url!r}: it has to end with {CALLBACK}"
    if "openid" not in config.scopes or len(config.scopes) > LIST_MAX:
        return f"scopes = {config.scopes!r}: up to {LIST_MAX}, openid among them"
    if max(len(config.roles.viewer), len(config.roles.operator)) > LIST_MAX:
        return f"roles: at most {LIST_MAX} values for each"
    return None


def _url_fault(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # a port that cannot be is found here
    except ValueError as error:
        return str(error)
    if not host or parts.username is not None or parts.query or parts.fragment:
        return "a host and a path, without a user, a query and a fragment"
    return None if trusted(url) else "plain http is for loopback only: what is sent there could be read"


def trusted(url: str) -> bool:
    """Whether nobody on the way could read or change what is sent there: https, or this host."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))


@dataclass(frozen=True, slots=True)
class Oidc:
    config: OidcConfig
    ca_file: Path | None = None
    client_secret: str = field(default="", repr=False)  # "": a public client


def load_oidc(path: Path, required: bool = False) -> Oidc | None:
    """The settings and what they name; None: there is no such file, and it is not `required`.

    Raises ConfigError naming the file, the field and what to do.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read()
        config = msgspec.convert(parsed(raw), OidcConfig)
    except FileNotFoundError as error:
        if required:
            raise ConfigError(f"there is no {path}") from error
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if mode & 0o022:
        raise ConfigError(
            f"{path} says who may operate the cluster and others can write it: chmod go-w {path}"
        )
    ca = path.parent / config.ca_file if config.ca_file else None
    secret = _secret(path.parent / config.client_secret_file) if config.client_secret_file else ""
    return Oidc(config, ca, secret)


def _secret(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(SECRET_BYTES_MAX + 1)
        text = raw.decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"client_secret_file: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"client_secret_file: {path} has to be ASCII") from error
    if mode & 0o037:  # a group may read: Kubernetes gives a pod its secrets by a group
        raise ConfigError(f"client_secret_file: {path} is readable by others: chmod 600 {path}")
    if not text or len(raw) > SECRET_BYTES_MAX or not text.isprintable():
        raise ConfigError(f"client_secret_file: {path} has to hold one line of text")
    return text
