"""What a game day does: faults with their times, and the guard rails (pure). From a file, or drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from controlplane.contract.errors import RequestError
from controlplane.contract.ranges import parsed

FAULTS_MAX = 10_000
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=7 * 86400.0)]


class FaultKind(StrEnum):
    KILL = "kill"  # SIGKILL; its supervisor starts it again
    AWAY = "away"  # SIGKILL, and not started again for `for_s`
    STOP = "stop"  # SIGSTOP for `for_s`, then SIGCONT
    DRAIN = "drain"  # of a node, and undrain after `for_s`
    REPLACE = "replace"  # planned: a fresh process takes a node's place
    TRANSFER = "transfer-leader"


class Role(StrEnum):
    """Whom a fault may be about, where it names no process."""

    NODE = "node"
    GATEWAY = "gateway"
    CONTROLLER = "controller"
    LEADER = "leader"  # whoever leads when the fault begins
    ETCD = "etcd"
    LAUNCHER = "launcher"
    RELAY = "relay"


LASTING = frozenset({FaultKind.AWAY, FaultKind.STOP, FaultKind.DRAIN})
DEFAULT_LASTS_S = 3.0
ROLES_OF = {
    FaultKind.DRAIN: frozenset({Role.NODE}),
    FaultKind.REPLACE: frozenset({Role.NODE}),
    FaultKind.TRANSFER: frozenset({Role.LEADER}),
}


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`target`: a process (n2, g1, c1, etcd0, launcher, relay) or a role, of which one is drawn then."""

    at_s: Seconds  # after the beginning of the faults; later, while a guard rail holds it back
    kind: FaultKind
    target: str = Role.NODE
    for_s: Seconds = DEFAULT_LASTS_S  # of those that last


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A game day. Its file has these names, in TOML."""

    faults: tuple[Fault, ...] = ()
    # No fault begins later, and the load goes on for so long; 0: until all faults are over.
    for_s: Seconds = 0.0
    max_unavailable: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1  # processes, at any time
    # Of a stream without a token; else it ends early.
    pause_max_s: Annotated[float, msgspec.Meta(gt=0.0)] = 10.0
    # Until all is home after a fault; else it ends early.
    home_max_s: Annotated[float, msgspec.Meta(gt=0.0)] = 120.0
    streams: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8  # at a time
    tokens: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 192  # of each
    seed: int = 0  # of what is drawn


def role_of(process: str) -> Role | None:
    """By the names that `kfadmin up` gives; None: it is none of these."""
    for role, prefix in ((Role.ETCD, "etcd"), (Role.NODE, "n"), (Role.GATEWAY, "g"), (Role.CONTROLLER, "c")):
        if process.removeprefix(prefix).isdecimal():
            return role
    return Role(process) if process in (Role.LAUNCHER, Role.RELAY) else None


def load_plan(file: Path | None, given: Mapping[str, Any]) -> Plan:
    """The file's, with what was given on top. Raises RequestError."""
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = parsed(file.read_bytes())
        except OSError as error:
            raise RequestError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise RequestError(f"{file}: {error}") from error
    try:
        plan = msgspec.convert({**found, **given}, Plan)
    except msgspec.ValidationError as error:
        raise RequestError(f"{file or 'options'}: {error}") from error
    return checked(plan)


def checked(plan: Plan) -> Plan:
    """Raises RequestError: which fault makes no sense, and why."""
    if len(plan.faults) > FAULTS_MAX:
        raise RequestError(f"{len(plan.faults)} faults, {FAULTS_MAX} are the most")
    for number, fault in enumerate(plan.faults, 1):
        role = Role(fault.target) if fault.target in tuple(Role) else role_of(fault.target)
        if role is None:
            names = ", ".join(Role)
            raise RequestError(
                f"fault {number}: {fault.target!r} is no process, such as n2, and no role: {names}"
            )
        allowed = ROLES_OF.get(fault.kind, frozenset(Role))
        if role not in allowed:
            raise RequestError(f"fault {number}: {fault.kind.value} is for {', '.join(sorted(allowed))}")
        if fault.kind in LASTING and not fault.for_s:
            raise RequestError(f"fault {number}: {fault.kind.value} needs for_s, how many seconds it lasts")
    return msgspec.structs.replace(plan, faults=tuple(sorted(plan.faults, key=lambda fault: fault.at_s)))


def drawn(seed: int, for_s: float, every_s: float, processes: Sequence[str]) -> tuple[Fault, ...]:
    """Faults at random for `for_s`, one in `every_s` on average; the same for the same arguments.

    The last process of a role is left alone where no other can do its work: gateways, controllers, etcd.
    """
    rng = random.Random(seed)
    count = {role: sum(role_of(name) is role for name in processes) for role in Role}
    menu: list[tuple[FaultKind, Role]] = []
    if count[Role.NODE] > 1:
        menu += 4 * [(FaultKind.KILL, Role.NODE)] + 2 * [
            (FaultKind.STOP, Role.NODE),
            (FaultKind.AWAY, Role.NODE),
        ]
        menu += [(FaultKind.DRAIN, Role.NODE), (FaultKind.REPLACE, Role.NODE)]
    if count[Role.GATEWAY] > 1:
        menu += [(FaultKind.KILL, Role.GATEWAY), (FaultKind.STOP, Role.GATEWAY)]
    if count[Role.CONTROLLER] > 1:
        menu += [
            (FaultKind.KILL, Role.LEADER),
            (FaultKind.KILL, Role.CONTROLLER),
            (FaultKind.STOP, Role.LEADER),
        ]
        menu += [(FaultKind.TRANSFER, Role.LEADER)]
    if count[Role.ETCD] > 2:
        menu += [(FaultKind.KILL, Role.ETCD), (FaultKind.AWAY, Role.ETCD)]
    menu += [(FaultKind.KILL, role) for role in (Role.LAUNCHER, Role.RELAY) if count[role]]
    if not menu:
        raise RequestError("nothing can be taken from this cluster: one process of each kind")
    faults: list[Fault] = []
    at_s = 0.0
    while len(faults) < FAULTS_MAX:
        at_s += rng.uniform(0.5, 1.5) * every_s
        if at_s >= for_s:
            break
        kind, role = rng.choice(menu)
        lasts_s = round(rng.uniform(0.5, 8.0), 1) if kind in LASTING else DEFAULT_LASTS_S
        faults.append(Fault(round(at_s, 1), kind, role, lasts_s))
    return tuple(faults)
