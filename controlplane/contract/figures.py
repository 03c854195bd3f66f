"""What the cluster does in figures: a row every few seconds, for charts. Stored in SQL, shown on the dashboard."""

from __future__ import annotations

import msgspec

from controlplane.contract.lives import Lives

BUCKETS_MAX = 64
WANTED_MAX = 8  # requests that are looked for at a time


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Observations since the process started. `counts` has one entry more than `bounds_s`: what is beyond the last."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def sound(self) -> bool:
        return 0 < len(self.bounds_s) == len(self.counts) - 1 < BUCKETS_MAX


class GatewayReport(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway has counted since it started. A new field goes to the end and has a default."""

    gateway: str
    incarnation: str
    age_s: float  # of the process, by its monotonic clock: rates are over the sender's time
    tokens: int  # given to clients
    first_token: Histogram  # from a request to its first token
    inter_token: Histogram  # between two tokens of a stream
    lives: tuple[Lives, ...] = ()  # what this gateway knows of requests that the controller has asked for


class ReportTaken(msgspec.Struct, frozen=True, array_like=True):
    """A controller's answer. A new field goes to the end and has a default."""

    # Requests whose lives it would like to know: another report with them may follow at once.
    wanted: tuple[str, ...] = ()


class Figures(msgspec.Struct, frozen=True):
    """One row. None: nobody reports it, or there was nothing to measure since the row before."""

    unix_s: float
    running: int = 0  # requests in batches
    waiting: int = 0  # requests queued
    blocks_used: int = 0  # KV blocks of requests, over all nodes that report
    blocks_replica: int = 0  # of copies
    blocks_total: int = 0
    tokens_per_s: float | None = None  # given to clients by all gateways
    cache_hit_ratio: float | None = None  # of the tokens of prompts, those whose KV was cached
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    inter_token_p50_s: float | None = None
    inter_token_p99_s: float | None = None
