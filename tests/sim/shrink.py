"""Make a failing schedule small: delta debugging over its steps (Zeller and Hildebrandt, 2002)."""

from __future__ import annotations

from collections.abc import Callable


def shrink(steps: list[int], fails: Callable[[list[int]], bool]) -> list[int]:
    """A part of `steps` that still fails and of which no single step can be left out. `steps` itself has to fail."""
    chunks = 2
    while steps:
        size = -(-len(steps) // chunks)
        for start in range(0, len(steps), size):
            rest = steps[:start] + steps[start + size :]
            if fails(rest):
                steps, chunks = rest, max(2, chunks - 1)
                break
        else:
            if size == 1:
                break
            chunks = min(len(steps), 2 * chunks)
    return steps
