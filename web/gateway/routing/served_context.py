"""How long a request may be, as far as the nodes have said (pure)."""

from __future__ import annotations

from collections.abc import Collection

from controlplane.contract.ids import NodeId


class ServedContext:
    """The tokens that one request may have, prompt and output together: the least that any node of the group serves,
    since a request may come to any of them."""

    def __init__(self, limit: int) -> None:
        """`limit`: by model and settings, before a node has said what it serves."""
        self._limit = limit
        self._by_node: dict[NodeId, int] = {}

    @property
    def tokens(self) -> int:
        return min(self._limit, *self._by_node.values()) if self._by_node else self._limit

    def registered(self, node: NodeId, tokens: int) -> None:
        """A node says what it serves; 0: it does not say. A lease that is lost takes nothing back."""
        if tokens > 0:
            self._by_node[node] = tokens

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget all others: they have left the group."""
        for node in self._by_node.keys() - set(nodes):
            del self._by_node[node]
