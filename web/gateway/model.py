"""The served model as the edge needs it: tokenizer, chat template, limits and defaults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.ids import NodeId
from web.gateway.detok import text_of
from web.gateway.template import ChatTemplate, load_template
from web.gateway.vocabulary import Vocabulary, vocabulary_of

log = structlog.get_logger()

INLINE_CHARS_MAX = 4096  # longer texts are tokenized in a thread, so that they do not stall other streams
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class ServedContext:
    """The tokens that one request may have, prompt and output together: the least that any node of the group serves,
    since a request may come to any of them."""

    def __init__(self, limit: int) -> None:
        """`limit`: by model and settings, before a node has said what it serves."""
        self._limit = limit
        self._by_node: dict[NodeId, int] = {}

    @property
    def tokens(self) -> int:
        return min(self._limit, *self._by_node.values()) if self._by_node else self._limit

    def registered(self, node: NodeId, tokens: int) -> None:
        """A node says what it serves; 0: it does not say. A lease that is lost takes nothing back."""
        if tokens > 0:
            self._by_node[node] = tokens

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget all others: they have left the group."""
        for node in self._by_node.keys() - set(nodes):
            del self._by_node[node]


@dataclass(frozen=True, slots=True)
class Model:
    """Everything but the served context is read once at start and does not change."""

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    context: ServedContext
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    template: ChatTemplate | None
    no_template: str = field(default="", kw_only=True)  # why there is none
    defaults: Mapping[str, float] = field(default_factory=dict)  # of generation_config.json
    max_new_tokens: int | None = None  # of generation_config.json

    @property
    def max_model_len(self) -> int:
        """Tokens of one request, prompt and output together."""
        return self.context.tokens

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
    max_model_len = config.engine.context_len(limit)
    vocabulary = vocabulary_of(tokenizer)
    eos = generation.get("eos_token_id", settings.get("eos_token_id"))
    template, no_template = load_template(folder, chars_max=max_model_len * vocabulary.longest_chars)
    if no_template:
        log.warning("no chat", reason=no_template)
    return Model(
        name=config.model_name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        context=ServedContext(max_model_len),
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
