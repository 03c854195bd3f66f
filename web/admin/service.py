"""What the admin API needs from the controller that it runs in. The control plane implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from controlplane.contract.audit import AuditEntry
from controlplane.contract.auth import Caller
from controlplane.contract.config import ClusterConfig
from controlplane.contract.events import Event
from controlplane.contract.figures import Figures
from controlplane.contract.incidents import Incident
from controlplane.contract.lives import Lives
from controlplane.contract.protection import Protection
from controlplane.contract.records import Operation
from controlplane.contract.revocations import Revocation
from controlplane.contract.status import Check, ClusterStatus, OperationAnswer, OperationRequest


class AdminService(Protocol):
    """One controller, as the admin API sees it.

    Any controller answers, leader or not. Every method ends within a few seconds and raises
    `controlplane.contract.errors.Unavailable` when etcd or the history database is away.
    """

    @property
    def ready(self) -> bool:
        """Whether the controller has read the cluster's state at least once."""

    def troubles(self) -> Sequence[str]:
        """Why the cluster cannot be changed, or not wholly, and what to do; empty: all is well."""

    def is_revoked(self, ids: Sequence[str]) -> bool:
        """Whether one of these was taken back, at whichever controller. Raises Unavailable until the cluster's state
        has been read once."""

    async def revoke(self, wanted: Revocation, caller: Caller, *, audited: bool = False) -> None:
        """Take a session, a token or all that has one name back, here at once and elsewhere as soon as etcd tells;
        `audited`: it was somebody's decision about others."""

    async def status(self) -> ClusterStatus:
        """The cluster as this controller sees it now. Waits for nobody, and lets others run where it is large."""

    async def metrics(self) -> bytes:
        """Prometheus text."""

    async def events(self, limit: int, after: int = 0) -> Sequence[tuple[int, Event]]:
        """History as (id, event), oldest first: the newest `limit` ones with an id above `after`."""

    async def incidents(self, limit: int) -> Sequence[Incident]:
        """The newest failures of the history, oldest first."""

    async def protection(self) -> Protection:
        """What protects the KV of requests, and what the loss of each node would cost now."""

    async def lives(self, request: str) -> Lives:
        """What the gateways remember of a request; asking them takes seconds."""

    def figures_now(self, after_unix_s: float) -> Sequence[Figures]:
        """Rows of figures of the last hour that are later, oldest first, as this controller has measured them."""

    async def figures(self, since_unix_s: float, until_unix_s: float, rows_max: int) -> Sequence[Figures]:
        """Rows of that time from the history, oldest first; of more than `rows_max` only so many, spread evenly."""

    async def audit(self, limit: int, after: int = 0, operation: str = "") -> Sequence[AuditEntry]:
        """Who did what, oldest first: the newest `limit` entries with an id above `after`; of one operation, if one is
        named."""

    def settings(self) -> ClusterConfig:
        """What this controller runs with, without passwords."""

    async def operations(self) -> Sequence[Operation]:
        """Every operation that is known, oldest first."""

    async def quorum(self) -> Sequence[Check]:
        """Whether the cluster can be changed, and would still be after one more loss. Never Unavailable."""

    async def submit(self, request: OperationRequest, caller: Caller) -> OperationAnswer:
        """Pre-flight, and unless it is a dry run or refused, begin.

        `request.if_epoch` is compared as the operation is written. An id that is known already answers with that
        operation; one that was used for something else is refused.
        """

    async def cancel(self, operation_id: str, caller: Caller) -> Operation | None:
        """Call an operation off; the operation as it is then, which may have ended before. None: unknown."""
