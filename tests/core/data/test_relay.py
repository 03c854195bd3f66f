"""What a host's relay passes on, to whom and when."""

from __future__ import annotations

import msgspec

from controlplane.contract import rpc
from controlplane.contract.ids import Member
from controlplane.contract.reports import NodeReport, RelayedBatch, ReportBatch
from dataplane.core.relay import RECOVERIES_MAX, Line, Relay, Source

A, B = Member("n0", "a"), Member("n1", "b")
BEAT_S = 0.1


def raw(member: Member, seq: int = 1) -> msgspec.Raw:
    return msgspec.Raw(rpc.encode(NodeReport(member, seq, 0.0, 7)))


class Host:
    """A relay with two nodes and a controller that has heard them."""

    def __init__(self) -> None:
        self.relay = Relay(BEAT_S)
        self.line = self.relay.open("c", 0.0)
        self.a, self.b = self.relay.join(A), self.relay.join(B)
        for source in (self.a, self.b):
            self.relay.report(source, raw(source.member), 0.0)
        assert slots(self.line.next(0.0)) == [self.a.slot, self.b.slot]
        self.line.acknowledge(BEAT_S)


def slots(batch: RelayedBatch | None) -> list[int]:
    return [] if batch is None else [slot for slot, _ in batch.reports]


def test_a_batch_reads_as_a_batch_of_reports_and_keeps_what_is_new_in_them() -> None:
    assert RelayedBatch.__struct_fields__ == ReportBatch.__struct_fields__
    newer = msgspec.msgpack.encode([*msgspec.to_builtins(NodeReport(A, 1, 0.0, 7)), "later"])
    relay = Relay(BEAT_S)
    line = relay.open("c", 0.0)
    relay.report(relay.join(A), msgspec.Raw(newer), 0.0)
    encoded = rpc.encode(line.next(0.0))
    batch = rpc.decode_reports(encoded)
    assert batch.relay
    assert batch.reports[0][1] == NodeReport(A, 1, 0.0, 7)
    assert newer in encoded


def test_the_end_of_a_process_is_told_at_once_and_once() -> None:
    host = Host()
    relay, line = host.relay, host.line
    relay.report(host.a, raw(A, 2), 0.01, urgent=False)
    relay.end(A)
    assert line.due_at() == 0.0
    batch = line.next(0.02)
    assert batch is not None
    assert (slots(batch), batch.gone, batch.ended) == ([host.a.slot], (host.a.slot,), (host.a.slot,))
    relay.leave(host.a)  # its stream has broken now
    relay.end(A)
    assert line.next(0.03) is None
    relay.leave(host.b)
    batch = line.next(0.04)
    assert batch is not None
    assert (batch.gone, batch.ended) == ((host.b.slot,), ())


def test_news_go_at_once_and_all_else_at_the_heartbeat() -> None:
    host = Host()
    relay, line = host.relay, host.line
    relay.report(host.a, raw(A, 2), 0.04, urgent=False)
    relay.beat(host.b, 0.04)
    assert line.next(0.05) is None
    assert line.due_at() == BEAT_S
    relay.report(host.b, raw(B, 2), 0.06)
    assert line.due_at() == 0.0
    batch = line.next(0.06)
    assert slots(batch) == [host.a.slot, host.b.slot]  # what waited goes along
    assert batch is not None
    assert batch.beats == ()
    assert not batch.calm
    relay.beat(host.a, 0.08)
    batch = line.next(BEAT_S)
    assert batch is not None
    assert batch.calm
    assert batch.beats == (host.a.slot,)  # what the other one said is sent
    assert line.next(2 * BEAT_S) is None  # nobody was heard since: nobody beats


def test_a_silent_node_does_not_beat_behind_its_relay() -> None:
    host = Host()
    beats = []
    for turn in range(1, 4):
        host.relay.beat(host.a, turn * BEAT_S)
        batch = host.line.next(turn * BEAT_S)
        assert batch is not None
        beats.append(batch.beats)
    assert beats == [(host.a.slot,)] * 3


def test_beats_come_as_rarely_as_the_controller_wants_and_never_in_a_burst() -> None:
    host = Host()
    host.line.acknowledge(2 * BEAT_S)
    sent = []
    for turn in range(1, 9):
        host.relay.beat(host.a, turn * BEAT_S)
        sent.append(host.line.next(turn * BEAT_S) is not None)
    assert sent == [True, False, True, False, True, False, True, False]
    host.relay.beat(host.a, 5.0)
    assert host.line.next(5.0) is not None  # the relay was away
    host.relay.beat(host.a, 5.0)
    assert host.line.due_at() >= 5.0
    assert host.line.next(5.0) is not None
    assert host.line.due_at() > 5.0


