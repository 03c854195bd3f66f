"""python -m tests.sim run SEED | shrink SEED | soak COUNT: a whole cluster in virtual time (--help)."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.sim.cluster import Outcome, run
from tests.sim.safeguards import SAFEGUARDS
from tests.sim.schedule import Schedule, generate
from tests.sim.shrink import shrink

CHUNK = 20  # seeds that a worker takes at a time
PROGRESS_S = 5.0
NONE = "none"  # of the steps: forming and what follows a storm are enough


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of names are walked in the order of their hashes, which must be the same each time.
        os.execve(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]],
                  os.environ | {"PYTHONHASHSEED": "0"})  # fmt: skip
    options = _parser().parse_args()
    _tidy()
    match options.command:
        case "run":
            return _run(options)
        case "shrink":
            return _shrink(options)
        case _:
            return _soak(options)


def _tidy() -> None:
    """Collect garbage after each seed only, and never look again at what importing has made."""
    gc.freeze()
    gc.disable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description="A whole cluster in virtual time."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one seed, with all that happens in it")
    one.add_argument("seed", type=int)
    one.add_argument("--only", default="", help="numbers of the steps to keep, as shrink prints them")
    one.add_argument("--quiet", action="store_true", help="only how it ends")
    less = commands.add_parser("shrink", help="the fewest steps of a failing seed that still fail")
    less.add_argument("seed", type=int)
    many = commands.add_parser("soak", help="many seeds")
    many.add_argument("count", type=int)
    many.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    many.add_argument("--jobs", type=int, default=0, help="processes (default: one for each core)")
    many.add_argument("--stop", action="store_true", help="stop at the first violation")
    for command in (one, less, many):
        command.add_argument("--without", choices=sorted(SAFEGUARDS), help="switch a safeguard off")
    return parser


def _play(schedule: Schedule, without: str | None, log: bool = False) -> Outcome:
    outcome = run(
        schedule, print if log else None, SAFEGUARDS[without] if without else contextlib.nullcontext
    )
    gc.collect()
    return outcome


def _again(seed: int, without: str | None, command: str = "run", only: list[int] | None = None) -> str:
    text = f"python -m tests.sim {command} {seed}"
    if without:
        text += f" --without {without}"
    return text if only is None else f"{text} --only {','.join(map(str, only)) or NONE}"


def _run(options: argparse.Namespace) -> int:
    schedule = generate(options.seed)
    if options.only:
        kept = [] if options.only == NONE else options.only.split(",")
        schedule = schedule.only([int(number) for number in kept])
    if not options.quiet:
        _show(schedule, list(range(len(schedule.steps))))
    outcome = _play(schedule, options.without, log=not options.quiet)
    print(f"seed {options.seed}: {outcome.failure or 'clean'}; {outcome.virtual_s:.1f} virtual seconds, "
          f"{outcome.topologies} topologies, requests {dict(outcome.requests)}")  # fmt: skip
    return 1 if outcome.failure else 0


def _show(schedule: Schedule, numbers: list[int]) -> None:
    print(schedule.shape, "one fault that has to be masked" if schedule.mild else "")
    for number in numbers:
        print(f"  {number:3} {schedule.steps[number]}")


def _shrink(options: argparse.Namespace) -> int:
    schedule = generate(options.seed)
    tried = 0

    def fails(kept: list[int]) -> bool:
        nonlocal tried
        tried += 1
        return bool(_play(schedule.only(kept), options.without).failure)

    every = list(range(len(schedule.steps)))
    if not fails(every):
        print(f"seed {options.seed} is clean")
        return 0
    kept = shrink(every, fails)
    print(f"{len(kept)} of {len(every)} steps still fail ({tried} runs):")
    _show(schedule, kept)
    print(_play(schedule.only(kept), options.without).failure)
    print(_again(options.seed, options.without, only=kept))
    return 1


def _chunk(first: int, count: int, without: str | None) -> list[Outcome]:
    return [_play(generate(seed), without) for seed in range(first, first + count)]


def _outcomes(options: argparse.Namespace, jobs: int) -> Iterator[Outcome]:
    chunks = [
        (first, min(CHUNK, options.first + options.count - first), options.without)
        for first in range(options.first, options.first + options.count, CHUNK)
    ]
    if jobs == 1:
        for first, count, without in chunks:
            for seed in range(first, first + count):
                yield _play(generate(seed), without)
        return
    with ProcessPoolExecutor(jobs, initializer=_tidy) as pool:
        for future in as_completed([pool.submit(_chunk, *chunk) for chunk in chunks]):
            yield from future.result()


def _soak(options: argparse.Namespace) -> int:
    jobs = options.jobs or len(os.sched_getaffinity(0))
    started = last = time.perf_counter()
    done, failed, faults, requests = 0, [], Counter[str](), Counter[str]()
    virtual_s = 0.0
    for outcome in _outcomes(options, jobs):
        done += 1
        faults += outcome.faults
        requests += outcome.requests
        virtual_s += outcome.virtual_s
        if outcome.failure:
            failed.append(outcome.seed)
            print(
                f"seed {outcome.seed}: {outcome.failure}\n  {_again(outcome.seed, options.without)}",
                flush=True,
            )
            if options.stop:
                break
        if time.perf_counter() - last > PROGRESS_S:
            last = time.perf_counter()
            print(f"{done} of {options.count} seeds, {len(failed)} failed", file=sys.stderr, flush=True)
    took = time.perf_counter() - started
    print(
        f"soak: {done} seeds from {options.first}, {len(failed)} failed, {done / took:.1f} seeds/s in {jobs} "
        f"processes, {virtual_s / 3600:.1f} virtual hours; faults: {_listed(faults)}; "
        f"requests: {_listed(requests)}"
    )
    return 1 if failed else 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
