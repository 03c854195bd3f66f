"""The detector's rules: what each kind of evidence, and each pair of kinds, is worth."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.config import TimingConfig
from controlplane.contract.status import NodeState

PHI_SUSPECT = 8.0
PHI_DEAD = 12.0
STUCK_S = 30.0  # a step that does not end although its stage answers: far above any first-call compilation
POISONED_MIN = 2  # a single request may be to blame itself


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of one member at one moment."""

    silent_s: float  # since its last heartbeat, or since it could first have sent one
    phi: float = 0.0
    heard_ever: bool = True
    lease: bool = True  # its registration stands in etcd
    broken: bool = False  # its report stream ended and no other report came
    link_down: str = ""  # why a living neighbour says that its link to it is down
    link_silent_s: float = 0.0  # longest silence that a living neighbour expected to be filled
    neighbour_hears: bool = False  # a living neighbour heard it within dead_after_s
    cut_off: str = ""  # both are heard here, and yet nothing passes between it and this neighbour
    stalled_s: float = 0.0  # a pipeline's oldest step waits for it
    superseded: bool = False  # a newer process of the same node has registered
    leaving: bool = False  # it said that it is about to exit
    stuck_s: float = 0.0  # by its own word its computation takes that long, far longer than usual
    still_s: float = (
        0.0  # by its own word its computation has not advanced for so long, which no slow one does
    )
    poisoned: int = 0  # requests whose numbers were finite when they came and not when they left, of late
    peers_poisoned: bool = False  # its peers had such requests, too: then it is the requests
    probation: str = ""  # why it is not trusted for a while
    deaf: bool = False  # this controller hears nobody at all


def judge(e: Evidence, timing: TimingConfig) -> tuple[NodeState, str]:
    """The rules, first match wins."""
    red, yellow = NodeState.RED, NodeState.YELLOW
    unusual = e.phi >= PHI_SUSPECT or not e.heard_ever or e.silent_s >= timing.dead_after_s
    # Reports may be late on their way: who was just heard on links gets until `dead_after_s`.
    heard = e.neighbour_hears and e.link_silent_s < timing.suspect_after_s
    silent = unusual and e.silent_s >= (timing.dead_after_s if heard else timing.suspect_after_s)
    if e.superseded:
        return red, "a newer process of this node registered"
    if e.leaving:
        return red, "left"
    if e.broken and e.link_down:
        return red, f"report stream broken and link down ({e.link_down})"
    if e.heard_ever and not e.broken and not silent:
        if why := fault(e, timing) or severed(e, timing):
            return red, why
        if e.stalled_s >= timing.dead_after_s or e.stuck_s:
            return yellow, f"its step has not ended for {max(e.stalled_s, e.stuck_s):.1f} s"
        if e.poisoned and not e.peers_poisoned:
            return yellow, "the numbers of a request ceased to be finite here"
        if e.probation:
            return yellow, f"on probation: {e.probation}"
        return NodeState.GREEN, ""  # a lease that is gone says nothing: etcd was away
    if e.neighbour_hears:
        return yellow, "not heard here, but its neighbours hear it"
    if e.link_down and silent:
        return red, f"silent for {e.silent_s:.1f} s and link down ({e.link_down})"
    # Dead processes never said anything to a controller that just started: it waits a little longer.
    if not e.lease and (e.broken or e.silent_s >= _first(e, timing)):
        return red, f"registration gone and silent for {e.silent_s:.1f} s"
    if e.deaf:
        return yellow, "this controller hears nobody"
    if e.heard_ever and _long_silent(e, timing.dead_after_s):
        if e.broken:
            return red, f"report stream broken, silent for {e.silent_s:.1f} s"
        if e.link_silent_s >= timing.dead_after_s or e.stalled_s >= timing.dead_after_s:
            return red, f"silent for {e.silent_s:.1f} s, on links too"
        if e.silent_s >= 2 * timing.dead_after_s:
            return red, f"silent for {e.silent_s:.1f} s"
    if not e.heard_ever:
        return yellow, "registered, not heard yet"
    return yellow, "report stream broken" if e.broken else f"silent for {e.silent_s:.1f} s"


def fault(e: Evidence, timing: TimingConfig) -> str:
    """What is wrong with a process that answers: why it has to be restarted, or nothing."""
    if e.still_s:
        return f"answers, but its computation has not ended and stands still for {e.still_s:.1f} s"
    if e.stuck_s and e.stalled_s >= timing.dead_after_s:  # its own word, and a scheduler's
        return f"answers, but its computation has not ended for {e.stuck_s:.1f} s"
    if e.stalled_s >= STUCK_S:
        return f"answers, but its step has not ended for {e.stalled_s:.0f} s"
    if e.poisoned >= POISONED_MIN and not e.peers_poisoned:
        return f"the numbers of {e.poisoned} requests ceased to be finite here, and nowhere else"
    return ""


def severed(e: Evidence, timing: TimingConfig) -> str:
    """Why a sound process cannot serve where it does: a link that its pipeline needs is broken. Or nothing."""
    if e.cut_off and e.stalled_s >= timing.dead_after_s:
        return f"heard here, but nothing passes between it and {e.cut_off}, and its pipeline waits for it"
    return ""


def _first(e: Evidence, timing: TimingConfig) -> float:
    return timing.suspect_after_s if e.heard_ever else timing.dead_after_s


def _long_silent(e: Evidence, limit_s: float) -> bool:
    """Long by the clock and by this member's own rhythm; three times the limit is long for anybody."""
    return e.silent_s >= limit_s and (e.phi >= PHI_DEAD or e.silent_s >= 3 * limit_s)