def test_nodes_send_whole_reports_as_often_as_the_controller_that_wants_most() -> None:
    host = Host()
    assert host.relay.report_s() == 0.0  # as often as by themselves: nobody has asked for fewer
    host.line.acknowledge(BEAT_S, 2.0)
    assert host.relay.report_s() == 2.0
    other = host.relay.open("d", 0.5)
    assert host.relay.report_s() == 0.0
    other.acknowledge(BEAT_S, 1.5)
    assert host.relay.report_s() == 1.5
    host.relay.close("d")
    assert host.relay.report_s() == 2.0


def test_a_node_whose_stream_ends_is_gone_at_once_after_its_last_words() -> None:
    host = Host()
    host.relay.report(host.a, raw(A, 2), 0.0, urgent=False)
    host.relay.leave(host.a)
    assert host.line.due_at() == 0.0
    batch = host.line.next(0.01)
    assert batch is not None
    assert (slots(batch), batch.gone) == ([host.a.slot], (host.a.slot,))
    host.relay.beat(host.a, 0.02)  # too late
    assert host.line.next(BEAT_S) is None


def test_a_member_that_is_back_is_reported_after_its_old_slot_is_gone() -> None:
    """A receiver refuses two slots of one member, and takes reports before it lets go of slots."""
    host = Host()
    host.relay.leave(host.a)
    fresh = host.relay.join(A)
    host.relay.report(fresh, raw(A, 2), 0.0)
    assert fresh.slot != host.a.slot
    first, second = host.line.next(0.01), host.line.next(0.01)
    assert first is not None
    assert (slots(first), first.gone) == ([], (host.a.slot,))
    assert second is not None
    assert (slots(second), second.gone) == ([fresh.slot], ())


def test_the_newest_stream_of_a_member_speaks_for_it() -> None:
    host = Host()
    fresh = host.relay.join(A)
    assert fresh.slot == host.a.slot
    host.relay.report(host.a, raw(A, 2), 0.0)
    host.relay.leave(host.a)  # the end of the old one says nothing
    assert host.line.next(0.01) is None
    host.relay.report(fresh, raw(A, 3), 0.0)
    assert slots(host.line.next(0.01)) == [fresh.slot]


def test_a_new_controller_is_told_everything_and_counts_once_it_has_answered() -> None:
    host = Host()
    for source in (host.a, host.b):
        host.relay.beat(source, 0.4)
    line = host.relay.open("d", 0.5)
    assert host.relay.heard_by(host.a) == ("c",)
    assert slots(line.next(0.5)) == [host.a.slot, host.b.slot]
    assert host.relay.heard_by(host.a) == ("c",)
    line.acknowledge(BEAT_S)
    assert host.relay.heard_by(host.a) == ("c", "d")
    late = host.relay.join(Member("n2", "c"))
    assert host.relay.heard_by(late) == ()
    host.relay.close("c")
    assert host.relay.heard_by(host.a) == ("d",)


def test_a_new_stream_to_a_controller_says_nothing_of_a_silent_node_until_it_is_heard() -> None:
    """The controller would count its silence from then on, and from the next stream again."""
    host = Host()
    host.relay.beat(host.b, 4 * BEAT_S)
    for address in ("c", "d"):  # one that lost its stream, and one that is new
        line = host.relay.open(address, 5 * BEAT_S)
        assert slots(line.next(5 * BEAT_S)) == [host.b.slot]
        line.acknowledge(BEAT_S)
    assert host.relay.heard_by(host.a) == ()
    host.relay.beat(host.a, 5.5 * BEAT_S)  # it goes on
    for line in host.relay.lines.values():
        batch = line.next(6 * BEAT_S)
        assert batch is not None
        assert (batch.reports, batch.beats) == (((host.a.slot, raw(A)),), ())
    assert host.relay.heard_by(host.a) == ("c", "d")


def test_a_stopped_node_is_not_passed_on_because_the_controller_is_in_no_hurry() -> None:
    """What it said last counts for one and a half of its own heartbeats, however rarely the relay speaks."""
    host = Host()
    host.line.acknowledge(5 * BEAT_S)
    assert host.line.next(BEAT_S) is None
    host.relay.report(host.a, raw(A, 2), 4.2 * BEAT_S, urgent=False)  # and stops
    host.relay.beat(host.b, 4.7 * BEAT_S)
    batch = host.line.next(6 * BEAT_S)
    assert batch is not None
    assert (slots(batch), batch.beats) == ([], (host.b.slot,))
    host.relay.beat(host.a, 8.2 * BEAT_S)  # once more, by chance
    host.relay.beat(host.b, 10.9 * BEAT_S)
    batch = host.line.next(11 * BEAT_S)
    assert batch is not None
    assert (slots(batch), batch.beats) == ([], (host.b.slot,))
    host.relay.beat(host.a, 15.9 * BEAT_S)  # it goes on, and its report with it
    assert slots(host.line.next(16 * BEAT_S)) == [host.a.slot]


