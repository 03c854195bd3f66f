"""Whether the cluster can be changed: etcd's members, one by one, and who may lead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from controlplane.contract.status import Check, ClusterStatus

PROBE_S = 1.0
SILENT_S = 3.0  # etcd says something every second


async def quorum(etcd: Sequence[str], status: ClusterStatus) -> list[Check]:
    """Checks for people. `etcd`: "host:port" of every member. Ends within about `PROBE_S`."""
    async with httpx.AsyncClient(timeout=PROBE_S, trust_env=False) as client:
        well = await asyncio.gather(*(_healthy(client, address) for address in etcd))
    sick = [address for address, fine in zip(etcd, well, strict=True) if not fine]
    return [_members(len(etcd), sick), _heard(status), _leader(status)]


async def _healthy(client: httpx.AsyncClient, address: str) -> bool:
    """Whether the member answers and knows a leader."""
    try:
        return (await client.get(f"http://{address}/health")).status_code == 200
    except httpx.TransportError:
        return False


def _members(count: int, sick: Sequence[str]) -> Check:
    needed, well = count // 2 + 1, count - len(sick)
    said = f"{well} of {count} etcd members are healthy"
    if sick:
        said += f" (not {', '.join(sick)})"
    if well < needed:
        return Check("fail", "etcd", f"{said}, {needed} are needed: streams go on, nothing can be changed")
    if well == needed:
        return Check("warn", "etcd", f"{said}: with one less nothing could be changed")
    return Check("ok", "etcd", f"{said}, {needed} are needed")


def _heard(status: ClusterStatus) -> Check:
    level = "ok" if status.etcd_age_s < SILENT_S else "fail"
    return Check(level, "watch", f"{status.answered_by} heard etcd {status.etcd_age_s:.1f} s ago")


def _leader(status: ClusterStatus) -> Check:
    if not status.leader:
        return Check("fail", "leader", "no controller leads: nothing is repaired")
    if len(status.controllers) < 2:
        return Check("warn", "leader", f"{status.leader} leads, and nobody could take over")
    return Check("ok", "leader", f"{status.leader} leads, {len(status.controllers) - 1} more could")
