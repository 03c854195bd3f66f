"""Which pipelines have the KV of how a prompt begins, as far as this gateway has seen (pure).

A scheduler keeps the KV of what it has computed until it needs the room. Nobody is asked: where a prompt was sent, its
KV is expected. Where it is no longer, that costs the next one a wrong choice, and from then on it is there again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from controlplane.contract.ids import PipelineId

SPAN = 64  # tokens between two places of a prompt that are looked at
PLACES_MAX = 1 << 15  # that are remembered, of all prompts: the least recently used go first
PIPELINES_MAX = 8  # that are remembered of each, the newest


def places(prompt: Sequence[int], salt: str) -> tuple[bytes, ...]:
    """A name for the first SPAN tokens, for the first 2 * SPAN, and so on: equal for prompts that begin alike.

    The last token is computed in any case, so that it is part of none."""
    tokens, found = array("i", prompt), list[bytes]()
    name = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for start in range(0, len(tokens) - SPAN, SPAN):
        name = hashlib.blake2b(tokens[start : start + SPAN].tobytes(), digest_size=16, key=name).digest()
        found.append(name)
    return tuple(found)


class Prefixes:
    def __init__(self) -> None:
        self._pipelines: OrderedDict[bytes, tuple[PipelineId, ...]] = OrderedDict()  # the newest last
        self._counts: Counter[PipelineId] = Counter()  # places of each pipeline

    def __len__(self) -> int:
        return len(self._pipelines)

    def cached(self, prefix: Sequence[bytes]) -> dict[PipelineId, int]:
        """How many tokens of a prompt with these `places` each pipeline is expected to have; those that have any."""
        found: dict[PipelineId, int] = {}
        for count, place in enumerate(prefix, 1):
            here = self._pipelines.get(place, ())
            reached = [p for p in here if found.get(p, 0) == (count - 1) * SPAN]
            if not reached:
                break
            found.update(dict.fromkeys(reached, count * SPAN))
        return found

    def sent(self, prefix: Sequence[bytes], pipeline: PipelineId) -> None:
        """A prompt goes to this pipeline, which will have its KV."""
        for place in prefix:
            before = self._pipelines.pop(place, ())
            others = [p for p in before if p != pipeline]
            now = self._pipelines[place] = (*others[1 - PIPELINES_MAX :], pipeline)
            self._count(before, now)
        while len(self._pipelines) > PLACES_MAX:
            _, before = self._pipelines.popitem(last=False)
            self._count(before, ())

    def share(self, pipeline: PipelineId) -> int:
        """How much of all that is remembered is expected there: a new prompt drives little out where it is little."""
        return self._counts[pipeline]

    def _count(self, before: Sequence[PipelineId], now: Sequence[PipelineId]) -> None:
        self._counts.update(now)
        self._counts.subtract(before)
        for pipeline in before:  # pipelines come and go, and leave nothing behind
            if not self._counts[pipeline]:
                del self._counts[pipeline]
