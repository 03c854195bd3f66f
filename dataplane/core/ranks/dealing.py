"""Who computes the data-parallel heads of which rows of a step, where all ranks read and write one KV cache.

With memory of their own ranks would own requests (routing.py); here the rows of every step are dealt out anew."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from dataplane.core.ranks.routing import chunk_cost


def deal_rows(counts: Sequence[int], contexts: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the rows that it computes, ascending: the dearest row first, each to the rank that has the least to
    do. counts, contexts [rows]: tokens of a row, and of its context with them."""
    costs = [chunk_cost(count, context - count) for count, context in zip(counts, contexts, strict=True)]
    loads = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        load, rank = loads[0]
        dealt[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return [sorted(rows) for rows in dealt]
