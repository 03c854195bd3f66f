"""The etcd client of a process, as the settings say: plain, or with the process's certificate."""

from __future__ import annotations

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Identity
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.endpoints import EtcdTls


def etcd_client(config: ClusterConfig, identity: Identity) -> EtcdClient:
    """Raises ConfigError."""
    if not config.etcd:
        raise ConfigError("etcd = []: the settings name no member of etcd, HOST:2379")
    if not identity.secure:
        return EtcdClient(config.etcd)
    files = identity.files
    tls = EtcdTls(files.ca, files.cert, files.key, config.tls.etcd_name)
    return EtcdClient(config.etcd, tls=tls)
