"""What nodes tell the controllers: a heartbeat at a fixed pace, and a whole report at once on news.

A stream carries `ReportBatch`es. Its sender is one node, or the relay of a host, which speaks for all nodes there: what
a controller pays is a message a host, and most of what is in one are numbers of slots. News leaves at once; how often a
sender speaks although there is none is what each controller says in its acknowledgements (`beat_every_s`).
Reports are arrays, half as long as maps: a new field goes to the end, has a default and needs no new schema. The schema
is of its own: it says nothing of values in etcd, whose older writers would step back.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from controlplane.contract.ids import Member, PipelineId
from controlplane.contract.repair import Restoring

REPORT_SCHEMA = 2  # of ReportBatch; 1: reports were maps

BEATS_PER_S_MAX = 500  # messages without news that a controller asks for, of all senders together ...
BEATS_TO_SUSPECT = 3  # ... but so many of each within the silence that makes a member suspect
# A node that computes sends a whole report so often although it has no news, in heartbeats ...
REPORT_BEATS = 5
REPORT_STRETCH_MAX = 4  # ... and to a controller of very many so many times as rarely
REPORTS_PER_S_MAX = 1000  # that a controller asks for without news, of all nodes together


# How the reason begins where the peer speaks another version, so that no link can be opened.
NO_LINK = "no link: "


class LinkReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a node knows of a neighbour through its links: independent evidence of life."""

    peer: Member
    up: bool
    silent_s: (
        float  # seconds since the neighbour was last heard on a link; 0 when it is not expected to speak
    )
    reason: str = ""  # why the link is down
    watch: bool = False  # it is only there for the two to watch each other: no pipeline needs it
    refused: bool = False  # the peer answers in another version (NO_LINK): no sign of its death


LAG_UNKNOWN = 1 << 30  # tokens: what the holder has is not known yet


class TargetReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far behind one copy of a pipeline's KV is, by what its holder acknowledged."""

    target: Member
    lag_tokens: int  # in whole blocks, written here and not acknowledged there
    # As long as that takes at the rate of the last half second; also when it cannot be told.
    behind_s: float = 0.0


class StepTimes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Computations of one size since the process started: nodes of one stage are compared size by size."""

    size: int  # a class of sizes that take about equally long; only to be compared for equality
    steps: int
    busy_us: int  # by the clock, not by the processor: what slows a node down counts


class PipelineReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One pipeline as one of its stages sees it."""

    pipeline: PipelineId
    epoch: int
    stage: int
    last_step: (
        int  # number of the last step that this stage has executed since the last resynchronisation; -1: none
    )
    running: int = 0  # scheduler only: requests in batches
    waiting: int = 0  # scheduler only: requests queued
    quiesced_step: int = -2  # not used: to older leaders, which wait for another value, it is "not quiesced"
    stalled_s: float = 0.0  # scheduler only: age of the oldest step in flight, or question to the stages
    round_s: float = 0.0  # scheduler only: the longest that one of the last steps took
    targets: tuple[TargetReport, ...] = ()
    # Scheduler only: if it is a question that is oldest, the first stage that owes an answer.
    unanswered: int = -1
    tokens: int = 0  # scheduler only: positions of its requests that have KV ...
    tail_tokens: int = 0  # ... and those of them in blocks that are not full, which nobody else has
    token_s: float = 0.0  # scheduler only: what a position costs that is computed again; 0: not measured yet
    step_s: float = 0.0  # scheduler only: how long a step without prompts takes; 0: not measured yet
    # Scheduler only: of `tokens`, those in full blocks of requests that no instance holds; -1: none is to hold any.
    unheld_tokens: int = -1
    # In full blocks of this stage that no parity could bring back now; -1: none is coded.
    uncoded_tokens: int = -1
    # Scheduler only: for each position of a prompt of many steps, several of which are in the stages at a time; 0: not
    # measured yet.
    pace_s: float = 0.0
    chunk_tokens: int = 0  # scheduler only: positions that a step has which computes again what was lost


class RecoveryReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One recovery as the pipeline's scheduler timed it (unix seconds)."""

    pipeline: PipelineId
    epoch: int
    seen_unix_s: float  # the new topology arrived
    connected_unix_s: float  # every stage answered in the new epoch
    restored_unix_s: float  # the positions to resume from are known and the first step was sent
    first_token_unix_s: float  # the first token of the new epoch was emitted; 0 if there was none to emit
    requests: int
    tokens_recomputed: int
    planned: bool  # a move, not a failure


class NodeReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    member: Member
    seq: int  # grows with each report of this member, whichever stream carries it
    unix_s: float
    progress: int  # steps executed since start: a node that answers but does not advance is seen
    pipelines: tuple[PipelineReport, ...] = ()
    links: tuple[LinkReport, ...] = ()
    recoveries: tuple[RecoveryReport, ...] = ()  # new since the last report
    blocks_used: int = 0  # of requests that are served here
    blocks_replica: int = 0  # of copies
    blocks_total: int = 0
    busy_s: float = 0.0  # age of the computation under way; 0: none
    usual_s: float = 0.0  # how long one of its size usually takes here; 0: unknown
    # Of `busy_s`, at the end, without any progress; None: its device cannot tell.
    still_s: float | None = None
    poisoned: int = 0  # requests whose numbers were finite when they came and not when they left
    times: tuple[StepTimes, ...] = ()
    timed_s: float = 0.0  # how long a timer has run since start, again and again ...
    overdue_s: float = 0.0  # ... and of that was overdue, its loop not computing: it does not get to run
    topology_counter: int = 0  # the newest topology this node has acted on
    leaving: bool = False  # the process is about to exit on purpose
    # Monotonic; exported by the controllers as Prometheus counters. Empty: as last said.
    counters: dict[str, int] = {}
    troubles: tuple[str, ...] = ()  # what an operator has to mend, in words
    block_bytes: int = 0  # of one KV block
    restoring: Restoring = Restoring()  # how fast it had blocks restored from parity

    def broken_links(self) -> set[Member]:
        """Neighbours to which the link is down."""
        return {link.peer for link in self.links if not link.up}


class ReportBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one sender has to say at one moment. A slot is the sender's number for one member, good for one stream: the
    first report under it says whose it is."""

    reports: tuple[tuple[int, NodeReport], ...] = ()  # slot and report
    # Slots of members that are heard and whose last report on this stream still holds.
    beats: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()  # slots of members whose own stream to the sender broke
    relay: bool = False  # the sender is no node: its end says nothing of those that it spoke for
    schema: int = REPORT_SCHEMA
    calm: bool = False  # nothing in it is news: a relay may pass it on with its next beat
    # Slots of `gone` whose processes have ended for certain, as their host's kernel says.
    ended: tuple[int, ...] = ()


class RelayedBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A `ReportBatch` as a relay reads and sends it: reports go on as they came, with whatever newer code has added."""

    reports: tuple[tuple[int, msgspec.Raw], ...] = ()
    beats: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    relay: bool = True
    schema: int = REPORT_SCHEMA
    calm: bool = False
    ended: tuple[int, ...] = ()


class ReportHeader(msgspec.Struct, frozen=True, array_like=True):
    """What can be read of any batch, whatever newer code has changed in its reports."""

    reports: msgspec.Raw = msgspec.Raw()
    beats: msgspec.Raw = msgspec.Raw()
    gone: msgspec.Raw = msgspec.Raw()
    relay: bool = False
    schema: int = 1


class ReportAck(msgspec.Struct, frozen=True):
    """The sender is heard. A controller answers the first batch of a stream, and again when it asks for something else:
    to answer each would double what a report costs. A relay answers each, and again when what it says has changed."""

    seq: int  # a relay: batches taken in so far
    # The sender need not speak more often as long as it has no news; 0: at each heartbeat.
    beat_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0
    heard_by: tuple[str, ...] = ()  # a relay: addresses of the controllers that the sender's reports reach
    # A node need not send whole reports more often as long as it has no news; 0: every REPORT_BEATS heartbeats.
    report_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0


def beat_every_s(senders: int, heartbeat_s: float, suspect_after_s: float) -> float:
    """How often each of so many senders is to speak although it has no news: a whole number of heartbeats.

    More rarely than each heartbeat costs no time to find anybody: silence is counted from the last beat, whenever that
    came. What it takes away are beats that may be lost before a member is suspected, so that three are left."""
    beats = math.ceil(senders / BEATS_PER_S_MAX / heartbeat_s)
    return heartbeat_s * max(1, min(beats, int(suspect_after_s / BEATS_TO_SUSPECT / heartbeat_s + 1e-9)))


def report_every_s(nodes: int, heartbeat_s: float) -> float:
    """How often each of so many nodes is to send a whole report while it computes and has no news: a whole number of
    REPORT_BEATS. What such a report brings and a beat does not, is how long its steps take, and figures for people."""
    every_s = REPORT_BEATS * heartbeat_s
    return every_s * max(1, min(math.ceil(nodes / REPORTS_PER_S_MAX / every_s), REPORT_STRETCH_MAX))
