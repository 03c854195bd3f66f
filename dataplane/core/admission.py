"""Which requests a scheduler does not take, and why."""

from __future__ import annotations

from controlplane.contract.requests import RefusalCode, Submit
from dataplane.core.batching import Batcher
from dataplane.core.request import bytes_of, fault_of


def no_room(total: int, batcher: Batcher) -> tuple[RefusalCode, str]:
    """A request of so many tokens fits the context and yet not what the pipeline has of its nodes' pools now, which
    serve others, too: other pipelines may have room, and so may this one later."""
    return RefusalCode.OVERLOADED, (
        f"{total} tokens do not fit the {batcher.quota_blocks} KV blocks of {batcher.limits.block_size} tokens"
        " that this pipeline has now"
    )


def refusal(message: Submit, batcher: Batcher, bytes_kept: int) -> tuple[RefusalCode, str] | None:
    """The reason and its text; None: the request may run, now or later. `bytes_kept`: of all requests that are here."""
    limits = batcher.limits
    total = len(message.prompt) + len(message.emitted)
    if not message.prompt or total >= limits.context_len:
        return RefusalCode.INVALID, (
            f"{total} tokens do not fit the context of {limits.context_len} with room for one more"
        )
    fault = fault_of(message, limits.vocab_size)
    if fault is not None:
        return RefusalCode.INVALID, fault
    if limits.blocks_for(total + 1) > batcher.quota_blocks:
        return no_room(total, batcher)
    if not message.admitted and batcher.waiting >= batcher.max_waiting:
        return RefusalCode.OVERLOADED, f"{batcher.waiting} requests are waiting"
    new = bytes_of(len(message.prompt), message.sampling, message.context)
    if not message.admitted and bytes_kept and bytes_kept + new > limits.request_bytes:
        return RefusalCode.OVERLOADED, f"requests keep {bytes_kept} of {limits.request_bytes} bytes"
    return None
