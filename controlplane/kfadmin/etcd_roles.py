"""`kfadmin etcd roles`: a user of etcd for each process, and what its kind may write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated

import typer

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import RELAY_NAME, ProcessName, ProcessRole
from controlplane.contract.keys import Keys
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.users import ROOT
from controlplane.keyspace.permissions import ROLES, etcd_role, permissions, user_of
from controlplane.kfadmin import etcd_care
from controlplane.kfadmin.client import Refused
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.target import RunDirOption, find_run_dir

LETTERS = {ProcessRole.NODE: "n", ProcessRole.GATEWAY: "g", ProcessRole.CONTROLLER: "c"}
FOLDERS = {"nodes": ProcessRole.NODE, "gateways": ProcessRole.GATEWAY, "controllers": ProcessRole.CONTROLLER}
CONTROLLERS, GATEWAYS, MEMBERS = 8, 16, 8  # c0 to c7 and so on: as many as there may be without asking again


def roles(
    nodes: Annotated[int, typer.Option(min=1, help="n0 and so on: as many as there may ever be.")] = 256,
    admin: Annotated[
        list[str] | None, typer.Option(help="Other hosts from which `kfadmin etcd` is used (their names).")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Every certificate opens all keys again.")] = False,
    run_dir: RunDirOption = None,
) -> None:
    """Let each process write its own keys in etcd, and no others: nodes and gateways no topology and no operation.

    A process is known to etcd by the name in its certificate, so nothing is restarted. Again after a name was added
    that is neither there now nor n0, c0, g0 and so on, or another group. Not for an etcd that has others' keys.
    """
    asyncio.run(_set(find_run_dir(run_dir), nodes, admin or [], undo))


async def _set(local: RunDir, nodes: int, admins: list[str], undo: bool) -> None:
    config, me = local.config(), etcd_care.own_name(local)
    if not config.tls.enabled:
        raise ConfigError("etcd knows processes by their certificates, and this cluster has none")
    async with etcd_care.client_of(local) as client:
        if undo:
            await client.users.disable()
            progress("every certificate of the cluster opens all of etcd again")
            return
        found = await _registered(client, config)
        processes = dict.fromkeys(
            (me, *_coming(nodes), *(ProcessName(ProcessRole.ADMIN, one) for one in admins))
        )
        processes.update(dict.fromkeys(process for process, _ in found))
        scopes = {config.scope, *(scope for _, scope in found)}
        await _give(client, config.cluster, processes, scopes)
        await client.users.enable()
    progress(f"etcd knows {len(processes)} processes; each kind writes its own keys alone")


def _coming(nodes: int) -> list[ProcessName]:
    counts = {ProcessRole.NODE: nodes, ProcessRole.GATEWAY: GATEWAYS, ProcessRole.CONTROLLER: CONTROLLERS}
    found = [ProcessName(role, f"{LETTERS[role]}{i}") for role, count in counts.items() for i in range(count)]
    found += [ProcessName(ProcessRole.ETCD, f"etcd{i}") for i in range(MEMBERS)]
    return [*found, ProcessName(ProcessRole.RELAY, RELAY_NAME)]


async def _registered(client: EtcdClient, config: ClusterConfig) -> list[tuple[ProcessName, str]]:
    """Who is registered in a group of the cluster, and in which scope. Raises Refused if others have keys there."""
    found = []
    for key in (await client.get_prefix("")).items:
        top, scope, folder, name = (*key.split("/", 4)[1:], "", "", "", "")[:4]
        if top != "kevlarflow" or scope.partition("@")[0] != config.cluster:
            raise Refused(f"this etcd has others' keys, such as {key!r}, which nobody could reach any more")
        if folder in FOLDERS and key.startswith(Keys(scope).root):
            found.append((ProcessName(FOLDERS[folder], name), scope))
    return found


async def _give(
    client: EtcdClient, cluster: str, processes: Iterable[ProcessName], scopes: Iterable[str]
) -> None:
    etcd = client.users
    there = await etcd.roles()
    for role, name in ROLES.items():
        if name not in there:
            await etcd.add_role(name)
        await etcd.grant(name, permissions(role, cluster, scopes))
    if ROOT not in there:
        await etcd.add_role(ROOT)
    known = await etcd.users()
    wanted = {ROOT: ROOT, **{user_of(one, cluster): etcd_role(one) for one in processes}}
    for user, given in wanted.items():
        if user not in known:
            await etcd.add_user(user, given)
        else:  # it was added, and then the connection broke
            await etcd.give(user, given)
