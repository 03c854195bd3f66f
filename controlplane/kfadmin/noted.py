"""Telling a controller what was done to an API key or a token here, so that the audit has it."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable

import typer

from controlplane.contract.credentials import CredentialChange
from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.output import progress

NOTE_S = 5.0  # in all: what is told of is done, and waits for nobody


def who() -> str:
    """USER@HOST; neither is proof of anything."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        user = "?"
    return "".join(filter(str.isprintable, f"{user}@{socket.gethostname()}"))[:256]


def note(connect: Callable[[], AdminClient], *changes: CredentialChange) -> None:
    """What was done stays done when nobody can be told; it is said then."""
    for change in changes:
        try:
            with connect() as client:
                client.note(change)
        except (KevlarFlowError, OSError, typer.BadParameter) as error:
            progress(f"this is done, but the audit has no line of it ({change.change}, {change.id}): {error}")
