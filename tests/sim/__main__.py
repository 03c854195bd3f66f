"""python -m tests.sim run SEED | shrink SEED | soak COUNT: a whole cluster in virtual time (--help)."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.sim.border import silence
from tests.sim.cluster import Outcome, run
from tests.sim.record import Record, resume
from tests.sim.safeguards import SAFEGUARDS
from tests.sim.schedule import Schedule, generate
from tests.sim.shrink import shrink
from tests.sources import code_digest, loaded

FOREVER = contextlib.ExitStack()
COLLECT_EVERY = 10  # seeds; the process is 10 MB larger than with one
CHUNK = 20  # seeds that a worker takes at a time
PROGRESS_S = 5.0
MODULES = frozenset(loaded())  # whose code a seed may run: what it imports itself is a mistake
NONE = "none"  # of the steps: forming and what follows a storm are enough


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of names are walked in the order of their hashes, which must be the same each time.
        os.execve(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]],
                  os.environ | {"PYTHONHASHSEED": "0"})  # fmt: skip
    options = _parser().parse_args()
    _prepare()
    match options.command:
        case "run":
            return _run(options)
        case "shrink":
            return _shrink(options)
        case _:
            return _soak(options)


def _prepare() -> None:
    """For as long as this process lives: nothing is logged, garbage is collected between seeds only, and what
    importing has made is never looked at again."""
    FOREVER.enter_context(silence())
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
    many.add_argument("--json", type=Path, metavar="FILE",
                      help="keep the result there as it grows; one of the same code is gone on with")  # fmt: skip
    for command in (one, less, many):
        command.add_argument("--without", choices=sorted(SAFEGUARDS), help="switch a safeguard off")
    return parser


def _play(schedule: Schedule, without: str | None, log: bool = False) -> Outcome:
    outcome = run(
        schedule, print if log else None, SAFEGUARDS[without] if without else contextlib.nullcontext
    )
    if schedule.seed % COLLECT_EVERY == 0:
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
    outcomes = [_play(generate(seed), without) for seed in range(first, first + count)]
    if late := sorted(path.name for path in loaded() - MODULES):
        raise RuntimeError(
            f"seeds {first} to {first + count - 1} imported {late}, which the digest of the code lacks: "
            "import them in tests/sim/border.py"
        )
    return outcomes


def _chunks(record: Record, jobs: int) -> Generator[list[Outcome]]:
    """Outcomes of what `record` lacks, as they come."""
    if jobs == 1:
        for first, _ in record.missing(1):
            yield _chunk(first, 1, record.without)
        return
    with ProcessPoolExecutor(jobs, initializer=_prepare) as pool:
        missing = record.missing(CHUNK)
        try:
            for future in as_completed([pool.submit(_chunk, *piece, record.without) for piece in missing]):
                yield future.result()
        finally:  # stopped or interrupted: nobody waits for what has not begun
            pool.shutdown(cancel_futures=True)


def _soak(options: argparse.Namespace) -> int:
    jobs = options.jobs or len(os.sched_getaffinity(0))
    fresh = Record(code_digest(MODULES), options.first, options.count, options.without)
    try:
        record = resume(options.json, fresh)
    except ValueError as error:
        sys.exit(f"soak: {error}")
    before, before_s = record.count, record.seconds
    if before:
        print(f"soak: {before} seeds of this code are in {options.json}: going on", file=sys.stderr)
    started = last = time.perf_counter()
    chunks = _chunks(record, jobs)
    for outcomes in chunks:
        record.add(outcomes)
        now = time.perf_counter()
        record.seconds = before_s + now - started
        failed = [outcome for outcome in outcomes if outcome.failure]
        for outcome in failed:
            print(
                f"seed {outcome.seed}: {outcome.failure}\n  {_again(outcome.seed, options.without)}",
                flush=True,
            )
        if failed and options.stop:
            chunks.close()
            break
        if now - last > PROGRESS_S:
            last = now
            _progress(record, before, now - started)
            if options.json is not None:
                record.save(options.json)
    print(
        f"soak: {record.count} seeds from {options.first}, {len(record.failed)} failed, {record.seconds:.0f} s in "
        f"{jobs} processes, {record.virtual_s / 3600:.1f} virtual hours; faults: {_listed(record.faults)}; "
        f"requests: {_listed(record.requests)}"
    )
    print(record.line())
    if options.json is not None:
        record.save(options.json)
    return 1 if record.failed else 0


def _progress(record: Record, before: int, took_s: float) -> None:
    rate = (record.count - before) / took_s
    left_s = max(0, record.wanted - record.count) / rate
    print(f"{record.count} of {record.wanted} seeds, {len(record.failed)} failed, {rate:.1f} seeds/s, "
          f"{left_s / 60:.0f} min left", file=sys.stderr, flush=True)  # fmt: skip


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
