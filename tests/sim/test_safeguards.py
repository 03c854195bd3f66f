"""The proof that the simulator can see: without any one of the safeguards it finds a violation, and soon."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.sim.safeguards import SAFEGUARDS
from tests.sim.schedule import MUTED_FROM
from tests.sim.soaking import simulator

SEEDS_MAX = 1000
LIMIT_S = 500.0
# Where a search begins that at 0 takes long: among seeds that are meant for it.
FIRST = {"position": MUTED_FROM}

# By which invariant each absence is noticed.
NOTICED = {
    "epoch": r"of epoch \d+ of p\d, knowing \d+|ran a step of Fence|token \d+ at position",
    "guard": r"topology \d+ was written by c\d@\w+, but (c\d|nobody) leads",
    "watermark": r"counts \d+ tokens of \d+ on \S+ as safe, which has acknowledged \d+",
    "checksum": r"token \d+ at position \d+ instead of \d+",
    "kinds": r"nobody died, and p\d changed",
    "near": r"went to \S+, whose copy was never near",
    "names": r"was taken from \S+, which lives, by",
    "schema": r"went from schema \d to \d",
    "complete": r"as protected by \S+, which has \d+ shards of it",
    "restored": r"token \d+ at position \d+ instead of \d+",
    "unknown": r"lost what newer code had written",
    "position": r"position \d+ in the place of \d+|position \d+ after its end",
}


@pytest.fixture(scope="module")
def soaks(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    """A soak without each of the safeguards that are asked about, one a core. Each has one process, so that which seed
    it finds first does not depend on who is fast."""
    asked = [
        item.callspec.params["safeguard"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    ]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def soak(safeguard: str) -> CompletedProcess[str]:
        first = str(FIRST.get(safeguard, 0))
        options = ("--first", first, "--stop", "--jobs", "1", "--without", safeguard)
        return simulator("soak", str(SEEDS_MAX), *options, limit_s=LIMIT_S)

    try:
        yield {name: pool.submit(soak, name) for name in asked}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("safeguard", sorted(SAFEGUARDS))
def test_without_a_safeguard_a_violation_is_found(
    safeguard: str, soaks: dict[str, Future[CompletedProcess[str]]]
) -> None:
    ended = soaks[safeguard].result()
    found = re.search(r"^seed (\d+): at (.*)$", ended.stdout, re.MULTILINE)
    assert found is not None, ended.stdout + ended.stderr
    assert re.search(NOTICED[safeguard], found[2]), found[2]
    # The same seed with the safeguard is clean: it is the absence that was noticed.
    assert simulator("run", found[1], "--quiet").returncode == 0
