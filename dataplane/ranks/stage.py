"""A stage that several ranks compute together, and that goes on with those that are left when some end.

Sums over ranks are exact (kernels/ranks/sums.h), so tokens do not depend on how many ranks there are. A step in which a
rank is lost is computed again by the others: it writes the same numbers to the same slots of the KV cache, in memory
that the node owns and all ranks share. A rank that is lost is started again. It packs its weights while the others
serve, as they do theirs, and all change to the layout with it between two steps.

A step sees by itself who is lost in it. Between steps a thread looks after the ranks, so that one that ends then is
replaced without a request that has to wait for it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from controlplane.backoff import Backoff
from controlplane.contract.lifetime import end
from dataplane.core.ranks.dealing import deal_rows
from dataplane.ranks.box import Rows, Sizes, StepBox
from dataplane.ranks.messages import MESSAGE_MAX, Answer, Done, Over, Prepare, Ready, Step, Unfit, Use
from dataplane.ranks.process import ENCODER, NotForked, Work, fork_parent, received_rank
from kernels.base import PagedCache, StageSpec, StepArrays
from kernels.cpu.rank import SharedHeads
from kernels.ranks.exchange import Exchange, make_memory
from kernels.ranks.layout import Layout, deal
from kernels.ranks.own import check_dense, shape_of

log = logging.getLogger(__name__)

ANSWERS = msgspec.msgpack.Decoder(Answer)
LOOK_S = 0.05  # between two looks at what ranks that do not answer are doing
STOPPED_S = 0.1  # a rank that is stopped is waited for that long: before anybody suspects the node
IDLE_STOPPED_S = 0.25  # while nothing is computed
# A rank that computes waits for another one that long, and the node for an end that it has asked for.
MISSING_S = 5.0
PREPARE_LIMIT_S = 600.0  # packing the weights of a large stage
FRESH_MAX = 3  # times that all ranks are started at once for one step
START_LIMIT_S = 10.0  # a fork
RESTART_FIRST_S, RESTART_MAX_S = 0.05, 10.0


class RanksGone(Exception):
    """No rank of the stage can be had."""


@dataclass(slots=True)
class Rank:
    """A rank's process, as the node sees it."""

    number: int
    pid: int
    socket: socket.socket
    pidfd: int
    ready: int = -1  # the newest layout that it has prepared

    def send(self, message: Prepare | Use | Step, fds: Iterable[int] = ()) -> bool:
        """Whether it is there to be told."""
        try:
            socket.send_fds(self.socket, [ENCODER.encode(message)], list(fds))
        except OSError:
            return False
        return True

    def answer(self) -> Answer | None:
        """What it says next; None if it is gone."""
        try:
            data = self.socket.recv(MESSAGE_MAX)
        except OSError:
            return None
        if not data:
            return None
        said: Answer = ANSWERS.decode(data)
        if isinstance(said, Ready):
            self.ready = max(self.ready, said.layout_id)
        return said

    @property
    def ended(self) -> bool:
        return self._ends_within(0)

    def _ends_within(self, limit_s: float) -> bool:
        # Not select(): it takes no descriptor from 1024 on, which a node with many links has.
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    @property
    def stopped(self) -> bool:
        """By a signal, so that it will not answer."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:
            return False  # it has ended, which its socket says

    def end(self) -> None:
        """It writes nothing any more when this returns."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._ends_within(MISSING_S)
        self.socket.close()
        os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Shared:
    """A layout and the exchange of its ranks; `exchange` is the node's end, with which it ends it. deadline_s
    (monotonic): for all to be ready."""

    id: int
    layout: Layout
    exchange: Exchange
    deadline_s: float


