"""The Secrets of a release, for `kubectl apply`: what `kfadmin host pack` is to hosts.

The operator's folder has certs/ with the authority (`kfadmin certs init`), secret and api-keys. Each role has a Secret
of its own, so that a gateway's pod has no node's key. Pods of one role share theirs: a StatefulSet has one template.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from controlplane.contract.api_keys import is_secret, read_keys, split_key
from controlplane.contract.auth import Role, create_secret, derive, mint
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import RELAY_NAME, ProcessName, ProcessRole
from controlplane.kfadmin.certs import FOLDER
from controlplane.kfadmin.keys import FILE as KEYS
from controlplane.kfadmin.pod.place import LETTERS
from controlplane.kfadmin.rundir import create_api_key

TOKENS_S = 365 * 86400
METRICS_KEY = "metrics-key"  # in the operator's folder: the scraper's, in the clear


@dataclass(frozen=True, slots=True)
class Release:
    """`counts`: processes of each role; more than there are at first leaves room to scale. `hosts`: other names that
    clients know gateways by."""

    name: str
    namespace: str
    counts: Mapping[ProcessRole, int]
    hosts: tuple[str, ...] = ()

    def processes(self, role: ProcessRole) -> list[ProcessName]:
        """Who is certified in the Secret of a role."""
        found = [ProcessName(role, f"{LETTERS[role]}{number}") for number in range(self.counts[role])]
        relay = [ProcessName(ProcessRole.RELAY, RELAY_NAME)] if role is ProcessRole.NODE else []
        return [*found, *relay]

    def names(self, process: ProcessName) -> list[str]:
        """DNS names that it is reached at for HTTPS and by etcd: as the chart names Services and pods."""
        role = process.role
        service = f"{self.name}-{role.value}"
        inside = f"{self.namespace}.svc"
        match role:
            case ProcessRole.GATEWAY:
                return [
                    service,
                    f"{service}.{self.namespace}",
                    f"{service}.{inside}",
                    "localhost",
                    *self.hosts,
                ]
            case ProcessRole.CONTROLLER | ProcessRole.ETCD:
                ordinal = process.name.removeprefix(LETTERS[role])
                pod = f"{service}-{ordinal}.{service}.{inside}"
                return [pod, f"{service}.{inside}", "localhost"]
            case _:
                return []


def secrets_of(
    folder: Path, release: Release, lifetime: timedelta, certificates: bool = True
) -> list[dict[str, Any]]:
    """Kubernetes Secrets, also of `certificates`: those that the folder lacks, or that are due, are issued.

    Raises ConfigError, OSError."""
    now = datetime.now(UTC)
    made = _certificates(folder, release, lifetime, now) if certificates else []
    secret = create_secret(folder / "secret")
    create_api_key(folder / "api-keys")
    expiry = int(now.timestamp()) + TOKENS_S
    admin = derive(secret, "admin")
    metrics, operator = (
        mint(admin, name, role, expiry).encode()
        for name, role in (("prometheus", Role.METRICS), ("autoscale", Role.OPERATOR))
    )
    keys = {
        name: (folder / name).read_bytes() for name in ("api-keys", "keys.json") if (folder / name).exists()
    }
    scraper = _scrapers_key(folder, keys["api-keys"], now)
    return [
        _secret(release, "credentials", {"secret": (folder / "secret").read_bytes()}),
        _secret(release, "api-keys", keys),
        _secret(release, "metrics", {"controllers": metrics, "gateways": scraper}),
        _secret(release, "operator", {"token": operator}),
        *made,
    ]


def _scrapers_key(folder: Path, operators: bytes, now: datetime) -> bytes:
    """Of gateways' /metrics: the key in `metrics-key`, which is good for nothing else; without that file the operators'
    first one, as gateways of older releases know no such key. Raises ConfigError, OSError."""
    path = folder / METRICS_KEY
    if not path.exists():
        first = next((line for line in operators.split() if not line.startswith(b"#")), None)
        if first is None:
            raise ConfigError(
                f"{folder / 'api-keys'} has no key: scrapers of the gateways need one; remove it for a new one"
            )
        return first
    text = path.read_text().strip()
    key_id, secret = split_key(text) or ("", "")
    known = [one for one in read_keys(folder / KEYS).keys if one.id == key_id and is_secret(one, secret)]
    if not any(one.metrics and one.state(now.timestamp()) == "active" for one in known):
        raise ConfigError(f"{path} is no key of `kfadmin keys create --metrics` that is good and in {KEYS}")
    return text.encode()


def _certificates(folder: Path, release: Release, lifetime: timedelta, now: datetime) -> list[dict[str, Any]]:
    """A Secret for each role. Raises ConfigError, OSError."""
    from controlplane.certs.folder import CertFolder  # not before it is needed: it imports cryptography

    certs = CertFolder(folder / FOLDER)
    certs.authority()  # raises ConfigError if there is none
    made = []
    for role, count in release.counts.items():
        if not count:
            continue
        files = {
            f"{process}.pem": certs.keep(process, release.names(process), now, lifetime).read_bytes()
            for process in release.processes(role)
        }
        made.append(_secret(release, f"{role.value}-certs", {"ca.pem": certs.ca.read_bytes(), **files}))
    return made


def _secret(release: Release, what: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{release.name}-{what}", "namespace": release.namespace},
        "type": "Opaque",
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }
