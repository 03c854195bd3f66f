"""The etcd of this machine, for those who start one member of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

from controlplane.contract.errors import ConfigError
from controlplane.etcd.health import unfit_releases
from controlplane.etcd.server import EtcdBinaryError, etcd_version, find_etcd_binary
from controlplane.kfadmin.output import progress


def installed_etcd(members: int) -> tuple[Path, tuple[int, int, int]]:
    """Its binary and its release, with a warning on stderr if that is known to lose or corrupt data of a cluster of so
    many members. Raises ConfigError."""
    try:
        binary = find_etcd_binary(os.environ)
        version = etcd_version(binary)
    except EtcdBinaryError as error:
        raise ConfigError(str(error)) from error
    for warning in unfit_releases([".".join(map(str, version))], members):
        progress(f"WARNING: {warning}")
    return binary, version
