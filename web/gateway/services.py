"""The models that one gateway serves: each is a group's, with a service of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from controlplane.contract.errors import ConfigError
from controlplane.contract.lives import Life
from controlplane.unreadable import UNREADABLE
from web.gateway.errors import ApiError, shorten
from web.gateway.service import Service


class _Named(msgspec.Struct):
    """What a body says of its model."""

    model: Any = None


_body = msgspec.json.Decoder(_Named)


class Services:
    """`first` is the gateway's own group: a request that names no model means that one's."""

    def __init__(self, first: Service) -> None:
        self.first = first
        self.absent: dict[str, str] = {}  # settings files of groups that are not served: why
        self._by_name = {first.model.name: first}

    @property
    def all(self) -> Sequence[Service]:
        return tuple(self._by_name.values())

    @property
    def names(self) -> set[str]:
        return set(self._by_name)

    @property
    def several(self) -> bool:
        return len(self._by_name) > 1 or bool(self.absent)

    def add(self, service: Service) -> None:
        """From now on. Raises ConfigError if its model's name is another group's."""
        name = service.model.name
        if name in self._by_name:
            raise ConfigError(
                f"the model {name} is served for another group: give one another served_model_name"
            )
        self._by_name[name] = service

    def remove(self, service: Service) -> None:
        """No longer: its group went wrong."""
        self._by_name.pop(service.model.name, None)

    def named(self, name: str | None) -> Service:
        """Raises ApiError 404."""
        service = self.first if name is None else self._by_name.get(name)
        if service is None:
            raise ApiError(404, f"the model {shorten(name or '')} does not exist", "model")
        return service

    def of_body(self, body: bytes) -> Service:
        """The service that a body is for. What is wrong with a body, its model's name included, the first one says."""
        if len(self._by_name) == 1:
            return self.first
        try:
            name = _body.decode(body).model
        except UNREADABLE:
            return self.first
        return self._by_name.get(name, self.first) if isinstance(name, str) else self.first

    # ---- of the process

    @property
    def live(self) -> int:
        """Requests of all clients."""
        return sum(service.dispatcher.live for service in self.all)

    def lives(self, request: str) -> list[Life]:
        """What is known of a request, whichever model it is for."""
        return [life for service in self.all for life in service.dispatcher.lives.find(request)]

    def hand_over(self) -> None:
        for service in self.all:
            service.dispatcher.hand_over()

    def shut_down(self) -> None:
        for service in self.all:
            service.dispatcher.shut_down()
