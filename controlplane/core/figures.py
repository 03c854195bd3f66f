"""From counters to rows of figures (pure). What a process counts begins anew with it, so that only differences within
one incarnation are added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controlplane.contract.figures import Figures, GatewayReport, Histogram
from controlplane.contract.ids import NodeId
from controlplane.contract.status import ClusterStatus, NodeStatus

GATEWAYS_MAX = 1024
SILENT_S = 30.0  # a gateway that has not reported for so long is forgotten
QUERIES, HITS = "scheduler_prefix_cache_queries", "scheduler_prefix_cache_hits"


class Meter:
    """Takes in what gateways report, and makes a row of figures of what has been counted since the row before."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[GatewayReport, float]] = {}  # by gateway; with when it came
        self._before: dict[str, GatewayReport] = {}  # as of the last row
        self._cache: dict[NodeId, tuple[str, int, int]] = {}  # incarnation, queries, hits as of the last row

    def heard(self, report: GatewayReport, now: float) -> str:
        """Why it is refused, or ""."""
        if not (report.first_token.sound and report.inter_token.sound):
            return "a histogram has one count more than it has bounds"
        if report.gateway not in self._newest and len(self._newest) >= GATEWAYS_MAX:
            return f"more than {GATEWAYS_MAX} gateways report"
        self._newest[report.gateway] = report, now
        return ""

    def figures(self, status: ClusterStatus, unix_s: float, now: float) -> Figures:
        """The row since the last call. `now`: of the clock that `heard` was given."""
        queries, hits = self._looked_up(status.nodes)
        pairs = self._advance(now)
        rates = [
            (new.tokens - old.tokens) / (new.age_s - old.age_s) for old, new in pairs if new.age_s > old.age_s
        ]
        first = quantiles(_between((old.first_token, new.first_token) for old, new in pairs))
        inter = quantiles(_between((old.inter_token, new.inter_token) for old, new in pairs))
        return Figures(
            unix_s=round(unix_s, 3),
            running=sum(p.running for p in status.pipelines),
            waiting=sum(p.waiting for p in status.pipelines),
            blocks_used=sum(node.blocks_used for node in status.nodes),
            blocks_replica=sum(node.blocks_replica for node in status.nodes),
            blocks_total=sum(node.blocks_total for node in status.nodes if node.pid),
            tokens_per_s=round(max(0.0, sum(rates)), 1) if rates else None,
            cache_hit_ratio=round(hits / queries, 4) if queries > 0 else None,
            first_token_p50_s=first[0],
            first_token_p99_s=first[1],
            inter_token_p50_s=inter[0],
            inter_token_p99_s=inter[1],
        )

    def _advance(self, now: float) -> list[tuple[GatewayReport, GatewayReport]]:
        """(before, now) of each gateway whose counts are known as of two moments."""
        self._newest = {name: pair for name, pair in self._newest.items() if now - pair[1] <= SILENT_S}
        pairs = []
        for name, (report, _) in self._newest.items():
            before = self._before.get(name)
            if before is not None and before.incarnation == report.incarnation:
                pairs.append((before, report))
        self._before = {name: report for name, (report, _) in self._newest.items()}
        return pairs

    def _looked_up(self, nodes: Iterable[NodeStatus]) -> tuple[int, int]:
        """Tokens of prompts that were looked for in caches since the last row, and those that were found."""
        queries = hits = 0
        seen: dict[NodeId, tuple[str, int, int]] = {}
        for node in nodes:
            if QUERIES not in node.counters:  # its last report had none: what was known still holds
                if node.node in self._cache:
                    seen[node.node] = self._cache[node.node]
                continue
            now = (node.incarnation, node.counters[QUERIES], node.counters.get(HITS, 0))
            before = self._cache.get(node.node)
            if before is not None and before[0] == now[0]:
                queries += max(0, now[1] - before[1])
                hits += max(0, now[2] - before[2])
            seen[node.node] = now
        self._cache = seen
        return queries, hits


def quantiles(histogram: Histogram | None) -> tuple[float | None, float | None]:
    """Median and 99th percentile in seconds, by linear interpolation within a bucket (as Prometheus does);
    beyond the last bound: that bound."""
    if histogram is None or (total := sum(histogram.counts)) <= 0:
        return None, None
    return _quantile(histogram, 0.5 * total), _quantile(histogram, 0.99 * total)


def _quantile(histogram: Histogram, rank: float) -> float:
    below, lower = 0, 0.0
    for bound, count in zip(histogram.bounds_s, histogram.counts, strict=False):
        if count and below + count >= rank:
            return round(lower + (bound - lower) * (rank - below) / count, 6)
        below, lower = below + count, bound
    return histogram.bounds_s[-1]


def _between(pairs: Iterable[tuple[Histogram, Histogram]]) -> Histogram | None:
    """What was observed between two moments, of all together; those with other bounds than the first one's (of another
    release) are left out."""
    bounds: tuple[float, ...] = ()
    counts: Sequence[int] = ()
    for old, new in pairs:
        if old.bounds_s != new.bounds_s or (bounds and new.bounds_s != bounds):
            continue
        fresh = [max(0, b - a) for a, b in zip(old.counts, new.counts, strict=True)]
        counts = fresh if not bounds else [a + b for a, b in zip(counts, fresh, strict=True)]
        bounds = new.bounds_s
    return Histogram(bounds, tuple(counts)) if bounds else None
