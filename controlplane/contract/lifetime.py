"""What every process of ours does at its start, while it lives and at its end, whatever its plane."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

from controlplane.contract.errors import ConfigError, KevlarFlowError

log = logging.getLogger(__name__)

EXIT_NAME_TAKEN = 3  # another process has this one's name in the cluster
HUNG_EXIT_S = 30.0  # a process whose event loop has not run for so long ends itself
AWAKE_EVERY_S = 5.0
NR_OPEN = Path("/proc/sys/fs/nr_open")


def begin() -> None:
    """The start of a process that has no children of its own."""
    raise_descriptor_limit()
    if os.getpid() == 1:  # of a container: orphans of whatever else runs in it are given to us
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps them


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: the soft limit is often 1,024, for the sake of select(2). Where
    more cannot be had the process goes on with what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard or _set_descriptor_limit(hard):
        return
    # A hard limit above fs.nr_open was inherited: the kernel sets none that is.
    with contextlib.suppress(OSError, ValueError):
        most = int(NR_OPEN.read_text())
        if most > soft and _set_descriptor_limit(most):
            return
    log.warning("the limit of open files stays at %d", soft)


def _set_descriptor_limit(limit: int) -> bool:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


def run_to_exit(
    name: str,
    serve: Callable[[], Coroutine[Any, Any, None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    name_taken: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Run an event loop until `serve` has ended, and end the process `name` with it: 0, 1 after an error, 2 if it is
    the operator's to mend, `EXIT_NAME_TAKEN` after one of `name_taken`. Errors of ours and these are told in words.

    Not by returning: the interpreter and asyncio would wait for every thread, and one that computes for ever, or waits
    for a database that is gone, would keep the process. Nor does a loop that hangs keep it: then a thread of C, which
    needs neither the loop nor the interpreter's lock, writes all stacks to stderr and ends it after `HUNG_EXIT_S`."""

    async def main() -> NoReturn:
        awake = asyncio.create_task(_stay_awake())
        end(await _code_of(name, serve(), name_taken))
        await awake  # never reached; keeps the task

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    end(1)


def end(code: int) -> NoReturn:
    """End the process now. What was said is written out first."""
    faulthandler.dump_traceback_later(HUNG_EXIT_S, exit=True)  # whoever reads the output may not
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk must not keep a dead process alive
            continue
    os._exit(code)


async def _code_of(
    name: str, serving: Coroutine[Any, Any, None], name_taken: tuple[type[Exception], ...]
) -> int:
    try:
        await serving
    except name_taken as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_NAME_TAKEN
    except KevlarFlowError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception:
        log.exception("the process ends with an error")
        return 1
    return 0


async def _stay_awake() -> None:
    while True:
        faulthandler.dump_traceback_later(HUNG_EXIT_S, exit=True)
        await asyncio.sleep(AWAKE_EVERY_S)
