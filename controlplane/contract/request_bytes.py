"""About what requests take in the memory of a process that keeps them, for all that clients can make long.

A field that is not counted here, or bounded where it comes in, is one by which a client takes a process its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from controlplane.contract.requests import Sampling

TOKEN_BYTES = 40  # an int and its place in a list or tuple
BIAS_BYTES = 150  # of one logit_bias entry
WORD_BYTES = 64  # of one of bad_words, its tokens aside
VALUE_BYTES = 70  # of a value in parsed JSON, or of a member of an object, text aside
OBJECT_BYTES = 400  # of an object in it that became one of ours
# Of any character in a text that has one beyond ASCII: four, and its UTF-8, which encoders leave beside it.
WIDE_BYTES = 8


def text_bytes(text: str) -> int:
    return len(text) if text.isascii() else WIDE_BYTES * len(text)


def json_bytes(data: bytes) -> int:
    """About what the objects take that were written as `data`: each value stands behind one of these marks."""
    values = sum(map(data.count, (b",", b":", b"[")))
    return (
        OBJECT_BYTES * data.count(b"{")
        + VALUE_BYTES * values
        + len(data) * (1 if data.isascii() else WIDE_BYTES)
    )


def _words_bytes(words: tuple[tuple[int, ...], ...]) -> int:
    return WORD_BYTES * len(words) + TOKEN_BYTES * sum(map(len, words))


LONG: Mapping[str, Callable[[Any], int]] = {
    "logit_bias": lambda biases: BIAS_BYTES * len(biases),
    "stop_token_ids": lambda ids: TOKEN_BYTES * len(ids),
    "bad_words": _words_bytes,
    "grammar": text_bytes,
    "cache_salt": text_bytes,
}


def sampling_bytes(samplings: Iterable[Sampling]) -> int:
    """About what their long fields take. What several of them share counts once."""
    seen: set[int] = set()
    size = 0
    for sampling in samplings:
        for name, bytes_of in LONG.items():
            value = getattr(sampling, name)
            if value and id(value) not in seen:
                seen.add(id(value))
                size += bytes_of(value)
    return size
