"""kfadmin's exit codes, and which error means which."""

from __future__ import annotations

from enum import IntEnum

from controlplane.contract.errors import KevlarFlowError, RequestError, Unavailable
from controlplane.kfadmin.client import NotAllowed, Refused
from controlplane.kfadmin.rundir import RunDirBusy, RunDirUnusable


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3  # by pre-flight: nothing was changed
    GOES_ON = 4  # the wait ended, the operation did not
    UNREACHABLE = 5
    NOT_ALLOWED = 6


# The one table: `kfadmin --help` and docs/kfadmin.md show it.
WORDS = {
    Exit.DONE: "done; of a check: yes, there may be warnings",
    Exit.FAILED: "failed, or cancelled",
    Exit.USAGE: "wrong usage: an option, a name, a setting",
    Exit.REFUSED: "refused, and nothing was changed; of a check: no",
    Exit.GOES_ON: "the wait is over (--timeout, Ctrl-C), the operation goes on",
    Exit.UNREACHABLE: "no controller answers, or etcd or the history is away",
    Exit.NOT_ALLOWED: "not allowed: no token, a wrong one, or a role that may not",
}


def exit_of(error: KevlarFlowError) -> Exit:
    """The exit code for an error that ended a verb."""
    match error:
        case Unavailable():
            return Exit.UNREACHABLE
        case NotAllowed():
            return Exit.NOT_ALLOWED
        case RequestError() | RunDirUnusable():
            return Exit.USAGE
        case Refused() | RunDirBusy():
            return Exit.REFUSED
        case _:
            return Exit.FAILED
