"""Doing harm to the processes of a run directory, and undoing it.

What lasts has a second way back besides `undo`: a shell of its own session that undoes it a while later, should kfadmin
itself be killed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import time

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.records import OperationKind, OperationState
from controlplane.contract.status import OperationRequest
from controlplane.kfadmin.chaos.gameday import Begin, Undo
from controlplane.kfadmin.chaos.plan import FaultKind
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.operate import follow
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import RunDir

LATER_S = 60.0  # beyond the fault's own time
OPERATION_S = 120.0
REASON = "game day"


class OperationFailed(KevlarFlowError):
    """It was accepted, and did not come to its end."""


class Performer:
    """`admin` is for this one alone."""

    def __init__(self, run_dir: RunDir, admin: AdminClient) -> None:
        self._run_dir = run_dir
        self._admin = admin
        self._one_at_a_time = asyncio.Lock()  # the client is for one thread at a time
        self._stopped: dict[int, int] = {}  # fault -> pid
        self._ways_back: dict[int, asyncio.subprocess.Process] = {}

    def pids(self) -> dict[str, int]:
        """Every process that runs now, by name."""
        folders = ("pids", "relay", "nodes")
        files = [item for folder in folders for item in self._run_dir.processes(folder).items()]
        return {name: file.pid for name, file in files if file.alive}

    def names(self) -> list[str]:
        """Every process that the cluster has."""
        return sorted(
            {name for folder in ("pids", "relay", "nodes") for name in self._run_dir.processes(folder)}
        )

    async def begin(self, effect: Begin) -> None:
        """Raises KevlarFlowError, OSError: nothing was changed then, or it was changed back."""
        match effect.kind:
            case FaultKind.KILL:
                os.kill(self._pid(effect.target), signal.SIGKILL)
            case FaultKind.AWAY:
                pid, hold = self._pid(effect.target), self._run_dir.path / "hold" / effect.target
                await self._way_back(effect, f"rm -f {shlex.quote(str(hold))}")
                hold.touch()
                os.kill(pid, signal.SIGKILL)
            case FaultKind.STOP:
                pid = self._pid(effect.target)
                await self._way_back(effect, f"kill -CONT {pid}")
                self._stopped[effect.number] = pid
                os.kill(pid, signal.SIGSTOP)
            case FaultKind.DRAIN:
                try:
                    await self._operation(OperationKind.DRAIN, effect.target)
                except OperationFailed:  # it had begun: the node is cordoned
                    await self._operation(OperationKind.UNDRAIN, effect.target)
                    raise
            case FaultKind.REPLACE:
                await self._operation(OperationKind.REPLACE, effect.target)
            case FaultKind.TRANSFER:
                await self._operation(OperationKind.TRANSFER, "")

    async def undo(self, effect: Undo) -> None:
        """Raises KevlarFlowError, OSError."""
        match effect.kind:
            case FaultKind.AWAY:
                (self._run_dir.path / "hold" / effect.target).unlink(missing_ok=True)
            case FaultKind.STOP:
                with contextlib.suppress(ProcessLookupError):  # somebody has killed it meanwhile
                    os.kill(self._stopped.pop(effect.number), signal.SIGCONT)
            case FaultKind.DRAIN:
                await self._operation(OperationKind.UNDRAIN, effect.target)
            case FaultKind.KILL | FaultKind.REPLACE | FaultKind.TRANSFER:
                pass
        await self._drop_way_back(effect.number)

    async def close(self) -> None:
        """End what waits to undo things that have been undone."""
        for number in list(self._ways_back):
            await self._drop_way_back(number)

    def _pid(self, name: str) -> int:
        pid = self.pids().get(name)
        if pid is None:
            raise KevlarFlowError(f"{name} does not run")
        return pid

    async def _way_back(self, effect: Begin, command: str) -> None:
        self._ways_back[effect.number] = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", f"sleep {effect.for_s + LATER_S:.0f}; {command}", start_new_session=True
        )

    async def _drop_way_back(self, number: int) -> None:
        if (shell := self._ways_back.pop(number, None)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            await shell.wait()

    async def _operation(self, kind: OperationKind, node: str) -> None:
        """Ask for it and wait for its end."""
        name = "-".join(filter(None, ("gameday", kind.value, node, secrets.token_hex(3))))
        request = OperationRequest(name, kind.value, node, deadline_s=OPERATION_S, reason=REASON)
        async with self._one_at_a_time:
            await asyncio.to_thread(self._run, request)

    def _run(self, request: OperationRequest) -> None:
        answer = self._admin.submit(request)
        if not answer.accepted or answer.operation is None:
            why = "; ".join(check.message for check in answer.checks if check.level == "fail")
            raise KevlarFlowError(
                f"{request.kind} {request.node}".strip() + f" is refused: {why or 'no reason given'}"
            )
        found = follow(self._admin, answer.operation, time.monotonic() + OPERATION_S, progress)
        if found.state is not OperationState.DONE:
            raise OperationFailed(f"operation {found.id} is {found.state.value}: {found.message}")
