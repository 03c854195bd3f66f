"""The cells: a fault, whom it hits, and what the cluster is doing at that moment. Data only; `play.py` plays them.

Whom: a host's name (`hosts.py`), a role that is looked up when the fault begins ("leader", "candidate", "etcd leader"),
a group: "nodes", "controllers", "gateways", "etcd", "client", "all" (everybody but clients), "p0" and "p1" (their nodes
at home), or several: "n1+n2".

Of four nodes p0 is n0 (stage 0, with the scheduler) and n1 (stage 1), p1 is n2 and n3; n0 and n2, n1 and n3 hold each
other's copies. Of eight p0 is n0 to n3 and p1 is n4 to n7; n0 and n4, n1 and n5, ... hold copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Shape(StrEnum):
    """Two pipelines of so many nodes together."""

    FOUR = "four nodes"
    EIGHT = "eight nodes: not everybody is a neighbour"
    COMPUTING = "four nodes that compute a model"

    @property
    def stages(self) -> int:
        return 4 if self is Shape.EIGHT else 2


class Direction(StrEnum):
    BOTH = "both ways"
    FROM = "only what it sends"
    TO = "only what is sent to it"


@dataclass(frozen=True, slots=True)
class Cut:
    """Packets between `whom` and `others` are dropped; with `flaps`, 0.3 s of every second."""

    whom: str
    others: str = "all"
    direction: Direction = Direction.BOTH
    hold_s: float = 4.0
    flaps: bool = False


@dataclass(frozen=True, slots=True)
class Slow:
    """Packets between `whom` and `others` come late (each way), or, a share of them, never."""

    whom: str
    others: str
    delay_s: float = 0.0
    loss: float = 0.0
    hold_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL; its supervisor starts it again."""

    whom: str


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGSTOP, and SIGCONT after `hold_s`."""

    whom: str
    hold_s: float = 4.0


@dataclass(frozen=True, slots=True)
class DiskFull:
    """Nothing can be written on that host's disk, or on "database", where the event history is."""

    whom: str
    hold_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Hang:
    """One thread stands still and the others run on: the event loop's, or the first one of this name."""

    whom: str
    thread: str = ""
    hold_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Twin:
    """A second process of that name starts on the spare host."""

    whom: str
    hold_s: float = 6.0


class Refusal(StrEnum):
    NO_SPACE = "has the alarm NOSPACE"
    NO_RIGHTS = "asks everybody for a password"


@dataclass(frozen=True, slots=True)
class Refuse:
    """etcd answers, and refuses: writes (NO_SPACE), or all but leases and open watches. `kills`: in that moment."""

    why: Refusal
    kills: str = ""
    hold_s: float = 6.0
    whom: str = "etcd"


Fault = Cut | Slow | Kill | Stop | DiskFull | Hang | Twin | Refuse


class Phase(StrEnum):
    IDLE = "idle"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DRAINING = "draining n1"
    REPLACING = "replacing n1"
    RECOVERING = "recovering from kill -9 of n1"


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    fault: Fault
    phase: Phase = Phase.DECODING
    quick: bool = False  # part of `make test`
    # Pipelines whose epochs end, and no others', from the fault until everybody is at home. (): everybody lives and all
    # that serves can go on, so nobody may be taken for dead either. None: whatever keeps the streams going.
    ends: tuple[str, ...] | None = None
    shape: Shape = Shape.FOUR


