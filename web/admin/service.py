"""What the admin API needs from the controller that it runs in. The control plane implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from controlplane.contract.events import Event
from controlplane.contract.records import Operation
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

    async def status(self) -> ClusterStatus:
        """The cluster as this controller sees it now. Waits for nobody, and lets others run where it is large."""

    async def metrics(self) -> bytes:
        """Prometheus text."""

    async def events(self, limit: int, after: int = 0) -> Sequence[tuple[int, Event]]:
        """History as (id, event), oldest first: the newest `limit` ones with an id above `after`."""

    async def operations(self) -> Sequence[Operation]:
        """Every operation that is known, oldest first."""

    async def quorum(self) -> Sequence[Check]:
        """Whether the cluster can be changed, and would still be after one more loss. Never Unavailable."""

    async def submit(self, request: OperationRequest) -> OperationAnswer:
        """Pre-flight, and unless it is a dry run or refused, begin.

        An id that is known already answers with that operation; one that was used for something else is
        refused.
        """

    async def cancel(self, operation_id: str) -> Operation | None:
        """Call an operation off; the operation as it is then, which may have ended before. None: unknown."""
