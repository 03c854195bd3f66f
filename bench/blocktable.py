"""The arrays of a decode step of 256 sequences: `dataplane/_fast` against the same thing in plain Python.

`fill` is block tables, slots, positions and lengths from rows whose blocks are there. `step` is all that a stage does
to its rows before and after a computation: find requests, grow their blocks, fill, and count what has become valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bench.contract import Result, progress
from controlplane.contract.requests import Sampling
from dataplane._fast._oracle import OracleBlockTable
from dataplane._fast.blocktable import BlockTable
from dataplane.core.blocks import KvStore
from dataplane.core.messages import Admit, Fence, StepMeta, pack_rows
from dataplane.core.request import pack_tokens
from dataplane.core.stage import Stage, join
from dataplane.model.sampler import SamplingTable

SEQUENCES = 256
CONTEXT = 2048  # tokens a sequence has, at most; the shortest has a sixteenth of it
BLOCK = 16
VOCAB = 32_000

Columns = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]


def run(quick: bool) -> Result:
    rounds = 7 if quick else 31
    result = Result(
        "blocktable",
        settings={
            "sequences": SEQUENCES,
            "context": CONTEXT,
            "block_size": BLOCK,
            "rounds": rounds,
            "quick": quick,
        },
    )
    lengths = np.linspace(CONTEXT // 16, CONTEXT - 1, SEQUENCES).astype(np.int32)
    table = BlockTable(SEQUENCES, CONTEXT // BLOCK, BLOCK)
    oracle = OracleBlockTable(SEQUENCES, CONTEXT // BLOCK, BLOCK)
    step = _filled(table, lengths)
    if _filled(oracle, lengths)[0].tolist() != step[0].tolist():
        raise AssertionError("the table and its oracle give different rows")
    prepare = _stage_step(lengths)
    ours: list[float] = []
    theirs: list[float] = []
    whole: list[float] = []
    for number in range(rounds):  # alternating: the machine's mood is the same for both
        ours.append(_seconds(lambda: table.fill(*step), 200))
        theirs.append(_seconds(lambda: oracle.fill(*step), 5))
        whole.append(_seconds(prepare, 100))
        progress(f"  round {number + 1}/{rounds}: {ours[-1] * 1e6:.1f} us, oracle {theirs[-1] * 1e6:.0f} us")
    fast = result.measure("fill_256_s", ours)
    result.measure("step_256_s", whole)
    slow = result.measure("python_fill_256_s", theirs, "baseline")
    result.ratios["vs_python"] = slow / fast
    return result


def _filled(table: BlockTable | OracleBlockTable, lengths: npt.NDArray[np.int32]) -> Columns:
    """Give every sequence its blocks, scattered over the pool; the arguments of the next decode step's fill()."""
    blocks = iter(np.random.default_rng(0).permutation(SEQUENCES * CONTEXT // BLOCK).tolist())
    rows = [table.new_row() for _ in lengths]
    for row, length in zip(rows, lengths.tolist(), strict=True):
        table.extend(row, [next(blocks) for _ in range(length // BLOCK + 1)])
    return np.array(rows, np.int32), lengths, np.ones(len(lengths), np.int32)


def _stage_step(lengths: npt.NDArray[np.int32]) -> Callable[[], object]:
    """One decode step of a last stage, without its computation."""
    store = KvStore(SEQUENCES * CONTEXT // BLOCK, BLOCK, SEQUENCES, CONTEXT // BLOCK)
    stage = Stage("p0", 0, 1, 1, store, SamplingTable(SEQUENCES, VOCAB))
    work = [(rid + 1, length) for rid, length in enumerate(lengths.tolist())]
    admits = tuple(Admit(rid, Sampling(1 << 30, seed=rid), pack_tokens([1]), b"") for rid, _ in work)
    prompts = pack_rows([(rid, 0, length, False) for rid, length in work])
    prefill = stage.prepare(StepMeta("p0", Fence(1), 0, prompts, admits))
    if isinstance(prefill, str):
        raise AssertionError(prefill)
    stage.commit(prefill, None)
    decode = StepMeta("p0", Fence(1), 1, pack_rows([(rid, length, 1, True) for rid, length in work]))
    tokens = np.ones(SEQUENCES, np.int64)

    def step() -> None:
        prepared = stage.prepare(decode)
        if isinstance(prepared, str):
            raise AssertionError(prepared)
        join([prepared], store.table)
        stage.commit(prepared, tokens)

    return step


def _seconds(work: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times
