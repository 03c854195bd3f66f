"""What a scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerStats:
    """Monotonic counts, exported as Prometheus counters."""

    requests_recovered: int = 0
    tokens_recomputed: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
    resyncs: int = 0
    poisoned: int = 0
    orphans_dropped: int = 0
    steps_failed: int = 0  # that a stage could not run or pass on
    space_failures: int = 0  # of these, for want of KV blocks
    grammar_waits: int = 0  # steps that came to a request before its grammar was compiled
    grammars_failed: int = 0  # requests that ended because theirs could not be followed
    prefix_cache_queries: int = 0  # tokens of prompts whose KV might have been cached ...
    prefix_cache_hits: int = 0  # ... and was
    spec_decode_num_drafts: int = 0  # rows with drafts ...
    spec_decode_num_draft_tokens: int = 0  # ... the drafts in them ...
    spec_decode_num_accepted_tokens: int = 0  # ... and those of these that were what was drawn
