"""Plays cells: requests together under settings of the engine, undisturbed and with a fault after every result."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

import dataplane.demo
from bench.models import write_four_bits
from controlplane.grammar import load_compiler
from dataplane.core.batching import Limits
from dataplane.drafting import load_draft_model
from dataplane.executor import StageExecutor
from tests.features.cells import STAGES, Cell, Engine, Weights
from tests.features.gateway import Client
from tests.features.hunt import Hunt
from tests.features.line import BLOCK, BLOCKS, CONTEXT, ROWS, Line, Parts
from tests.web.gateway.scripted import QWEN, scripted_model
from web.gateway.metrics import Metrics

GROUP = 64  # inputs that share a scale of four bits
BATCH, STEP_S = 1024, 10.0  # prompts in few steps, as fast as this machine may be
VOCAB, ENDS = 2048, (1, 2)
RUN_LIMIT_S = 60.0


class Result(msgspec.Struct):
    """`answers`: of all runs, that were compared. `indices`: places that were hit, of `indices_all`; see Hunt."""

    cell: str
    runs: int = 0
    answers: int = 0
    indices: int = 0
    indices_all: int = 0
    drafts: int = 0  # that were right, of all runs
    problems: list[str] = []
    seconds: float = 0.0
    load: float = 0.0


@dataclass
class Run:
    answers: list[Any]  # of each request; what was raised instead
    tokens: dict[int, int]  # that came of each choice, by its seed
    drafts: int  # that were right


class Player:
    """Loads what cells need, once, and remembers what each request brings alone. Use as a context manager."""

    def __enter__(self) -> Player:
        self._folder = tempfile.TemporaryDirectory(prefix="kf-features-")
        self._parts: dict[tuple[Weights, str], Parts] = {}
        self._executors: dict[Weights, list[tuple[StageExecutor, StageExecutor]]] = {}
        self._alone: dict[tuple[Weights, str], Any] = {}
        self._runs = 0
        gateway = Path(self._folder.name, "gateway")
        gateway.mkdir()
        self.model = scripted_model(gateway, QWEN)
        self.metrics = Metrics()
        self.compiler = load_compiler(dataplane.demo.model_dir(), VOCAB, ENDS)
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def play(self, cell: Cell, runs_max: int | None = None) -> Result:
        """Runs until each place is hit that can be, or so many times."""
        result, began = Result(cell.name), time.monotonic()
        self._refer(cell)
        plain = self._run(cell)
        self._judge(result, cell, plain, "undisturbed")
        hunt = Hunt(cell.fault, plain.tokens)
        while result.runs != runs_max and hunt.goes_on():
            left = replace(cell, requests=tuple(asked for asked in cell.requests if hunt.open(asked.seeds)))
            run = self._run(left, hunt)
            result.runs += 1
            self._judge(result, left, run, hunt.said)
        result.indices, result.indices_all = hunt.hit, hunt.wanted
        result.seconds, result.load = time.monotonic() - began, os.getloadavg()[0]
        return result

    def _judge(self, result: Result, cell: Cell, run: Run, when: str) -> None:
        result.drafts += run.drafts
        for asked, answer in zip(cell.requests, run.answers, strict=True):
            result.answers += 1
            want = self._alone[cell.engine.weights, asked.name]
            if isinstance(answer, BaseException):
                result.problems.append(f"{asked.name}, {when}: {type(answer).__name__}: {answer}")
            elif answer != want:
                result.problems.append(f"{asked.name}, {when}: {difference(answer, want)}")

    def _refer(self, cell: Cell) -> None:
        """Each request alone, without drafts, caches and copies."""
        plain = Engine(cell.engine.weights, cache="off")
        for asked in cell.requests:
            if (plain.weights, asked.name) not in self._alone:
                (answer,) = self._run(Cell(plain, "alone", (asked,), cell.fault)).answers
                if isinstance(answer, BaseException):
                    raise AssertionError(f"{asked.name} alone: {answer!r}") from answer
                self._alone[plain.weights, asked.name] = answer

    # ---- runs

    def _run(self, cell: Cell, hunt: Hunt | None = None) -> Run:
        return asyncio.run(self._playing(cell, hunt))

    async def _playing(self, cell: Cell, hunt: Hunt | None) -> Run:
        self._runs += 1
        engine, requests = cell.engine, cell.requests
        line = Line(
            self._loaded(engine),
            _limits(engine),
            copies=hunt is None or hunt.copies,
            free_drafts=engine.drafts != "off",
        )
        async with line, asyncio.timeout(RUN_LIMIT_S):
            if engine.cache == "warm":
                await asyncio.gather(
                    *(Client(line, asked, f"warm{i}").run() for i, asked in enumerate(requests))
                )
                line.tokens.clear()
            if hunt is not None:
                hunt.begin(line)
            clients = [Client(line, asked, f"{self._runs}-{i}") for i, asked in enumerate(requests)]
            answers = await asyncio.gather(*(client.run() for client in clients), return_exceptions=True)
            line.check()
            counters = [node.schedulers.counters() for node in line.nodes.values()]
            drafts = sum(each["spec_decode_num_accepted_tokens"] for each in counters)
            said = [a if isinstance(a, BaseException) else a.answer for a in answers]
            return Run(said, line.tokens, drafts)

    # ---- what is loaded

    def _loaded(self, engine: Engine) -> Parts:
        key = (engine.weights, engine.drafts)
        if key not in self._parts:
            proposer = None
            if engine.drafts == "draft":
                proposer = load_draft_model(dataplane.demo.draft_dir(), VOCAB, BLOCK, ROWS, CONTEXT, 1)
            executors = self._stages(engine.weights)
            self._parts[key] = Parts(executors, self.compiler, self.model, proposer, self.metrics)
        return self._parts[key]

    def _stages(self, weights: Weights) -> list[tuple[StageExecutor, StageExecutor]]:
        if weights not in self._executors:
            folder = dataplane.demo.model_dir()
            if weights == "int4":
                source, folder = folder, Path(self._folder.name, "int4")
                folder.mkdir()
                write_four_bits(source, folder, GROUP)
                shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
            made = partial(
                StageExecutor, folder, num_blocks=BLOCKS, block_size=BLOCK, context_max=CONTEXT,
                weights="int8" if weights == "int8" else "model",
                dtype="float32" if weights == "model" else "bfloat16",
            )  # fmt: skip
            self._executors[weights] = [
                (made(stage=stage, num_stages=STAGES), made(stage=stage, num_stages=STAGES))
                for stage in range(STAGES)
            ]
        return self._executors[weights]


def _limits(engine: Engine) -> Limits:
    return Limits(
        BLOCK, BATCH, ROWS // 2, ROWS, CONTEXT, 30.0, VOCAB, step_target_s=STEP_S,
        prefix_caching=engine.cache != "off", speculation=engine.drafts, max_draft_tokens=5,
    )  # fmt: skip


def difference(got: Any, want: Any, path: str = "") -> str:
    """Where two answers part."""
    if isinstance(got, dict) and isinstance(want, dict) and got.keys() == want.keys():
        key = next(key for key in got if got[key] != want[key])
        return difference(got[key], want[key], f"{path}.{key}")
    if isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        at = next(at for at, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
        return difference(got[at], want[at], f"{path}[{at}]")
    return f"{path}: {str(got)[:200]} and not {str(want)[:200]}"
