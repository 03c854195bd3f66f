"""Certificates of a cluster on this machine: made at each start, and anew while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from controlplane.contract.config import ClusterConfig, TlsConfig, is_unspecified
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import ProcessName, etcd_name
from controlplane.etcd.server import ServerTls

if TYPE_CHECKING:
    from controlplane.certs.folder import CertFolder

PROBE_S = 1.0


def _opened(path: Path) -> CertFolder:
    # Not before it is needed: every verb of kfadmin imports this, and cryptography takes as long as all the rest.
    from controlplane.certs.folder import CertFolder

    return CertFolder(path)


def certify(path: Path, config: ClusterConfig, processes: Iterable[ProcessName]) -> TlsConfig:
    """Fresh certificates for all of these, of the folder's authority, which is made if there is none; settings that
    name them. Raises ConfigError, OSError."""
    folder, now = _opened(path), datetime.now(UTC)
    if not folder.exists:
        folder.create(config.cluster, now)
    if (cluster := folder.authority().cluster) != config.cluster:
        raise ConfigError(
            f"the authority in {folder.path} is that of the cluster {cluster}, and cluster = {config.cluster!r}"
        )
    hosts = dict.fromkeys(("127.0.0.1", "::1", "localhost", config.host, config.advertised))
    folder.issue(list(processes), [host for host in hosts if not is_unspecified(host)], now)
    return TlsConfig(
        ca=str(folder.ca), cert=str(folder.path / "{process}.pem"), etcd_name=etcd_name(config.cluster)
    )


def renew(path: Path) -> list[str]:
    """New certificates for those in the folder that have lived for half of their time; whose. Raises ConfigError,
    OSError."""
    return _opened(path).renew(datetime.now(UTC), only_due=True)


def etcd_tls(config: ClusterConfig, member: ProcessName) -> ServerTls | None:
    """What a member of the cluster's own etcd is started with."""
    if not config.tls.enabled:
        return None
    ca, cert, key = (Path(path) for path in config.tls.paths(str(member)))
    return ServerTls(ca, cert, key)


def etcd_healthy(address: str, tls: ServerTls | None) -> bool:
    """Whether the member at "host:port" answers and knows a leader. `tls`: its own, which makes us a client."""
    try:
        verify = False if tls is None else _as_client(tls)
        url = f"{'http' if tls is None else 'https'}://{address}/health"
        return httpx.get(url, timeout=PROBE_S, trust_env=False, verify=verify).status_code == 200
    except (httpx.TransportError, OSError):
        return False


def _as_client(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nothing is told to it, and its certificate may name no address
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    return context
