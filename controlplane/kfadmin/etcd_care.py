"""`kfadmin etcd`: the members of the cluster's etcd: how they are, defragmentation, snapshots, and back from one.

All but `restore` speak with etcd itself, with the certificate of this host (`kfadmin host join`, `kfadmin up`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from controlplane.contract.errors import ConfigError, KevlarFlowError, Unavailable
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdCompacted, EtcdError
from controlplane.etcd.health import alarms_of, unfit_releases
from controlplane.etcd.server import EtcdBinaryError, etcd_version, find_etcd_binary, find_etcd_tool
from controlplane.etcd.values import MemberStatus
from controlplane.keyspace.connect import etcd_client
from controlplane.kfadmin.client import Refused
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.hosts import HostDirOption, host_run_dir
from controlplane.kfadmin.join import PLAN, read_plan
from controlplane.kfadmin.output import BAD, WARN, console, progress, table
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.target import RunDirOption, find_run_dir

QUOTA_BYTES = 2 << 30  # etcd's own, if nobody gave it another one
QUOTA_WARN_SHARE = 0.75
HEALTHY_LIMIT_S = 60.0
POLL_S = 0.2
TOOL_LIMIT_S = 600.0
MIB = 1 << 20

app = typer.Typer(no_args_is_help=True, help="The members of the cluster's etcd.")


def own_name(local: RunDir) -> ProcessName:
    """Whose certificate kfadmin shows etcd on this host."""
    if (local.path / PLAN).exists():
        return ProcessName(ProcessRole.ADMIN, read_plan(local).name)
    # Of `kfadmin up`; a member's certificate is a client's, too.
    return ProcessName(ProcessRole.ETCD, "etcd0")


@contextlib.asynccontextmanager
async def client_of(local: RunDir) -> AsyncIterator[EtcdClient]:
    """Raises ConfigError, Unavailable for what etcd says."""
    config = local.config()
    try:
        async with etcd_client(config, Identity(config.tls, config.cluster, own_name(local))) as client:
            yield client
    except EtcdError as error:
        raise Unavailable(f"etcd: {error}") from error


# ---- looking


def troubles_of(members: Sequence[MemberStatus]) -> list[str]:
    """What an operator has to do something about, in words."""
    found = [f"{member.endpoint}: {member.problem}" for member in members if member.problem]
    found += alarms_of(members)
    found += unfit_releases((member.version for member in members), len(members))
    found += [f"{m.endpoint} knows no leader" for m in members if not m.problem and not m.leader_id]
    for member in members:
        if member.db_size_bytes >= QUOTA_WARN_SHARE * QUOTA_BYTES:
            found.append(
                f"{member.endpoint} has {member.db_size_bytes // MIB:,} MiB, and etcd's own quota is"
                f" {QUOTA_BYTES // MIB:,} MiB: `kfadmin etcd defrag` (or a larger --quota-backend-bytes)"
            )
    return found


@app.command()
def status(run_dir: RunDirOption = None, output: OutputOption = Output.TABLE) -> None:
    """Each member: who leads, how large its file is and how much of that is used, alarms."""
    members = asyncio.run(_members(find_run_dir(run_dir)))
    troubles = troubles_of(members)

    def draw(_wide: bool) -> None:
        rows = table("MEMBER", "VERSION", "ROLE", "FILE", "USED", "APPLIED", "ANSWERS IN")
        for one in members:
            role = (
                "-"
                if one.problem
                else "leader"
                if one.is_leader
                else "learner"
                if one.is_learner
                else "follower"
            )
            sizes = (f"{one.db_size_bytes / MIB:.1f} MiB", f"{one.db_in_use_bytes / MIB:.1f} MiB")
            answer = Text("away", BAD) if one.problem else f"{one.latency_s * 1000:.0f} ms"
            rows.add_row(one.endpoint, one.version or "-", role, *sizes, str(one.raft_applied_index), answer)
        console().print(rows)
        for trouble in troubles:
            console().print(Text(trouble, WARN))

    view = View({"members": members, "troubles": troubles}, draw, members, [one.endpoint for one in members])
    show(view, output)


async def _members(local: RunDir) -> tuple[MemberStatus, ...]:
    async with client_of(local) as client:
        return await client.status()


# ---- giving space back


def refusal(members: Sequence[MemberStatus]) -> str:
    """Why no member may be kept from answering now; "": one after the other may."""
    if away := [member.endpoint for member in members if member.problem or not member.leader_id]:
        return f"not healthy: {', '.join(away)}; the others could lose their quorum meanwhile"
    if len({member.leader_id for member in members}) > 1:
        return "members do not agree on who leads: try again in a moment"
    corrupt = [member.endpoint for member in members if any("CORRUPT" in error for error in member.errors)]
    return f"{corrupt[0]} has an alarm: its data are corrupt, see `kfadmin check quorum`" if corrupt else ""


def in_order(members: Sequence[MemberStatus]) -> list[str]:
    """Who is defragmented when: the leader last, as it hands over when it is silent for too long."""
    return [member.endpoint for member in sorted(members, key=lambda member: member.is_leader)]


@app.command()
def defrag(
    run_dir: RunDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Forget old revisions, and give the space back, member by member; then end NOSPACE alarms.

    A member answers nothing while it rewrites its file, so each has to be healthy before the next begins, and nothing
    is done while one is not. Streams do not notice; with one member reconfiguration waits."""
    asyncio.run(_defrag(find_run_dir(run_dir), dry_run))