class RankedStage:
    """See kernels.base.StageKernels. Must be made before its process has a thread. `lost` counts ranks that ended. The
    process ends if no rank can be had while nothing is computed.

    kv: a cache in memory that is shared with forks. rows_max: tokens of a step. context_max: positions of the longest
    row. Raises ValueError for a stage that cannot be cut, OSError, MemoryError, RanksGone."""

    def __init__(
        self, spec: StageSpec, kv: PagedCache, ranks: int, *, threads: int, rows_max: int, context_max: int
    ) -> None:
        check_dense(spec)
        if kv.kv_heads < 1 or spec.heads % kv.kv_heads:
            raise ValueError(f"{spec.heads} heads over {kv.kv_heads} KV heads")
        self.suspect = False
        self._is_last = spec.head is not None
        self.wanted, self.lost = ranks, 0
        self._lost_unix_s = 0.0  # the last one, for people
        self._kv = kv  # keeps the memory alive
        self._shape = shape_of(spec, kv.kv_heads)
        self._numbers_max = rows_max * spec.hidden
        vocabulary = 0 if spec.head is None else len(spec.head.tensor)
        width_max = -(-context_max // kv.block_size)
        is_bf16 = kv.dtype == "bfloat16"
        self._box = StepBox(rows_max, width_max, spec.hidden, is_bf16, spec.embed is not None, vocabulary)
        work = Work(spec, SharedHeads(kv), self._box, threads, MISSING_S)
        self._asked, self._parent = fork_parent(work)
        self._asked.settimeout(START_LIMIT_S)
        self._ranks: dict[int, Rank] = {}
        self._layouts = 0  # made so far
        self._layout: Layout | None = None  # that is in use
        self._restart = {rank: Backoff(RESTART_FIRST_S, RESTART_MAX_S) for rank in range(ranks)}
        self._due: dict[int, float] = {}  # ranks that are to be started again, and when
        self._refused = ""  # what kept a rank from a layout, the last time
        self._next: Shared | None = None  # with ranks that have been started again, once all are ready
        self._lock = threading.Lock()  # of all of this: a step has it, or whoever looks after the ranks
        self._closing = False
        self._stood: dict[int, float] = {}  # processes that are stopped, and since which look
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._change_to(self._agree_anyhow(()))
        except BaseException:
            self._end_all()
            raise
        self._watch = threading.Thread(target=self._look_after, name="ranks", daemon=True)
        self._watch.start()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that compute."""
        return self._now.layout.ranks

    def pid(self, rank: int) -> int:
        """Raises KeyError for a rank that is not running."""
        return self._ranks[rank].pid

    def troubles(self) -> tuple[str, ...]:
        """How many ranks are missing, and since when, in words."""
        if (computing := len(self.ranks)) == self.wanted:
            return ()
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self._lost_unix_s))
        return (f"{computing} of {self.wanted} ranks compute; the last loss was at {since} UTC",)

    def warm_up(self) -> None:
        """Nothing is compiled or captured on a CPU."""

    def beats(self) -> int | None:
        """Ranks look after each other: one that hangs is missed by the others, and ended."""
        return None

    def close(self) -> None:
        """Ends all its processes."""
        self._closing = True
        os.eventfd_write(self._woken, 1)
        self._watch.join()
        self._end_all()

    def _end_all(self) -> None:
        os.close(self._woken)
        for rank in list(self._ranks):
            self._drop(rank)
        self._asked.close()  # its parent of ranks ends with it
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._parent, 0)

    def forward(
        self, source: npt.NDArray[np.int64] | Buffer, step: StepArrays, picked: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.generic]:
        if len(step.positions) < 1:
            raise ValueError("a step needs at least one token")
        with self._lock:
            self._mend()
            self._take_in()
            self._stood.clear()  # a step looks for itself
            sizes = self._box.put(source, step, picked)
            rows = self._box.rows(sizes)
            ended = 0  # times that the step took every rank
            while lost := self._compute(sizes, rows):
                ended += lost.issuperset(self.ranks)
                self._go_on_without(lost)
                if ended == FRESH_MAX:
                    raise RanksGone(f"all ranks of the stage ended in one step, {FRESH_MAX} times in a row")
            out = self._box.out(sizes)
            return out if self._is_last else out.copy()

    # ------------------------------------------------------------------ a step

    def _compute(self, sizes: Sizes, rows: Rows) -> set[int]:
        """By the ranks of the present layout. Returns those that were lost in it; none: the step is computed. Raises
        ValueError or IndexError for a step that does not fit."""
        now, order = self._now, self._now.layout.ranks
        lost = self._send_step(sizes, rows)
        asked = set(order)
        unfit: Unfit | None = None
        suspect = False
        began, is_over = time.monotonic(), False  # the latter: the exchange was ended
        # By when the others have to answer, after one has computed the step or the exchange was ended.
        due = math.inf
        while True:
            at = time.monotonic()
            if at - began > STOPPED_S:
                lost |= {number for number in asked if self._ranks[number].stopped}
            if at > due:
                lost |= asked
            if (lost or unfit) and not is_over:
                now.exchange.abort()
                is_over, due = True, at + MISSING_S
            asked -= lost
            if not asked:
                break
            for number, answer in self._answers(asked, LOOK_S):
                match answer:
                    case Ready():
                        continue
                    case Unfit(layout_id, error) if layout_id != now.id:
                        self._call_off(error)
                        continue
                    case Unfit():
                        unfit = answer
                    case Done(_, is_suspect):
                        suspect = suspect or is_suspect
                        # All sums are made. What is left is alike, and shorter than what was before it.
                        due = min(due, at + max(MISSING_S, at - began))
                    case Over(_, missing) if missing >= 0:
                        lost.add(order[missing])
                    case None:
                        lost.add(number)
                asked.discard(number)
        if unfit is not None and not lost:
            self._change_to(self._agree_anyhow(order))  # their exchange is over
            raise (IndexError if unfit.is_index else ValueError)(unfit.error)
        self.suspect = suspect
        return lost

    def _send_step(self, sizes: Sizes, rows: Rows) -> set[int]:
        """To all ranks; those that cannot be told are lost."""
        layout = self._now.layout
        dealt: list[list[int]] = [[] for _ in layout.ranks]
        if layout.heads_data_parallel:
            counts, contexts = np.diff(rows.cu_q).tolist(), rows.context_lens.tolist()
            dealt = deal_rows(counts, contexts, len(layout.ranks))
        size = (sizes.tokens, sizes.rows, sizes.width, sizes.picked)
        return {
            number
            for at, number in enumerate(layout.ranks)
            if not self._ranks[number].send(Step(self._now.id, *size, tuple(dealt[at]), at == 0))
        }

    def _answers(self, asked: set[int], limit_s: float) -> list[tuple[int, Answer | None]]:
        """The next of each of these ranks that has one, within a time."""
        poll = select.poll()
        by_fd = {self._ranks[number].socket.fileno(): number for number in asked}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        return [(by_fd[fd], self._ranks[by_fd[fd]].answer()) for fd, _ in poll.poll(limit_s * 1000)]

    # ------------------------------------------------------------------ between steps

    def _look_after(self) -> None:
        """Until the stage is closed."""
        try:
            while not self._closing:
                with self._lock:
                    self._tend()
                    signs, wait_s = self._signs(time.monotonic())
                signs.poll(wait_s * 1000)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._woken)
        except Exception:  # what would end a step: it ends the node at once, so that no request waits for it
            log.exception("the ranks of the stage cannot go on")
            end(1)

    def _tend(self) -> None:
        """Sees which ranks have ended, or do not go on, and goes on with the others."""
        self._mend()
        now = time.monotonic()
        stopped = {number: rank.pid for number, rank in self._ranks.items() if rank.stopped}
        self._stood = {pid: self._stood.get(pid, now) for pid in stopped.values()}
        lost = {number for number, pid in stopped.items() if now - self._stood[pid] >= IDLE_STOPPED_S}
        lost |= {number for number, rank in self._ranks.items() if rank.ended}
        if computing := lost & set(self.ranks):
            self._go_on_without(computing)
        if gone := lost - computing:
            self._call_off(f"of ranks {sorted(gone)} a process ended or was stopped as it was prepared", gone)
        self._take_in()

    def _signs(self, now: float) -> tuple[select.poll, float]:
        """What tells that there is something to do, and how long to wait for it."""
        signs = select.poll()
        signs.register(self._woken, select.POLLIN)
        for rank in self._ranks.values():
            signs.register(rank.pidfd, select.POLLIN)
        if self._next is not None:
            for number in self._unready(self._next):
                signs.register(self._ranks[number].socket, select.POLLIN)
        due = min(self._due.values(), default=now + IDLE_STOPPED_S)
        return signs, min(IDLE_STOPPED_S, max(0.0, due - now))

    # ------------------------------------------------------------------ ranks go and come

    def _go_on_without(self, lost: set[int]) -> None:
        """The others agree on a layout; those that are lost are ended for good, and started again soon."""
        now = time.monotonic()
        for number in lost:
            self._forget(number, now)
        left = [number for number in self._now.layout.ranks if number in self._ranks]
        log.warning("ranks %s are lost: %d of %d go on", sorted(lost), len(left), self.wanted)
        self._change_to(self._agree_anyhow(left))

    def _mend(self) -> None:
        """After a step that ended without a layout for those that are left: they are asked again."""
        left = [number for number in self.ranks if number in self._ranks]
        if len(left) < len(self.ranks):
            self._change_to(self._agree_anyhow(left))

    def _change_to(self, shared: Shared) -> None:
        self._now, self._layout = shared, shared.layout
        for number in shared.layout.ranks:
            self._ranks[number].send(Use(shared.id))

    def _forget(self, number: int, now: float) -> None:
        self.lost += 1
        self._lost_unix_s = time.time()
        self._drop(number)
        self._due[number] = now + self._restart[number].next_s()

    def _take_in(self) -> None:
        """Starts ranks that are due, and changes to the layout with them once everybody is ready for it."""
        if not self._due and len(self._ranks) == len(self.ranks):
            return
        at = time.monotonic()
        due = [number for number, when in self._due.items() if when <= at]
        for number in due:
            del self._due[number]
            self._start(number)
        if len(self._ranks) == len(self.ranks):
            return
        if self._next is None:
            try:
                self._next = self._prepare(self._ranks)
            except (OSError, MemoryError) as error:
                self._call_off(error)
                return
        if at > self._next.deadline_s:
            self._call_off("not all ranks were ready in time")
            return
        for number, answer in self._answers(self._unready(self._next), 0):
            match answer:
                case None if number not in self.ranks:  # it never computed
                    self._call_off(f"rank {number} ended as it was prepared", {number})
                    return
                case Unfit():
                    self._call_off(answer.error)
                    return
        if not self._unready(self._next):
            self._change_to(self._next)
            self._next = None
            log.info("%d of %d ranks compute", len(self.ranks), self.wanted)
            for number in self.ranks:
                self._restart[number].succeeded()
            if len(self._ranks) > len(self.ranks):
                os.eventfd_write(self._woken, 1)  # others have been started since this layout was made

    def _call_off(self, why: object, gone: set[int] | None = None) -> None:
        """The layout that is being prepared cannot be had: of the ranks that were to be taken in these, or all, are
        started again later, after a longer pause each time. Those that are left are taken in without them."""
        log.error("ranks cannot be taken in: %s", why)
        self._next = None
        for number in gone or [number for number in self._ranks if number not in self.ranks]:
            self._forget(number, time.monotonic())
        os.eventfd_write(self._woken, 1)

    def _unready(self, shared: Shared) -> set[int]:
        return {number for number in shared.layout.ranks if self._ranks[number].ready != shared.id}

    def _agree_anyhow(self, numbers: Iterable[int]) -> Shared:
        """A layout of these ranks, or of all that are left of them, or of fresh ones, in place of any that was being
        prepared. Raises RanksGone."""
        self._next, self._refused = None, ""
        agreed = self._agree(numbers)
        for _ in range(FRESH_MAX):
            if agreed is not None:
                return agreed
            self._due.clear()
            for number in range(self.wanted):
                if number not in self._ranks:
                    self._start(number)
            if not self._ranks:  # none could be forked: whoever keeps the limit may need a moment
                time.sleep(max(0.0, min(self._due.values()) - time.monotonic()))
            agreed = self._agree(sorted(self._ranks))
        if agreed is not None:
            return agreed
        why = f"; the last one said: {self._refused}" if self._refused else ""
        raise RanksGone(f"all ranks of the stage have ended or refused, {FRESH_MAX} times in a row{why}")

    def _agree(self, numbers: Iterable[int]) -> Shared | None:
        """A layout for which all its ranks are ready: of these, but for some that may be lost meanwhile. None if all
        of them are."""
        wanted = set(numbers)
        while wanted:
            try:
                shared = self._prepare(wanted)
            except (OSError, MemoryError) as error:
                lost = {max(wanted)}  # fewer need less, and one that ends gives back what it has
                self._refuse(max(wanted), error)
            else:
                lost = self._lost_until_ready(shared)
                if not lost:
                    return shared
            for number in lost:
                self._forget(number, time.monotonic())
            wanted -= lost
        return None

    def _lost_until_ready(self, shared: Shared) -> set[int]:
        """Waits until every rank is ready for the layout, or is lost. One that cannot prepare it counts as lost: a
        fresh process may be able to, for instance with the memory that this one gives back."""
        lost: set[int] = set()
        while asked := self._unready(shared) - lost:
            for number, answer in self._answers(asked, LOOK_S):
                match answer:
                    case Unfit(layout_id=layout_id, error=error) if layout_id == shared.id:
                        self._refuse(number, error)
                        lost.add(number)
                    case None:
                        lost.add(number)
            if time.monotonic() > shared.deadline_s:
                lost |= asked
            lost |= {number for number in asked if number not in lost and self._ranks[number].stopped}
        return lost

    def _refuse(self, number: int, why: object) -> None:
        log.error("rank %d has no part in the layout: %s", number, why)
        self._refused = str(why) or type(why).__name__

    def _prepare(self, numbers: Iterable[int]) -> Shared:
        """Everybody is told of a layout of these ranks; they keep what they have as far as it allows."""
        layout = deal(self._shape, numbers, self._layout)
        memory = make_memory(len(layout.ranks), self._numbers_max)
        try:
            exchange = Exchange(memory, len(layout.ranks), 0, self._numbers_max)
            shared = Shared(self._layouts, layout, exchange, time.monotonic() + PREPARE_LIMIT_S)
            self._layouts += 1
            for number in layout.ranks:
                order = Prepare(shared.id, replace(layout, planes=()), self._numbers_max)
                self._ranks[number].send(order, [memory])
        finally:
            os.close(memory)
        return shared

    def _start(self, number: int) -> None:
        """Or again later, if it cannot be forked now. Raises RanksGone."""
        try:
            self._asked.send(str(number).encode())
            pid, sock, pidfd = received_rank(self._asked)
        except NotForked as error:
            log.warning("rank %d cannot be started now: %s", number, error)
            self._lost_unix_s = self._lost_unix_s or time.time()  # it may be missing from the beginning
            self._due[number] = time.monotonic() + self._restart[number].next_s()
            os.eventfd_write(self._woken, 1)
            return
        except OSError as error:
            raise RanksGone(f"rank {number} cannot be started: {error}") from error
        self._ranks[number] = Rank(number, pid, sock, pidfd)
        os.eventfd_write(self._woken, 1)  # one more to look after

    def _drop(self, number: int) -> None:
        self._ranks.pop(number).end()
