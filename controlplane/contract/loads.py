"""How much a pipeline has to do, as one number that schedulers and gateways mean alike."""

from __future__ import annotations

# Tokens of a prompt that cost a pipeline about as much as one more request to decode: a prompt's are computed once and
# many at a time, a request takes part in every step until it ends.
REQUEST_WORK = 64


def work(requests: int, prompt_tokens: int) -> int:
    """In tokens: of requests that a pipeline has, and of tokens of theirs that are not computed yet."""
    return requests * REQUEST_WORK + prompt_tokens
