"""A rank's process, and the one that all ranks of a stage are forked from.

The parent of the ranks is itself forked from the node once its weights are mapped and before it has a thread, so that a
rank is running within milliseconds and has the weights, the KV and the box without a copy. All of them end with it."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import torch

from dataplane.ranks.box import Sizes, StepBox
from dataplane.ranks.messages import MESSAGE_MAX, Answer, Done, Order, Over, Prepare, Ready, Step, Unfit, Use
from kernels.base import StageSpec
from kernels.cpu.rank import NO_TOKENS, CpuRank, HeadMemory
from kernels.ranks.exchange import Exchange, ExchangeOver, RankMissing

log = logging.getLogger(__name__)

ERROR_MAX = 2000  # characters of an answer
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
ENCODER, ORDERS = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Order)


@dataclass(frozen=True, slots=True)
class Work:
    """What every rank of a stage has from its fork on. timeout_s: that a rank waits for another one in a sum."""

    spec: StageSpec
    memory: HeadMemory
    box: StepBox
    threads: int
    timeout_s: float


def fork_parent(work: Work) -> tuple[socket.socket, int]:
    """Of the ranks: asked for one by its number, it sends back a socket and a pidfd. Returns the socket to ask by, and
    its process. The caller must have no thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _in_child("kf-ranks", lambda: _parent(theirs, work))
    theirs.close()
    return ours, pid


def _in_child(name: str, run: Callable[[], None]) -> NoReturn:
    """The life of a forked process: whatever happens it never returns into the code of the one it was forked from."""
    code = 1
    try:
        _tie(name)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _tie(name: str) -> None:
    """End with the parent, and only with it: its own signals, and those of a terminal, are the node's to handle."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _parent(asked: socket.socket, work: Work) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them: whoever cares has a pidfd
    while message := asked.recv(16):
        try:
            _fork_rank(int(message), asked, work)
        except OSError as error:  # by a limit, for now: the other ranks must not end with this process
            asked.send(f"-{error.errno or errno.EIO}".encode())


def _fork_rank(rank: int, asked: socket.socket, work: Work) -> None:
    """Raises OSError: then the node was told of none, and one that was forked reads the end of its socket, and ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            pid = os.fork()
            if pid == 0:
                asked.close()
                ours.close()
                _in_child(f"kf-rank{rank}", lambda: RankProcess(rank, theirs, work).serve())
        process = os.pidfd_open(pid)
        try:
            socket.send_fds(asked, [str(pid).encode()], [ours.fileno(), process])
        finally:
            os.close(process)


class RankProcess:
    """Answers one order after the other. A layout is prepared by a thread of its own, while steps go on."""

    def __init__(self, rank: int, sock: socket.socket, work: Work) -> None:
        self._rank, self._socket, self._work = rank, sock, work
        self._used = -1  # the layout that steps are by; -1: none yet
        self._prepared: dict[int, CpuRank] = {}
        self._wanted: set[int] = set()  # layouts; each one that is prepared has weights of its own
        self._lock = threading.Lock()  # of these two

    def serve(self) -> None:
        """Until the node is gone."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_MAX, 1)
            except ConnectionError:  # it is gone and had not read all answers
                return
            if not data:
                return
            match ORDERS.decode(data):
                case Prepare() as order:
                    self._want({self._used, order.layout_id})
                    threading.Thread(target=self._prepare, args=(order, fds[0]), daemon=True).start()
                case Use(layout_id):
                    self._used = layout_id
                    self._want({layout_id})
                case Step() as order:
                    self._answer(self._step(order))

    def _answer(self, answer: Answer) -> None:
        self._socket.send(ENCODER.encode(answer))

    def _want(self, layouts: set[int]) -> None:
        with self._lock:
            self._wanted = layouts
            self._prepared = {at: rank for at, rank in self._prepared.items() if at in layouts}

    def _prepare(self, order: Prepare, fd: int) -> None:
        work, layout = self._work, order.layout
        with self._lock:
            before = self._prepared.get(self._used)
        try:
            with torch.inference_mode():
                at = layout.ranks.index(self._rank)
                exchange = Exchange(fd, len(layout.ranks), at, order.numbers_max)
                rank = CpuRank(
                    work.spec,
                    layout,
                    self._rank,
                    work.memory,
                    exchange,
                    threads=work.threads,
                    timeout_s=work.timeout_s,
                    before=before,
                )
            with self._lock:
                if order.layout_id in self._wanted:
                    self._prepared[order.layout_id] = rank
        except Exception as error:  # whatever it is: the node waits for an answer
            log.exception("rank %d cannot prepare layout %d", self._rank, order.layout_id)
            why = f"{type(error).__name__}: {error}"[:ERROR_MAX]
            self._answer(Unfit(order.layout_id, why, False))
        else:
            self._answer(Ready(order.layout_id))
        finally:
            os.close(fd)

    def _step(self, order: Step) -> Answer:
        with self._lock:
            rank = self._prepared[order.layout_id]
        box = self._work.box
        sizes = Sizes(order.tokens, order.rows, order.width, order.picked)
        try:
            rows, picked = box.rows(sizes), box.picked(sizes)
            owned, places = rows.of(order.owned) if order.owned else (None, NO_TOKENS)
            with torch.inference_mode():
                out = rank.forward(box.source(sizes), rows, picked, owned, places)
        except RankMissing as late:
            return Over(order.layout_id, late.rank)
        except ExchangeOver:
            return Over(order.layout_id, -1)
        except (ValueError, IndexError) as error:
            return Unfit(order.layout_id, str(error), isinstance(error, IndexError))
        if self._work.spec.head is not None:
            own = rank.vocabulary
            box.out(sizes)[:, own.start : own.stop] = out
        elif order.answers:
            box.out(sizes)[:] = out
        return Done(order.layout_id, rank.suspect)


class NotForked(Exception):
    """A rank that cannot be had now; the process that ranks are forked from is there to be asked again."""


def received_rank(asked: socket.socket) -> tuple[int, socket.socket, int]:
    """What the parent of the ranks sends for a rank: its process, its socket and its pidfd. Raises NotForked, and
    OSError if the parent is gone."""
    data, fds, _, _ = socket.recv_fds(asked, 16, 2)
    if len(fds) == 2:
        return int(data), socket.socket(fileno=fds[0]), fds[1]
    for fd in fds:
        os.close(fd)
    if not data:
        raise ConnectionError("the process that ranks are forked from has ended")
    # A rank without both: this process may open no more files. It ends as its socket does.
    number = -int(data) if data.startswith(b"-") else errno.EMFILE
    raise NotForked(os.strerror(number))
