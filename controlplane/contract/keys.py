"""Where things are in etcd, and how their values are written (JSON: operators read them with etcdctl)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from controlplane.contract import schema
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import PeerError
from controlplane.unreadable import UNREADABLE

T = TypeVar("T")

encode = schema.encode


def decode(value: bytes, kind: type[T], key: str) -> T:
    """Parse one value; junk becomes a PeerError that names the key, here and nowhere later."""
    try:
        # As text: in a field that this code does not know, bytes that are none would be passed over.
        return msgspec.json.decode(value.decode(), type=kind)
    except UNREADABLE as error:
        raise PeerError(f"etcd key {printable(key)}: {error}") from error


def printable(key: str) -> str:
    """A key, or its name, as it can be logged and sent: bytes that are no text as their escapes."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one group: leader, nodes, gateways and operations are its own, so that two groups in one etcd may
    both have a node n0, and none watches another one's keys."""

    scope: str  # `ClusterConfig.scope`: of the default group the cluster's name

    @classmethod
    def of(cls, config: ClusterConfig) -> Keys:
        return cls(config.scope)

    @property
    def root(self) -> str:
        return f"/kevlarflow/{self.scope}/"

    @property
    def leader(self) -> str:
        return f"{self.root}leader/"

    @property
    def nodes(self) -> str:
        return f"{self.root}nodes/"

    @property
    def controllers(self) -> str:
        return f"{self.root}controllers/"

    @property
    def gateways(self) -> str:
        return f"{self.root}gateways/"

    @property
    def operations(self) -> str:
        return f"{self.root}operations/"

    def revoked(self, credential: str) -> str:
        return f"{self.root}revoked/{credential}"

    def topology(self, group: str) -> str:
        return f"{self.root}groups/{group}/topology"

    def node(self, node: str) -> str:
        return f"{self.nodes}{node}"

    def controller(self, controller: str) -> str:
        return f"{self.controllers}{controller}"

    def hearing(self, controller: str) -> str:
        return f"{self.root}hearing/{controller}"

    def gateway(self, gateway: str) -> str:
        return f"{self.gateways}{gateway}"

    def operation(self, operation_id: str) -> str:
        return f"{self.operations}{operation_id}"
