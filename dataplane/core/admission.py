"""Which requests a scheduler does not take, and why."""

from __future__ import annotations

from controlplane.contract.requests import RefusalCode, Submit
from dataplane.core.batching import Batcher
from dataplane.core.request import bytes_of, fault_of


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
        return RefusalCode.INVALID, f"{total} tokens do not fit the KV pool of this pipeline"
    if not message.admitted and batcher.waiting >= batcher.max_waiting:
        return RefusalCode.OVERLOADED, f"{batcher.waiting} requests are waiting"
    new = bytes_of(len(message.prompt), message.sampling, message.context)
    if not message.admitted and bytes_kept and bytes_kept + new > limits.request_bytes:
        return RefusalCode.OVERLOADED, f"requests keep {bytes_kept} of {limits.request_bytes} bytes"
    return None
