"""Logs: one JSON object a line on stderr. Prompts, outputs and secrets are never given to a logger."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import structlog

LOG_BYTES_MAX = 16 << 20  # then a log becomes NAME.log.1 and begins anew: a process has twice as much at most
LOG_LOOK_S = 5.0


def bound_logs(paths: Iterable[Path], bytes_max: int = LOG_BYTES_MAX) -> None:
    """Keep logs small that others append to; for whoever opened them, every `LOG_LOOK_S`.

    Their writers have them open with O_APPEND, so that they go on at the start of an emptied file; what they write
    between copy and cut is lost. On a full disk there is no copy: a log never keeps the disk full."""
    for path in paths:
        with contextlib.suppress(OSError):  # it is not there, or the directory has gone
            if path.stat().st_size <= bytes_max:
                continue
            with contextlib.suppress(OSError):
                shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's loggers through one JSON renderer; `process` is on each line."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        _naming(process),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
        foreign_pre_chain=shared,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("alembic", "uvicorn", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _naming(process: str) -> structlog.types.Processor:
    def add(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        event["process"] = process
        return event

    return add
