"""What every route of one gateway shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from web.describe import package_version
from web.gateway.errors import ApiError, shorten
from web.gateway.metrics import Metrics
from web.gateway.model import Model
from web.gateway.request_memory import Memory
from web.gateway.resume.tickets import Tickets
from web.gateway.routing.dispatch import Dispatcher

KEEP_ALIVE_S = 5.0


@dataclass(slots=True)
class Service:
    model: Model
    dispatcher: Dispatcher
    metrics: Metrics
    started_unix_s: int
    etcd_age_s: Callable[[], float]
    tickets: Tickets
    keep_alive_s: float = KEEP_ALIVE_S
    memory: Memory = field(default_factory=Memory)
    priority_floor: int = 0  # the most urgent priority that clients may ask for; lower numbers run first
    request_chat_template: bool = False  # a chat may come with a template of its own
    prompt_tokens_details: bool = False  # the usage tells how much of a prompt was cached
    version: str = field(default_factory=package_version)
    troubles: Callable[[], Sequence[str]] = tuple  # what is wrong with etcd, beyond being away

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404. A request without a model means the one there is."""
        if name is not None and name != self.model.name:
            raise ApiError(404, f"the model {shorten(name)} does not exist", "model")

    def check_priority(self, priority: int | None) -> None:
        """Raises ApiError 400: priorities decide who is preempted, so the operator says how far they go."""
        if priority is not None and priority < self.priority_floor:
            text = (
                f"priority must be {self.priority_floor} or more (lower runs first; gateway.priority_floor)"
            )
            raise ApiError(400, text, "priority")
