"""Hosts with certificates of their own: HTTPS, mutual TLS, etcd with three members and sealed links between them. One
is cut off while the authority is replaced, host by host; no stream notices."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest

from controlplane.etcd.server import EtcdBinaryError, find_etcd_binary
from tests.matrix.cells import CELLS
from tests.matrix.hosts import SPARE, HostCluster
from tests.matrix.namespaces import why_not
from tests.matrix.play import Player


def test_hosts_with_certificates_lose_no_token() -> None:
    try:
        find_etcd_binary(os.environ)
    except EtcdBinaryError as error:
        pytest.skip(str(error))
    if reason := why_not():
        pytest.skip(reason)
    cut = next(cell for cell in CELLS if cell.name == "cut-n1")
    with HostCluster(secure=True) as cluster:
        # Hosts have the new files one after the other, and reconnect when the cut is over with what they have.
        cluster.certs.change_authority(datetime.now(UTC))
        for name in cluster.servers[::2]:
            cluster.deliver(name)
        result = Player(cluster).play(cut)
        assert not result.problems, "\n".join([*result.problems, cluster.logs()])
        for name in (*cluster.servers, SPARE):
            cluster.deliver(name)
