"""What etcd refuses, and why: alarms of its members, and the last write that was refused; in words for operators.

A refusal is a state of etcd, not an error of a process: it is reported and waited for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from controlplane.etcd.server import FIT, flaws_of
from controlplane.etcd.values import MemberStatus

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks at the members' alarms
LOOK_SOON_S = 1.0  # while there is trouble: its end is reported soon, too
REFUSAL_KEPT_S = 15.0  # a refusal that nobody repeats says nothing about now

NO_SPACE = (
    "etcd is out of space: streams go on, nothing can be changed or registered; `kfadmin etcd defrag` (or give it a "
    "larger --quota-backend-bytes, then `etcdctl alarm disarm`); see `kfadmin check quorum`"
)
CORRUPT = (
    "an etcd member has found its data corrupt: streams go on, nothing can be changed; remove that member, add it "
    "again with an empty data directory, then `etcdctl alarm disarm`; see `kfadmin check quorum`"
)


def alarms_of(members: Iterable[MemberStatus]) -> tuple[str, ...]:
    """The alarms that members report, in words, each once."""
    errors = [error for member in members for error in member.errors]
    found: dict[str, None] = {}
    for error in errors:
        if "NOSPACE" in error:
            found[NO_SPACE] = None
        elif "CORRUPT" in error:
            found[CORRUPT] = None
        elif "alarm" in error:
            found[f"etcd reports {error.strip()}"] = None
    return tuple(found)


def unfit_releases(versions: Iterable[str], members: int = 0) -> tuple[str, ...]:
    """Of these versions ("3.5.1") the releases that lose or corrupt data, in words, with what to do; each once.
    `members`: how many the cluster has; 0: not known."""
    found: dict[str, None] = {}
    for version in versions:
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        if numbers is None:
            continue
        major, minor, patch = map(int, numbers.groups())
        if flaws := flaws_of((major, minor, patch), members):
            what = "; ".join(f"{flaw.what} (etcd issue {flaw.issue})" for flaw in flaws)
            found[
                f"etcd {version} may corrupt or lose its data without a word: {what}: use it for trials only, and "
                f"upgrade to {FIT[major, minor]} or later (KF_ETCD_BIN names one to `kfadmin up`)"
            ] = None
    return tuple(found)


class Health:
    """Kept by one client: `troubles()` is what its processes tell in /readyz and in the cluster's status."""

    def __init__(self) -> None:
        self.refusals = 0
        self._refusal = ""
        self._refused_at = 0.0
        self._alarms: tuple[str, ...] = ()
        self._unfit: tuple[str, ...] = ()
        self._known = asyncio.Event()  # set to look at once

    def refused(self, what: str) -> None:
        """etcd refused a write."""
        self.refusals += 1
        self._refusal, self._refused_at = what, time.monotonic()
        self._known.set()

    def accepted(self) -> None:
        """etcd took a write."""
        if self._refusal:
            self._refusal = ""
            self._known.set()

    def troubles(self) -> tuple[str, ...]:
        """What is wrong with etcd beyond being away; empty: nothing that is known."""
        if self._alarms:
            return self._alarms
        if self._refusal and time.monotonic() - self._refused_at < REFUSAL_KEPT_S:
            return (f"etcd refuses writes: {self._refusal}",)
        return ()

    def warnings(self) -> tuple[str, ...]:
        """What may become wrong with it; nothing is yet."""
        return self._unfit

    async def follow(self, status: Callable[[], Awaitable[Sequence[MemberStatus]]]) -> None:
        """Until cancelled: look at the members' alarms, at once after a refusal, else every few seconds."""
        while True:
            members = await status()
            alarms = alarms_of(members)
            unfit = unfit_releases((member.version for member in members), len(members))
            for warning in unfit:
                if warning not in self._unfit:
                    log.warning(warning)
            self._unfit = unfit or (self._unfit if all(member.problem for member in members) else ())
            for alarm in alarms:
                if alarm not in self._alarms:
                    log.warning(alarm)
            if self._alarms and not alarms:
                log.warning("etcd has no alarm any more")
            self._alarms = alarms
            pause_s = (LOOK_SOON_S if alarms or self._refusal else LOOK_S) * random.uniform(0.8, 1.2)
            self._known.clear()
            timer = asyncio.get_running_loop().call_later(pause_s, self._known.set)
            await self._known.wait()
            timer.cancel()
            await asyncio.sleep(0.1)  # refusals come in bursts: one look for all
