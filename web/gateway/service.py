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

    def check_priority(self, priority: int | None, of_key: int | None = None) -> None:
        """`of_key`: how far the API key goes, if not as far as all. Raises ApiError 400: priorities decide who is
        preempted, so the operator says how far they go."""
        floor = max(self.priority_floor, self.priority_floor if of_key is None else of_key)
        if priority is not None and priority < floor:
            text = f"priority must be {floor} or more (lower runs first; gateway.priority_floor and the API key's)"
            raise ApiError(400, text, "priority")