def _cells() -> tuple[Cell, ...]:
    both, sent, got = Direction.BOTH, Direction.FROM, Direction.TO
    cells = [
        Cell("cut-n1", Cut("n1"), quick=True),
        Cell("cut-n0", Cut("n0")),
        Cell("cut-n3-long", Cut("n3", hold_s=12.0)),
        Cell("cut-n1-idle", Cut("n1"), Phase.IDLE),
        Cell("cut-n1-prefilling", Cut("n1"), Phase.PREFILLING),
        Cell("cut-n0-prefilling", Cut("n0"), Phase.PREFILLING),
        *(Cell(f"mute-{n}", Cut(n, direction=sent), quick=n == "n0") for n in ("n0", "n1")),
        *(Cell(f"deaf-{n}", Cut(n, direction=got)) for n in ("n0", "n1")),
        *(Cell(f"flap-{n}", Cut(n, hold_s=10.0, flaps=True)) for n in ("n0", "n1")),
        # Links between nodes only: everybody else still hears them.
        Cell("link-n0-n1", Cut("n0", "n1")),
        Cell("link-n2-to-n3", Cut("n2", "n3", sent)),
        Cell("link-n3-to-n2", Cut("n2", "n3", got)),
        Cell("link-n0-n1-flap", Cut("n0", "n1", both, 10.0, True)),
        Cell("link-n1-n3-copies", Cut("n1", "n3")),
        # Gateways.
        Cell("g1-from-n0", Cut("g1", "n0", hold_s=8.0), quick=True),
        Cell("g1-from-nodes", Cut("g1", "nodes")),
        Cell("g1-from-n0-sent", Cut("g1", "n0", sent)),
        Cell("g1-from-n0-got", Cut("g1", "n0", got)),
        Cell("g1-from-etcd", Cut("g1", "etcd", hold_s=8.0)),
        Cell("g1-from-clients", Cut("g1", "client", hold_s=12.0)),
        Cell("g1-alone", Cut("g1", "all")),
        # Control plane.
        Cell("leader-from-etcd", Cut("leader", "etcd", hold_s=8.0)),
        Cell("leader-from-nodes", Cut("leader", "nodes")),
        Cell("candidate-from-nodes", Cut("candidate", "nodes")),
        Cell("leader-alone", Cut("leader", hold_s=8.0)),
        Cell("nodes-from-controllers", Cut("controllers", "nodes")),
        Cell("nodes-from-etcd", Cut("nodes", "etcd", hold_s=8.0)),
        Cell("etcd-leader-alone", Cut("etcd leader", hold_s=8.0)),
        Cell("etcd-follower-alone", Cut("etcd follower", hold_s=8.0)),
        Cell("etcd-flap", Cut("etcd leader", hold_s=10.0, flaps=True)),
        Cell("etcd-no-quorum", Cut("etcd", "etcd", hold_s=8.0)),
        # Whoever decides hears only some of those who live.
        Cell("leader-hears-n0", Cut("leader", "n1+n2+n3", hold_s=8.0), quick=True, ends=()),
        Cell("leader-hears-n0-got", Cut("leader", "n1+n2+n3", got, hold_s=8.0), ends=()),
        Cell("leader-hears-n0-sent", Cut("leader", "n1+n2+n3", sent, hold_s=8.0), ends=()),
        Cell("leader-hears-p0", Cut("leader", "n2+n3", hold_s=8.0), ends=()),
        Cell("leader-hears-stage-1", Cut("leader", "n0+n2", got, hold_s=8.0), ends=()),
        Cell("leader-hears-n0-flap", Cut("leader", "n1+n2+n3", hold_s=10.0, flaps=True), ends=()),
        Cell("candidate-hears-n0", Cut("candidate", "n1+n2+n3", hold_s=8.0), ends=()),
        Cell("controllers-hear-n0", Cut("controllers", "n1+n2+n3", hold_s=8.0), ends=()),
        # One host with the leader and n0, cut off from all other nodes, but not from etcd.
        Cell("leader-and-n0-from-nodes", Cut("leader+n0", "n1+n2+n3", hold_s=10.0)),
        # Delay and loss.
        Cell("delay-50-nodes", Slow("nodes", "nodes", delay_s=0.05)),
        Cell("delay-200-nodes", Slow("nodes", "nodes", delay_s=0.2)),
        Cell("delay-200-n1", Slow("n1", "all", delay_s=0.2)),
        Cell("delay-200-etcd", Slow("etcd", "all", delay_s=0.2)),
        Cell("delay-50-all", Slow("all", "all", delay_s=0.05)),
        Cell("loss-5-nodes", Slow("nodes", "nodes", loss=0.05), quick=True),
        Cell("loss-30-n1", Slow("n1", "all", loss=0.3)),
        Cell("loss-10-gateways", Slow("gateways", "nodes", loss=0.1)),
        Cell("loss-10-delay-50-all", Slow("all", "all", delay_s=0.05, loss=0.1)),
    ]
    for whom in ("n0", "n1", "g1", "leader", "candidate", "etcd leader", "etcd follower"):
        short = whom.replace(" ", "-")
        cells += [Cell(f"kill-{short}", Kill(whom)), Cell(f"stop-{short}", Stop(whom))]
    cells += [
        Cell("kill-n1-idle", Kill("n1"), Phase.IDLE),
        Cell("kill-n0-prefilling", Kill("n0"), Phase.PREFILLING),
        Cell("kill-n1-prefilling", Kill("n1"), Phase.PREFILLING),
        Cell("stop-n1-prefilling", Stop("n1"), Phase.PREFILLING),
        Cell("full-database", DiskFull("database")),
        Cell("full-n1", DiskFull("n1")),
        Cell("full-g1", DiskFull("g1")),
        Cell("full-leader", DiskFull("leader")),
        Cell("full-etcd-follower", DiskFull("etcd follower")),
    ]
    for phase, word in (
        (Phase.DRAINING, "draining"),
        (Phase.REPLACING, "replacing"),
        (Phase.RECOVERING, "recovering"),
    ):
        cells += [
            Cell(f"kill-n0-{word}", Kill("n0"), phase),
            Cell(f"kill-leader-{word}", Kill("leader"), phase),
            Cell(f"cut-n0-{word}", Cut("n0"), phase),
            Cell(f"leader-from-etcd-{word}", Cut("leader", "etcd", hold_s=6.0), phase),
            Cell(f"delay-200-{word}", Slow("nodes", "nodes", delay_s=0.2), phase),
        ]
    cells += [
        Cell("cut-n1-draining", Cut("n1"), Phase.DRAINING),
        # Nobody else may serve stage 1 then: streams wait for n3, and would be given up after 5 s.
        Cell("cut-n3-draining", Cut("n3", hold_s=2.0), Phase.DRAINING),
        Cell("kill-n3-draining", Kill("n3"), Phase.DRAINING),
        Cell("kill-n3-replacing", Kill("n3"), Phase.REPLACING),
        Cell("stop-n3-recovering", Stop("n3"), Phase.RECOVERING),
        Cell("kill-g1-recovering", Kill("g1"), Phase.RECOVERING),
        Cell("full-database-recovering", DiskFull("database"), Phase.RECOVERING),
        Cell("twin-n2", Twin("n2"), ends=()),
        Cell("twin-leader", Twin("leader"), ends=()),
        Cell("twin-g1", Twin("g1"), ends=()),
        Cell("hang-n0", Hang("n0")),
        Cell("hang-n1", Hang("n1")),
        Cell("etcd-no-space", Refuse(Refusal.NO_SPACE), ends=()),
        Cell("etcd-no-space-kill-n1", Refuse(Refusal.NO_SPACE, kills="n1"), ends=("p0",)),
        Cell("etcd-no-space-kill-leader", Refuse(Refusal.NO_SPACE, kills="leader"), ends=()),
        Cell("etcd-no-rights", Refuse(Refusal.NO_RIGHTS), ends=()),
        Cell("etcd-no-rights-kill-n1", Refuse(Refusal.NO_RIGHTS, kills="n1"), ends=("p0",)),
        *_eight(),
        Cell("hang-computing-n1", Hang("n1", thread="kf-compute"), shape=Shape.COMPUTING, ends=("p0",)),
    ]
    assert len({cell.name for cell in cells}) == len(cells)
    return tuple(cells)


