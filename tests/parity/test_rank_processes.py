"""A stage of rank processes keeps its bits whoever of them ends, stops or comes back, at any point of a step."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataplane.kvcache import KVCache
from dataplane.ranks.box import Rows, StepBox
from dataplane.ranks.process import NotForked, received_rank
from dataplane.ranks.stage import Rank, RankedStage
from kernels.base import Linear, Mlp, StageSpec
from kernels.quantised import int8_rows
from tests.parity.rank_group import BLOCK, BLOCKS, HEAD_DIM, HIDDEN, random_spec
from tests.parity.rank_processes import LIMIT_S, ROWS_MAX, SCENARIOS


@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(2, "float32"), (4, "bfloat16"), (6, "bfloat16"), (8, "float32")]
)
def test_ranks_end_and_come_back(kv_heads: int, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.rank_processes", str(kv_heads), dtype],
        capture_output=True,
        text=True,
        timeout=len(SCENARIOS) * LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal to the bit\n")


def test_a_rank_that_cannot_be_had_now_is_told_from_a_parent_that_is_gone() -> None:
    """A node that may open no more files gets a message without its descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for message, why in ((b"-11", "Resource temporarily unavailable"), (b"123", "Too many open files")):
        theirs.send(message)
        with ours.dup() as asked, pytest.raises(NotForked, match=why):
            received_rank(asked)
    theirs.close()
    with ours, pytest.raises(ConnectionError):
        received_rank(ours)


def test_a_rank_ends_in_a_node_with_many_descriptors() -> None:
    """select() takes none from 1024 on: the step that lost a rank, and the node, would end with a ValueError."""
    process = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(process.pid)
    high = fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 1024)
    os.close(pidfd)
    ours, theirs = socket.socketpair()
    rank = Rank(0, process.pid, ours, high)
    with theirs:
        assert not rank.ended
        rank.end()
    assert process.wait(0) == -signal.SIGKILL


def test_quantised_weights_are_refused_before_anything_is_forked() -> None:
    spec = random_spec(2, torch.float32)
    assert spec.head is not None
    layer = spec.layers[1]
    assert isinstance(layer.mlp, Mlp)

    def eight_bits(linear: Linear) -> Linear:
        return replace(linear, weight=int8_rows(linear.tensor))

    def with_layer(**changes: Linear | Mlp) -> StageSpec:
        return replace(spec, layers=(spec.layers[0], replace(layer, **changes), spec.layers[2]))  # type: ignore[arg-type]

    mlp = replace(layer.mlp, gate_up=eight_bits(layer.mlp.gate_up))
    for changed, said in (
        (
            replace(spec, head=replace(spec.head, weight=int8_rows(spec.head.tensor))),
            "the head has quantised",
        ),
        (with_layer(qkv=eight_bits(layer.qkv)), "layer 1 has quantised"),
        (with_layer(mlp=mlp), "layer 1 has quantised"),
    ):
        kv = KVCache(BLOCKS, len(spec.layers), 2, BLOCK, HEAD_DIM, "float32", shared=True)
        with pytest.raises(ValueError, match=said):
            RankedStage(changed, kv, 2, threads=1, rows_max=ROWS_MAX, context_max=BLOCKS * BLOCK)


@pytest.mark.parametrize("embeds", [True, False])
def test_a_step_of_which_a_part_is_missing_is_refused(embeds: bool) -> None:
    """The rest would be what the step before left in the box."""
    box = StepBox(8, 4, HIDDEN, is_bf16=False, embeds=embeds, vocabulary=0)
    source = np.zeros(3, np.int64) if embeds else np.zeros(3 * HIDDEN, np.float32)
    cu_q, lens, picked = np.array([0, 1, 3], np.int32), np.ones(2, np.int32), np.zeros(1, np.int32)
    whole = Rows(np.zeros(3, np.int64), np.zeros(3, np.int64), cu_q, lens, np.zeros((2, 2), np.int32))
    assert box.put(source, whole, picked).tokens == 3
    for given, step, said in (
        (source[:-1], whole, "bytes of input for 3 tokens"),
        (np.append(source, source), whole, "bytes of input for 3 tokens"),
        (source, replace(whole, slots=whole.slots[1:]), "different lengths"),
        (source, replace(whole, cu_q=cu_q[:2]), "different lengths"),
        (source, replace(whole, context_lens=lens[:1]), "different lengths"),
        (source, replace(whole, cu_q=np.array([0, 1, 2], np.int32)), "cu_q must run"),
        (source, replace(whole, cu_q=np.array([0, 4, 3], np.int32)), "cu_q must run"),
    ):
        with pytest.raises(ValueError, match=said):
            box.put(given, step, picked)
    with pytest.raises(ValueError, match="logits of 9 rows"):
        box.put(source, whole, np.zeros(9, np.int32))
