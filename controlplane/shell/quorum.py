"""Whether the cluster can be changed: etcd's members, one by one, and who may lead."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.contract.status import Check, ClusterStatus
from controlplane.etcd.health import alarms_of, unfit_releases
from controlplane.etcd.values import MemberStatus

SILENT_S = 3.0  # etcd says something every second


def quorum(
    members: Sequence[MemberStatus],
    status: ClusterStatus,
    refused: Sequence[str] = (),
    unread: Sequence[str] = (),
) -> list[Check]:
    """Checks for people. `members`: what each of etcd's said of itself just now; `refused`: what etcd refuses, and
    `unread`: what there is in it that this code cannot read or must not rewrite, in words."""
    sick = [m.endpoint for m in members if m.problem or m.errors or not m.leader_id]
    # What this controller saw etcd refuse says more than an alarm: rights, limits, a disk that fails.
    refusals = dict.fromkeys((*alarms_of(members), *refused))
    return [
        _members(len(members), sick),
        *(Check("fail", "refused", text) for text in refusals),
        *(Check("warn", "values", text) for text in unread),
        *(
            Check("warn", "release", text)
            for text in unfit_releases((m.version for m in members), len(members))
        ),
        _heard(status),
        _leader(status),
    ]


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
