"""The served model as the edge needs it: tokenizer, chat template, limits and defaults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from web.gateway.detok import text_of
from web.gateway.template import ChatTemplate, load_template
from web.gateway.vocabulary import Vocabulary, vocabulary_of

log = structlog.get_logger()

INLINE_CHARS_MAX = 4096  # longer texts are tokenized in a thread, so that they do not stall other streams
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Model:
    """Everything is read once at start; nothing here changes afterwards."""

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    template: ChatTemplate | None
    no_template: str = field(default="", kw_only=True)  # why there is none
    defaults: Mapping[str, float] = field(default_factory=dict)  # of generation_config.json
    max_new_tokens: int | None = None  # of generation_config.json

    @property
    def chars_max(self) -> int:
        """A longer text has more tokens than the context, whatever it says."""
        return self.max_model_len * self.vocabulary.longest_chars

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; the caller has checked its length against `chars_max`."""
        if len(text) <= INLINE_CHARS_MAX:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, in the words that a stream of them would have."""
        text, pending = text_of(self.tokenizer, ids, skip_special_tokens)
        return text + pending.decode(errors="replace")


def load_model(config: ClusterConfig) -> Model:
    """Read a Hugging Face directory. Raises ConfigError naming the file that is missing or wrong."""
    folder = Path(config.model)
    settings = _json(folder / "config.json", required=True)
    generation = _json(folder / "generation_config.json")
    settings = settings | settings.get("text_config", {})
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ConfigError(f"cannot read {path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    limit = int(settings.get("max_position_embeddings", 0)) or config.engine.max_model_len
    if limit <= 0:
        raise ConfigError(
            f"{folder / 'config.json'} has no max_position_embeddings: set engine.max_model_len"
        )
    max_model_len = min(limit, config.engine.max_model_len or limit)
    vocabulary = vocabulary_of(tokenizer)
    eos = generation.get("eos_token_id", settings.get("eos_token_id"))
    template, no_template = load_template(folder, chars_max=max_model_len * vocabulary.longest_chars)
    if no_template:
        log.warning("no chat", reason=no_template)
    return Model(
        name=config.model_name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        max_model_len=max_model_len,
        vocab_size=int(settings.get("vocab_size", tokenizer.get_vocab_size())),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        template=template,
        no_template=no_template,
        defaults={k: generation[k] for k in SAMPLING_DEFAULTS if generation.get(k) is not None},
        max_new_tokens=generation.get("max_new_tokens"),
    )


def _json(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.exists() and not required:
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold an object")
    return data