def _eight() -> Iterator[Cell]:
    """Partial cuts where most nodes are nobody's neighbours."""
    sent, got = Direction.FROM, Direction.TO
    p0, but_n0, but_stage_1 = ("p0",), "n1+n2+n3+p1", "n0+n2+n3+n4+n6+n7"
    for name, fault, ends in (
        ("leader-hears-n0", Cut("leader", but_n0, hold_s=8.0), ()),
        ("leader-hears-n0-got", Cut("leader", but_n0, got, hold_s=8.0), ()),
        ("leader-hears-n0-flap", Cut("leader", but_n0, hold_s=10.0, flaps=True), ()),
        ("leader-hears-stage-1", Cut("leader", but_stage_1, hold_s=8.0), ()),
        ("leader-hears-stage-1-got", Cut("leader", but_stage_1, got, hold_s=8.0), ()),
        ("leader-hears-p0", Cut("leader", "p1", hold_s=8.0), ()),
        ("candidate-hears-n0", Cut("candidate", but_n0, hold_s=8.0), ()),
        ("controllers-hear-n0", Cut("controllers", but_n0, hold_s=8.0), ()),
        ("n5-from-leader", Cut("n5", "leader", hold_s=8.0), ()),
        ("n5-from-leader-sent", Cut("n5", "leader", sent, hold_s=8.0), ()),
        ("n5-from-leader-got", Cut("n5", "leader", got, hold_s=8.0), ()),
        ("n1-from-neighbours", Cut("n1", "n0+n2+n5"), p0),
        ("n1-from-neighbours-sent", Cut("n1", "n0+n2+n5", sent), p0),
        ("halves-of-p0", Cut("n0+n1", "n2+n3"), p0),
        ("halves-of-p0-sent", Cut("n0+n1", "n2+n3", sent), p0),
        ("p0-from-p1", Cut("p0", "p1"), ()),
        ("leader-and-p0-from-p1", Cut("leader+p0", "p1", hold_s=8.0), None),
        ("leader-and-p0-from-p1-sent", Cut("leader+p0", "p1", sent, hold_s=8.0), None),
    ):
        yield Cell(f"eight-{name}", fault, ends=ends, shape=Shape.EIGHT)


CELLS = _cells()
