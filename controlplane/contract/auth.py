"""The cluster secret and what is derived from it. One file, mode 0600, is all that processes share."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from enum import StrEnum
from pathlib import Path

import msgspec

from controlplane.contract.errors import ConfigError
from controlplane.contract.files import is_blank, replace_file
from controlplane.contract.revocations import name_id, token_id


def load_secret(path: Path) -> bytes:
    """The cluster secret. Raises ConfigError when the file is missing, empty or readable by others."""
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the cluster secret {path}: {error.strerror}; `kfadmin up` makes one"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"the cluster secret {path} is readable by others: chmod 600 {path}")
    if len(secret) < 32 or not secret.strip(b"\0"):
        raise ConfigError(f"the cluster secret {path} is shorter than 32 characters: make a new one")
    return secret


def create_secret(path: Path) -> bytes:
    """Write a new secret with mode 0600, unless there is one, and return it. An empty file is none."""
    if is_blank(path):
        replace_file(path, secrets.token_hex(32).encode() + b"\n")
    return load_secret(path)


def derive(secret: bytes, purpose: str) -> str:
    """A token for one purpose ("grpc", "admin"), so that one leaked token does not open the rest."""
    return hmac.new(secret, f"kevlarflow/{purpose}".encode(), hashlib.sha256).hexdigest()


def bearer_matches(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries `token`; compared in constant time."""
    if header is None or not header.startswith("Bearer "):
        return False
    return hmac.compare_digest(header.removeprefix("Bearer ").encode(), token.encode())


# -- tokens with a name, a role and an expiry -----------------------------------------------------------------


class Role(StrEnum):
    """Each may do what those before it may."""

    METRICS = "metrics"  # read /metrics
    VIEWER = "viewer"  # read the cluster
    OPERATOR = "operator"  # change it, read its audit and settings
    ADMIN = "admin"  # the cluster's own token, which also makes others; never minted

    def includes(self, other: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    name: str
    role: Role
    address: str = ""  # host that the request came from
    expiry_unix_s: int = 0  # of the token; 0: it has none
    # Of the session, and of the token; none: the cluster's own token, which is not revoked.
    ids: tuple[str, ...] = ()

    @property
    def revoked_by(self) -> tuple[str, ...]:
        """Ids of the revocations each of which would end what this one may do."""
        return (*self.ids, name_id(self.name))


ADMIN_CALLER = Caller("admin", Role.ADMIN)
MINTED = frozenset({Role.METRICS, Role.VIEWER, Role.OPERATOR})
TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,62}")
TOKEN_CHARS_MAX = 256
TOKEN_S_MAX = 366 * 86400  # of one that is minted


def mint(admin_token: str, name: str, role: Role, expiry_unix_s: int) -> str:
    """A token that every controller knows by its signature: "kf.ROLE.NAME.EXPIRY.HMAC". Nothing is stored unless it is
    revoked (`contract/revocations.py`). Raises ConfigError."""
    if role not in MINTED:
        raise ConfigError(f"role {role.value!r} is not given away: one of {', '.join(sorted(MINTED))}")
    if not TOKEN_NAME.fullmatch(name) or name == ADMIN_CALLER.name:
        raise ConfigError(
            f"{name!r} is no name for a token: up to 63 letters, digits, '_', '-' and '@', and not 'admin'"
        )
    said = f"kf.{role.value}.{name}.{expiry_unix_s}"
    return f"{said}.{_signature(admin_token, said)}"


def identify(token: str, admin_token: str, now_unix_s: float) -> Caller | None:
    """Whose token it is; None: nobody's, or it has expired. Whether it was revoked is not looked at. Signatures are
    compared in constant time."""
    if hmac.compare_digest(token.encode(), admin_token.encode()):
        return ADMIN_CALLER
    if len(token) > TOKEN_CHARS_MAX:
        return None
    said, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(admin_token, said).encode()):
        return None
    parts = said.split(".")
    if len(parts) != 4 or parts[0] != "kf" or parts[1] not in MINTED:
        return None
    expiry = int(parts[3])
    if expiry <= now_unix_s:
        return None
    return Caller(parts[2], Role(parts[1]), expiry_unix_s=expiry, ids=(token_id(token),))


def identify_bearer(header: str | None, admin_token: str, now_unix_s: float) -> Caller | None:
    """As `identify`, of an Authorization header, whose scheme has no case."""
    scheme, _, token = (header or "").partition(" ")
    return identify(token.lstrip(" "), admin_token, now_unix_s) if scheme.lower() == "bearer" else None


def _signature(admin_token: str, said: str) -> str:
    return hmac.new(admin_token.encode(), f"token/{said}".encode(), hashlib.sha256).hexdigest()