def test_who_was_heard_before_a_beat_of_the_relay_is_in_it_however_late_it_is() -> None:
    host = Host()
    host.line.acknowledge(2 * BEAT_S)
    host.line.next(BEAT_S)
    for moment in (1.9, 2.9):
        host.relay.beat(host.a, moment * BEAT_S)
    batch = host.line.next(5.9 * BEAT_S)
    assert batch is not None
    assert batch.beats == (host.a.slot,)


def test_a_relay_that_was_stopped_for_long_speaks_for_nobody_until_it_has_heard_him() -> None:
    """It beat once more for all who were heard before it was stopped, and they may have died meanwhile."""
    host = Host()
    host.relay.beat(host.a, 0.9 * BEAT_S)
    host.relay.report(host.b, raw(B, 2), 0.9 * BEAT_S, urgent=False)
    assert host.line.next(300 * BEAT_S) is None
    host.relay.beat(host.b, 300.1 * BEAT_S)
    assert slots(host.line.next(301 * BEAT_S)) == [host.b.slot]


def test_news_of_one_node_do_not_bring_what_a_silent_one_said() -> None:
    """Its report was not news, so it waited for a beat of the relay. It was stopped then, and heard all the same."""
    host = Host()
    host.line.acknowledge(20 * BEAT_S)
    host.line.next(BEAT_S)
    host.relay.report(host.a, raw(A, 2), 2.0 * BEAT_S, urgent=False)
    host.relay.report(host.b, raw(B, 2), 3.6 * BEAT_S)
    assert slots(host.line.next(3.6 * BEAT_S)) == [host.b.slot]
    host.relay.report(host.a, raw(A, 3), 3.7 * BEAT_S)  # it goes on
    assert slots(host.line.next(3.7 * BEAT_S)) == [host.a.slot]


def test_counters_are_sent_although_a_newer_report_has_none() -> None:
    host = Host()
    told = [raw(A, seq) for seq in range(2, 8)]
    for seq, report in enumerate(told):
        host.relay.report(host.a, report, 0.0, counters=seq in (0, 3), recoveries=seq == 2)
    batch = host.line.next(0.0)
    assert batch is not None
    assert [report for _, report in batch.reports] == [told[2], told[3], told[5]]
    assert not host.line.earlier


def test_reports_that_tell_recoveries_are_all_sent_in_their_order_and_before_a_goodbye() -> None:
    host = Host()
    told = [raw(A, seq) for seq in range(2, 7)]
    for seq, report in enumerate(told):
        host.relay.report(host.a, report, 0.0, recoveries=seq % 2 == 0)
    host.relay.report(host.b, raw(B, 2), 0.0, recoveries=True)
    batch = host.line.next(0.0)
    assert batch is not None
    assert batch.reports == ((1, told[0]), (1, told[2]), (1, told[4]), (2, raw(B, 2)))

    host.relay.report(host.a, raw(A, 7), 0.0, recoveries=True)
    host.relay.report(host.a, raw(A, 8), 0.0)
    host.relay.report(host.b, raw(B, 3), 0.0)
    host.relay.leave(host.a)
    batch = host.line.next(0.0)
    assert batch is not None
    assert (batch.reports, batch.gone) == (((1, raw(A, 7)), (1, raw(A, 8))), (host.a.slot,))
    assert slots(host.line.next(0.0)) == [host.b.slot]


def waiting(line: Line) -> int:
    return len(line.waiting) + len(line.heard) + len(line.gone)


def test_a_controller_that_takes_nothing_costs_a_bounded_memory() -> None:
    host = Host()
    source: Source = host.a
    for turn in range(1000):
        host.relay.report(source, raw(A, turn), turn, counters=turn % 2 == 0)
        host.relay.report(host.b, raw(B, turn), turn, recoveries=True)
        host.relay.beat(host.b, turn)
        if turn % 3 == 0:
            host.relay.leave(source)
            source = host.relay.join(A)
    assert waiting(host.line) <= 5
    told = [each for _, each in host.line.earlier if each.recoveries]
    assert len(host.line.earlier) <= len(told) + 1
    assert (len(told), host.line.dropped) == (RECOVERIES_MAX, 999 - RECOVERIES_MAX)
    assert set(slots(host.line.next(1000.0))) == {host.a.slot}  # its goodbye
    batch = host.line.next(1000.0)
    assert batch is not None
    assert [report for _, report in batch.reports] == [
        raw(B, turn) for turn in range(999 - RECOVERIES_MAX, 1000)
    ]
