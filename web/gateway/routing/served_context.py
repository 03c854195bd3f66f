"""What a request may ask for, as far as the nodes have said (pure)."""

from __future__ import annotations

from collections.abc import Collection

from controlplane.contract.ids import NodeId


class ServedContext:
    """What every node of the group serves, since a request may come to any of them: so many tokens, prompt and output
    together; and grammars, bad words and log probabilities of prompts, which nodes of an older release would pass
    over."""

    def __init__(self, limit: int) -> None:
        """`limit`: by model and settings, before a node has said what it serves."""
        self._limit = limit
        self._by_node: dict[NodeId, int] = {}
        self.without_grammars: set[NodeId] = set()  # nodes that cannot hold an output to one
        # Nodes that know of no bad words and no log probabilities of prompts.
        self.without_scores: set[NodeId] = set()

    @property
    def tokens(self) -> int:
        return min(self._limit, *self._by_node.values()) if self._by_node else self._limit

    def registered(self, node: NodeId, tokens: int, grammars: str, sampling: int) -> None:
        """A node says what it serves; 0: it does not say. `grammars`, `sampling`: as in NodeRecord. A lease that is
        lost takes nothing back."""
        (self.without_grammars.discard if grammars else self.without_grammars.add)(node)
        (self.without_scores.discard if sampling else self.without_scores.add)(node)
        if tokens > 0:
            self._by_node[node] = tokens

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget all others: they have left the group."""
        for node in self._by_node.keys() - set(nodes):
            del self._by_node[node]
        self.without_grammars &= set(nodes)
        self.without_scores &= set(nodes)
