"""Which keys each kind of process may write (pure). Everybody may read all of the cluster's: they say who is where.

| process | writes, under /kevlarflow/SCOPE/ |
|---|---|
| controller | everything: topology, operations, revocations, who leads, names |
| node | nodes/ and waiting/nodes/ |
| gateway | gateways/ and waiting/gateways/ |
| relay | nothing |

etcd's members and kfadmin (`kfadmin etcd`) have etcd's own role `root`.
"""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.contract.keys import Keys
from controlplane.etcd.users import ROOT, Permission

COMMON_NAME_CHARS_MAX = 64  # of a certificate: see controlplane/certs/authority.py
FOLDERS = {ProcessRole.NODE: "nodes", ProcessRole.GATEWAY: "gateways"}
ROLES = {role: f"kf-{role.value}" for role in (*FOLDERS, ProcessRole.CONTROLLER, ProcessRole.RELAY)}
ANYWHERE = Permission("\0", prefix=False)  # of no key: what is asked for the store's revision


def user_of(process: ProcessName, cluster: str) -> str:
    """The common name of its certificate."""
    return process.dns(cluster)[:COMMON_NAME_CHARS_MAX]


def etcd_role(process: ProcessName) -> str:
    return ROLES.get(process.role, ROOT)


def permissions(role: ProcessRole, cluster: str, scopes: Iterable[str]) -> list[Permission]:
    """`scopes`: of the cluster's groups that there are (`ClusterConfig.scope`). Also those that come are a controller's
    own, since their keys begin alike."""
    every = [Keys(cluster).root, f"/kevlarflow/{cluster}@"]
    writes = role is ProcessRole.CONTROLLER
    found = [ANYWHERE, *(Permission(root, write=writes) for root in every)]
    if folder := FOLDERS.get(role):
        for scope in sorted(scopes):
            root = Keys(scope).root
            found += [Permission(f"{root}{place}{folder}/", write=True) for place in ("", "waiting/")]
    return found
