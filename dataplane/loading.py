"""What a node loads before it is one: weights, a draft model, grammars. Afterwards nothing of this is read again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from controlplane.contract.config import CPU_POOL_BLOCKS, ClusterConfig, EngineConfig
from controlplane.contract.errors import ConfigError
from controlplane.grammar import GrammarError, load_compiler
from dataplane.accelerators import CPU, Place
from dataplane.core.speculation import Proposer
from dataplane.devices import profile_of
from dataplane.model.config import load_config
from dataplane.oracle import OracleExecutor

if TYPE_CHECKING:
    from dataplane.executor import StageExecutor
    from dataplane.grammars import Grammars

log = logging.getLogger(__name__)

ROWS_PER_PIPELINE = 4  # served and copied requests of two pipelines and their overlap


def table_rows(engine: EngineConfig) -> int:
    """Rows of a node's block table."""
    return ROWS_PER_PIPELINE * engine.max_running


def load_executor(config: ClusterConfig, stage: int, place: Place = CPU) -> StageExecutor | OracleExecutor:
    """The weights of one stage, mapped, and an empty KV pool. Raises ModelError or ConfigError."""
    engine = config.engine
    if engine.executor == "oracle":
        return OracleExecutor(
            load_config(Path(config.model)),
            stage,
            config.stages,
            num_blocks=engine.pool_blocks or CPU_POOL_BLOCKS,
            block_size=engine.block_size,
            profile=profile_of(config),
            time_scale=config.emulation.time_scale,
        )
    # Not before it is known to be needed: torch is large, and the oracle does without.
    import torch

    from dataplane.executor import StageExecutor
    from kernels.base import CannotCompute

    torch.set_num_threads(1)  # it only looks up rows; the kernels have threads of their own
    try:
        made = StageExecutor(
            Path(config.model),
            stage,
            config.stages,
            num_blocks=engine.pool_blocks or (CPU_POOL_BLOCKS if place.device == "cpu" else 0),
            rows_max=engine.max_batch_tokens,
            memory_share=engine.memory_utilization * place.share,
            block_size=engine.block_size,
            dtype=engine.dtype,
            weights=engine.weights,
            device=place.device,
            threads=engine.threads,
            attention=engine.attention,
            sums=config.sums,
            ranks=config.ranks,
            context_max=engine.max_model_len,
            digest_file=Path(config.run_dir) / "digests" / f"stage{stage}of{config.stages}.json",
        )
    except CannotCompute as error:
        raise ConfigError(f"stage {stage} cannot be computed on {place.device}: {error}") from error
    if made.config.float16:
        log.info("the checkpoint is float16, of which there are no kernels: computed in %s", made.dtype)
    return made


def load_proposer(
    config: ClusterConfig, stage: int, executor: StageExecutor | OracleExecutor
) -> Proposer | None:
    """The draft model of a node that may schedule, if there is to be one. Raises ModelError."""
    engine = config.engine
    if stage != 0 or engine.speculation != "draft":
        return None
    from dataplane.drafting import load_draft_model

    context = engine.context_len(executor.config.max_positions, executor.kv.num_blocks)
    return load_draft_model(
        Path(engine.draft_model).expanduser(),
        executor.config.vocab_size,
        engine.block_size,
        table_rows(engine),
        context,
        engine.threads,
    )


def load_grammars(
    config: ClusterConfig, stage: int, executor: StageExecutor | OracleExecutor
) -> Grammars | None:
    """Who follows grammars at a last stage. None: no other stage needs it, or this model's tokens cannot be used.

    Takes about a second for 128,000 tokens, in which no other thread runs: to be done before anybody is served."""
    if stage != config.stages - 1:
        return None
    from dataplane.grammars import Grammars

    model = executor.config
    try:
        compiler = load_compiler(Path(config.model), model.vocab_size, model.eos_token_ids)
    except GrammarError as error:
        log.warning("no structured output: %s", error)
        return None
    return Grammars(compiler, config.engine.threads)
