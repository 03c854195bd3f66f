"""Certificates for tests: a folder with an authority and what it has issued."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from controlplane.certs.folder import CertFolder
from controlplane.contract.config import TlsConfig
from controlplane.contract.identity import ProcessName, ProcessRole

CLUSTER = "test"


def folder(path: Path, *processes: tuple[ProcessRole, str], hosts: Sequence[str] = ()) -> CertFolder:
    """With a new authority, and certificates that live for a day."""
    made = CertFolder(path)
    now = datetime.now(UTC)
    made.create(CLUSTER, now)
    names = [ProcessName(role, name) for role, name in processes]
    made.issue(names, hosts, now, timedelta(days=1))
    return made


def settings(made: CertFolder, etcd: str = "") -> TlsConfig:
    return TlsConfig(ca=str(made.ca), cert=str(made.path / "{process}.pem"), etcd_name=etcd)