async def _defrag(local: RunDir, dry_run: bool) -> None:
    async with client_of(local) as client:
        members = await client.status()
        if why := refusal(members):
            raise Refused(why)
        before = {member.endpoint: member.db_size_bytes for member in members}
        full = any("NOSPACE" in error for member in members for error in member.errors)
        if dry_run:
            progress(
                f"compact, then defragment {', '.join(in_order(members))}"
                + ("; end the alarm" if full else "")
            )
            return
        with contextlib.suppress(EtcdCompacted):  # somebody else has just done it
            await client.compact(await client.revision())
        for member in in_order(members):
            await client.maintenance.defragment(member)
            after = await _healthy_again(client, member)
            print(f"{member}: {before[member] / MIB:.1f} MiB -> {after.db_size_bytes / MIB:.1f} MiB")
        if full:
            await client.maintenance.disarm(in_order(members)[0])
            print("the NOSPACE alarm is ended")


async def _healthy_again(client: EtcdClient, member: str) -> MemberStatus:
    """Raises Refused: the rest is left as it is."""
    deadline = time.monotonic() + HEALTHY_LIMIT_S
    while True:
        members = await client.status()
        if not (why := refusal(members)):
            return next(one for one in members if one.endpoint == member)
        if time.monotonic() > deadline:
            raise Refused(f"after {member}: {why}; the rest was left as it was")
        await asyncio.sleep(POLL_S)


# ---- snapshots


@app.command()
def snapshot(
    file: Annotated[
        Path, typer.Argument(help="Where to write it (mode 0600); never in place of another one.")
    ],
    run_dir: RunDirOption = None,
) -> None:
    """All that etcd has, as `kfadmin etcd restore` and etcd's own tools read it."""
    if file.exists():
        raise Refused(f"{file} is there already")
    size = asyncio.run(_snapshot(find_run_dir(run_dir), file))
    print(f"{file}: {size / MIB:.1f} MiB")


async def _snapshot(local: RunDir, file: Path) -> int:
    async with client_of(local) as client:
        members = [member for member in await client.status() if not member.problem and member.leader_id]
        if not members:
            raise Unavailable("no member of etcd is healthy")
        newest = max(members, key=lambda member: member.raft_applied_index)
        return await client.maintenance.snapshot(newest.endpoint, file)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A snapshot; the same one on every host that has a member.")],
    run_dir: HostDirOption = None,
) -> None:
    """Make this host's member anew from a snapshot. Only if etcd is lost: stop every member, restore each, start all.

    Nodes, gateways and controllers may go on meanwhile. What nodes did after the snapshot counts: epochs go on from the
    newest that one of them has seen, and who serves is what a controller or a node remembers. Operations and
    cordons are those of the snapshot. The data before stay beside the new ones."""
    local = host_run_dir(run_dir)
    host = read_plan(local)
    if not host.etcd:
        raise Refused(f"{host.name} has no member of etcd")
    if not file.is_file():
        raise ConfigError(f"there is no {file}")
    data = local.path / "etcd" / host.name
    config = local.config()
    if _runs(data):
        raise Refused("the member runs: systemctl stop kevlarflow-etcd, on every host that has one")
    try:
        binary = find_etcd_binary(os.environ)
        tool = find_etcd_tool(binary, etcd_version(binary), os.environ)
    except EtcdBinaryError as error:
        raise ConfigError(str(error)) from error
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    fresh = data.with_name(f".{data.name}.restored")
    shutil.rmtree(fresh, ignore_errors=True)
    scheme = "https" if config.tls.enabled else "http"
    peers = {
        name: f"{scheme}://{address}:{host.etcd_peer_port}" for name, address in host.etcd_bracketed().items()
    }
    command = [
        *tool, "snapshot", "restore", str(file),
        f"--data-dir={fresh}", f"--name={host.name}", f"--initial-advertise-peer-urls={peers[host.name]}",
        f"--initial-cluster={','.join(f'{name}={url}' for name, url in peers.items())}",
        f"--initial-cluster-token={host.cluster}-{digest[:16]}",  # no member of before may join
    ]  # fmt: skip
    env = {**os.environ, "ETCDCTL_API": "3"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=TOOL_LIMIT_S)
    if done.returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        raise KevlarFlowError(
            f"{tool[0]} could not restore {file}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    if data.exists():
        kept = data.with_name(f"{data.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        data.rename(kept)
        progress(f"what was there before: {kept}")
    owner = local.path.stat()
    for path in (fresh, *fresh.rglob("*")):
        if os.geteuid() == 0:
            os.chown(path, owner.st_uid, owner.st_gid)
    fresh.rename(data)
    print(f"{data} is that of {file}; start all members when every host has restored its own")


def _runs(data: Path) -> bool:
    """Whether some process has this data directory's file open."""
    database = os.path.realpath(data / "member" / "snap" / "db")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # of a process that ended, or of somebody else
            if os.readlink(link) == database:
                return True
    return False
