"""KV of the ranks on the shelf, host memory that outlives a rank's process: what goes there next, and what is there.

A page is one block of a request at one rank: its planes there. Pages are copied behind the computation, oldest first,
and dropped when their request ends. A rank that is lost can be restored up to where its pages are on the shelf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WINDOW_PAGES = 64  # of a rank on their way: what a copy engine has at a time


@dataclass(frozen=True, slots=True)
class Page:
    request: int
    block: int
    rank: int
    layout: int  # changes before this page was sent: it has the planes that the rank had then


@dataclass(slots=True)
class _Line:
    """One rank's pages of one request: blocks below `sent` are on their way or there, below `there` acknowledged."""

    sent: int = 0
    there: int = 0
    acknowledged: set[int] = field(default_factory=set)  # ahead of `there`


class Backup:
    """Of one stage. What its driver does: copies what `next` says, tells `acknowledge`, drops what `end` says."""

    def __init__(self, ranks: Iterable[int], window_pages: int = WINDOW_PAGES) -> None:
        """Raises ValueError for a window of less than a page."""
        if window_pages < 1:
            raise ValueError(f"a window of {window_pages} pages")
        self._window = window_pages
        self._layout = 0
        self._lines: dict[int, dict[int, _Line]] = {rank: {} for rank in ranks}  # by rank, then request
        self._flying = dict.fromkeys(self._lines, 0)
        self._full: dict[int, int] = {}  # blocks of a request that are computed
        # Requests, oldest first.
        self._waiting: dict[int, dict[int, None]] = {rank: {} for rank in self._lines}

    def filled(self, request: int, blocks: int) -> None:
        """The first `blocks` blocks of a request are full, and their tokens final. Raises ValueError if there were more
        before."""
        if blocks < self._full.get(request, 0):
            raise ValueError(
                f"request {request} had {self._full[request]} blocks, now {blocks}: say rewind first"
            )
        self._full[request] = blocks
        for rank, lines in self._lines.items():
            if lines.setdefault(request, _Line()).sent < blocks:
                self._waiting[rank][request] = None

    def next(self) -> list[Page]:
        """Pages to copy now: of each rank as many as its window has room for."""
        pages = []
        for rank, waiting in self._waiting.items():
            while waiting and self._flying[rank] < self._window:
                request = next(iter(waiting))
                line = self._lines[rank][request]
                pages.append(Page(request, line.sent, rank, self._layout))
                line.sent += 1
                self._flying[rank] += 1
                if line.sent >= self._full[request]:
                    del waiting[request]
        return pages

    def acknowledge(self, page: Page) -> bool:
        """A page is on the shelf. False: its request has ended or was rewound meanwhile, or the planes are with other
        ranks, so the page has to be dropped."""
        if page.rank not in self._lines or page.layout != self._layout:
            return False
        self._flying[page.rank] = max(0, self._flying[page.rank] - 1)
        line = self._lines[page.rank].get(page.request)
        if line is None or page.block >= line.sent:
            return False
        line.acknowledged.add(page.block)
        while line.there in line.acknowledged:
            line.acknowledged.discard(line.there)
            line.there += 1
        return True

    def rewind(self, request: int, blocks: int) -> None:
        """Blocks from there on will be computed again: those on the shelf count no longer."""
        if request not in self._full:
            return
        self._full[request] = min(self._full[request], blocks)
        for rank, lines in self._lines.items():
            line = lines[request]
            line.sent, line.there = min(line.sent, blocks), min(line.there, blocks)
            line.acknowledged = {block for block in line.acknowledged if block < blocks}
            if line.sent >= self._full[request]:
                self._waiting[rank].pop(request, None)

    def end(self, request: int) -> bool:
        """A request is over. True: the shelf may have pages of it, which have to be dropped."""
        for rank, lines in self._lines.items():
            lines.pop(request, None)
            self._waiting[rank].pop(request, None)
        return self._full.pop(request, None) is not None

    def there(self, request: int, ranks: Iterable[int]) -> int:
        """Blocks of a request that can be restored for all of these ranks, from the first on."""
        lines = (self._lines.get(rank, {}).get(request) for rank in ranks)
        return min((line.there if line else 0 for line in lines), default=self._full.get(request, 0))

    def behind(self) -> Mapping[int, int]:
        """Of each rank: pages that are computed and not on the shelf."""
        return {
            rank: sum(self._full[request] - line.there for request, line in lines.items())
            for rank, lines in self._lines.items()
        }

    def change(self, ranks: Iterable[int]) -> None:
        """Planes are with other ranks now, after requests were rewound to what is there. Where a plane went is not
        asked: what of a request every rank had on the shelf counts, the rest is copied again by who has it now."""
        wanted = list(ranks)
        there = {request: self.there(request, self._lines) for request in self._full}
        self._layout += 1
        self._lines = {
            rank: {request: _Line(blocks, blocks) for request, blocks in there.items()} for rank in wanted
        }
        self._flying = dict.fromkeys(wanted, 0)
        self._waiting = {
            rank: {request: None for request, blocks in self._full.items() if there[request] < blocks}
            for rank in wanted
        }
