"""The cluster secret and what is derived from it. One file, mode 0600, is all that processes share."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from controlplane.contract.errors import ConfigError


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
    if len(secret) < 32:
        raise ConfigError(f"the cluster secret {path} is shorter than 32 characters: make a new one")
    return secret


def create_secret(path: Path) -> bytes:
    """Write a new secret with mode 0600, unless there is one, and return it."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    return load_secret(path)


def derive(secret: bytes, purpose: str) -> str:
    """A token for one purpose ("grpc", "admin"), so that one leaked token does not open the rest."""
    return hmac.new(secret, f"kevlarflow/{purpose}".encode(), hashlib.sha256).hexdigest()


def bearer_matches(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries `token`; compared in constant time."""
    if header is None or not header.startswith("Bearer "):
        return False
    return hmac.compare_digest(header.removeprefix("Bearer ").encode(), token.encode())
