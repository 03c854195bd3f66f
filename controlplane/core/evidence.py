"""The detector's rules: what each kind of evidence, and each pair of kinds, is worth.

Kinds are independent if no single broken path explains both. Silence on reports and the end of their stream are one
kind: both come of the path to this controller. What neighbours say of their links is another, the registration (a lease
in etcd, renewed by the process itself) a third, a step that does not end a fourth. A lease that stands and a neighbour
that hears are evidence of life: against them one kind is never enough. Proof is another thing: the end of a process
that its own kernel tells needs no second witness.
"""

from __future__ import annotations

import msgspec

from controlplane.contract.config import TimingConfig
from controlplane.contract.status import NodeState

PHI_SUSPECT = 8.0
PHI_DEAD = 12.0
STUCK_S = 30.0  # a step that does not end although its stage answers: far above any first-call compilation
POISONED_MIN = 2  # a single request may be to blame itself


class Evidence(msgspec.Struct, frozen=True):
    """All that is known of one member at one moment. A Struct: in a storm hundreds are made, and a frozen dataclass
    takes three times as long to make."""

    silent_s: float  # since its last heartbeat, or since it could first have sent one
    phi: float = 0.0  # 0 in a silence that is too short to count
    heard_ever: bool = True
    lease: bool = True  # its registration stands in etcd
    broken: bool = False  # its report stream ended and no other report came
    # ... in the middle of talking, as with a process that ends: a cut is silent for a while before. And no neighbour
    # has heard it since.
    abrupt: bool = False
    link_down: str = ""  # why a living neighbour says that its link to it is down
    link_silent_s: float = 0.0  # longest silence that a living neighbour expected to be filled
    neighbour_hears: bool = False  # a living neighbour heard it within dead_after_s
    cut_off: str = ""  # both are heard here, and yet nothing passes between it and this neighbour
    stalled_s: float = 0.0  # a pipeline's oldest step waits for it
    superseded: bool = False  # a newer process of the same node has registered
    leaving: bool = False  # it said that it is about to exit
    ended: bool = False  # its process is no more: the kernel of its host says so
    stuck_s: float = 0.0  # by its own word its computation takes that long, far longer than usual
    # By its own word its computation has not advanced for so long, which no slow one does.
    still_s: float = 0.0
    poisoned: int = 0  # requests whose numbers were finite when they came and not when they left, of late
    peers_poisoned: bool = False  # its peers had such requests, too: then it is the requests
    probation: str = ""  # why it is not trusted for a while
    relapses: float = 1.0  # how many times as long as at first
    deaf: bool = False  # this controller hears fewer than half of those that are registered, or nobody


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
    if e.ended:
        return red, "its process has ended"
    # Who hears few others may share the broken path with the few that it does hear.
    if e.broken and e.link_down and (e.abrupt or not (e.neighbour_hears or e.deaf)):
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
        if not e.deaf and (why := severed(e, timing)):
            return red, why
        return yellow, "not heard here, but its neighbours hear it"
    # Dead processes never said anything to a controller that just started: it waits a little longer.
    if not e.lease and (e.broken or e.silent_s >= _first(e, timing)):
        return red, f"registration gone and silent for {e.silent_s:.1f} s"
    if e.deaf:
        return yellow, "this controller hears too few to tell"
    if e.link_down and silent:
        return red, f"silent for {e.silent_s:.1f} s and link down ({e.link_down})"
    if e.heard_ever and _long_silent(e, timing.dead_after_s):
        if e.link_silent_s >= timing.dead_after_s:
            return red, f"silent for {e.silent_s:.1f} s, on links too"
        if e.stalled_s >= timing.dead_after_s:
            return red, f"silent for {e.silent_s:.1f} s, and its pipeline waits for it"
    if not e.heard_ever:
        return yellow, "registered, not heard yet"
    # One kind alone: a process that is gone loses its registration soon.
    return yellow, "report stream broken" if e.broken else f"silent for {e.silent_s:.1f} s"


def may_live(e: Evidence, timing: TimingConfig) -> bool:
    """Whether one that is red may serve all the same, or go on in a moment: where nobody can take its place, it stays.

    Not who was outlived, has left, has closed its connections, or is alive and does not work. One that is stopped or
    cut off may, as long as it is registered; and longer, if no neighbour misses it: then it may be serving.
    """
    if (
        e.superseded
        or e.leaving
        or e.ended
        or (e.broken and e.link_down)
        or fault(e, timing)
        or severed(e, timing)
    ):
        return False
    missed = e.link_down or e.link_silent_s >= timing.dead_after_s
    return e.lease or not missed


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
        return f"nothing passes between it and {e.cut_off}, though it is heard, and its pipeline waits for it"
    return ""


def plain(e: Evidence, timing: TimingConfig) -> bool:
    """Whether nothing at all speaks against a member: it need not be looked at again before there is news of it."""
    accused = e.broken or e.link_down or e.cut_off or e.stalled_s or e.superseded or e.leaving or e.ended
    own = e.stuck_s or e.still_s or e.poisoned or e.probation
    return e.heard_ever and not accused and not own and e.silent_s < timing.suspect_after_s


def _first(e: Evidence, timing: TimingConfig) -> float:
    return timing.suspect_after_s if e.heard_ever else timing.dead_after_s


def _long_silent(e: Evidence, limit_s: float) -> bool:
    """Long by the clock and by this member's own rhythm; three times the limit is long for anybody."""
    return e.silent_s >= limit_s and (e.phi >= PHI_DEAD or e.silent_s >= 3 * limit_s)
