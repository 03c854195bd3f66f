"""From events to incidents: a pure fold, so that history survives the cluster that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from controlplane.contract.events import Event, EventKind
from controlplane.contract.incidents import Affected, Incident


def incidents(rows: Iterable[tuple[int, Event]]) -> list[Incident]:
    """Every failure that the events tell of, oldest first. `rows`: (id, event), oldest first.

    A process that left on purpose is an incident only if it was missed: if a pipeline had to do without it. A recovery
    ends every failure that its pipeline had until then; its phases belong to the failure that led to its epoch.
    """
    found: dict[int, Incident] = {}  # by id
    latest: dict[str, int] = {}  # the last one of each member, as the events name it
    open_of: dict[str, set[int]] = {}  # pipeline -> those that it has not got over
    left: set[int] = set()
    for number, event in rows:
        match event.kind:
            case EventKind.DIED | EventKind.LEFT:
                found[number] = incident = _begun(number, event)
                latest[f"{incident.node}@{incident.incarnation}"] = number
                if event.kind is EventKind.LEFT:
                    left.add(number)
            case EventKind.EPOCH:
                for member in str(event.details.get("died", "")).split(", "):
                    if member in latest:
                        found[latest[member]] = _with(found[latest[member]], _affected(event))
                        open_of.setdefault(event.subject, set()).add(latest[member])
            case EventKind.UNAVAILABLE:
                for key in open_of.get(event.subject, ()):
                    found[key] = _changed(found[key], event, _down)
            case EventKind.RECOVERED:
                touched = open_of.get(event.subject, set())
                for key in touched:
                    found[key] = _changed(found[key], event, _recovered)
                open_of[event.subject] = {key for key in touched if not _over(found[key], event.subject)}
            case _:
                pass
    return [one for key, one in found.items() if one.affected or key not in left]


def _begun(number: int, event: Event) -> Incident:
    silent_s = _seconds(event, "silent_s") or 0.0
    evidence = str(event.details.get("evidence", ""))
    return Incident(
        id=number,
        node=event.subject,
        incarnation=str(event.details.get("incarnation", "")),
        cause=evidence or event.message,
        began_unix_s=event.unix_s - silent_s,
        detect_s=silent_s,
    )


def _affected(event: Event) -> Affected:
    chosen = event.message.removeprefix(f"{event.subject}: ")
    return Affected(event.subject, event.epoch, chosen, plan_s=_seconds(event, "plan_s"))


def _with(incident: Incident, one: Affected) -> Incident:
    """With one more pipeline. Only the first epoch that a death leads to tells of it."""
    if any(known.pipeline == one.pipeline for known in incident.affected):
        return incident
    return replace(incident, affected=(*incident.affected, one))


def _changed(incident: Incident, event: Event, change: Callable[[Affected, Event], Affected]) -> Incident:
    return replace(
        incident,
        affected=tuple(
            change(one, event) if one.pipeline == event.subject and not one.ended_unix_s else one
            for one in incident.affected
        ),
    )


def _down(one: Affected, event: Event) -> Affected:
    return replace(one, down=True) if one.epoch == event.epoch else one


def _recovered(one: Affected, event: Event) -> Affected:
    if one.epoch > event.epoch:  # of an earlier failure, and told late
        return one
    phases = [_seconds(event, name) for name in ("connect_s", "restore_s", "first_token_s")]
    ended = replace(
        one,
        ended_unix_s=(_seconds(event, "seen_unix_s") or event.unix_s) + sum(s or 0.0 for s in phases),
        streams=int(_seconds(event, "requests") or 0),
        tokens_recomputed=int(_seconds(event, "tokens_recomputed") or 0),
    )
    if one.epoch != event.epoch:
        return ended
    return replace(ended, connect_s=phases[0], restore_s=phases[1], first_token_s=phases[2])


def _over(incident: Incident, pipeline: str) -> bool:
    return all(one.ended_unix_s for one in incident.affected if one.pipeline == pipeline)


def _seconds(event: Event, name: str) -> float | None:
    value = event.details.get(name)
    return float(value) if isinstance(value, int | float) else None
