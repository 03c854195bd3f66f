"""A value in etcd as its writer sees it: what a watch brings late is never taken for what a read found."""

from __future__ import annotations

from controlplane.core.slot import Slot


def waiting_for_a_read() -> Slot[str]:
    """It knew "b", and does not know what became of "c"."""
    slot: Slot[str] = Slot()
    assert slot.seen("b", 10)
    slot.pending = "c"
    assert slot.failed("c", 1.0)
    assert slot.busy
    return slot


def test_a_watch_that_lags_does_not_end_the_wait_for_a_read() -> None:
    slot = waiting_for_a_read()
    assert not slot.seen("a", 9)
    assert not slot.seen("b", 10)  # a watch that begins anew tells it again
    assert slot.busy
    assert (slot.value, slot.mod_revision) == ("b", 10)
    assert slot.seen("c", 11, read=True)
    assert not slot.busy


def test_a_read_that_is_awaited_may_find_an_older_value() -> None:
    """etcd was restored from a backup."""
    slot = waiting_for_a_read()
    assert slot.seen("a", 4, read=True)
    assert (slot.value, slot.mod_revision, slot.busy) == ("a", 4, False)


def test_what_a_watch_brings_that_is_newer_ends_the_wait() -> None:
    """A write that expected the older revision can take effect no more. The read, when it comes, is the older one."""
    slot = waiting_for_a_read()
    assert slot.seen("d", 12)
    assert not slot.busy
    assert not slot.seen("b", 10, read=True)
    assert slot.value == "d"


def test_a_key_that_is_gone_is_known_by_watch_and_by_read() -> None:
    for read in (False, True):
        slot = waiting_for_a_read()
        assert slot.seen(None, 0, read)
        assert (slot.value, slot.mod_revision, slot.busy) == (None, 0, False)
