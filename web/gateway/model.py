"""The served model as the edge needs it: tokenizer, chat template, limits and defaults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer

from controlplane.contract.config import ClusterConfig, GatewayConfig
from controlplane.contract.errors import ConfigError
from controlplane.gguf.files import folder_of
from controlplane.gguf.header import GgufError
from controlplane.positions import POSITIONS, positions_max
from web.gateway.errors import ApiError
from web.gateway.openai.requests import Common, whole_number
from web.gateway.routing.served_context import ServedContext
from web.gateway.text.detok import text_of
from web.gateway.text.grammars import GrammarChecker
from web.gateway.text.output_format import OutputFormat, output_format
from web.gateway.text.template import ChatTemplate, load_template, special_tokens
from web.gateway.text.vocabulary import Vocabulary, vocabulary_of

log = structlog.get_logger()

INLINE_CHARS_MAX = 4096  # longer texts are tokenized in a thread, so that they do not stall other streams
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


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
    output: OutputFormat = field(default=OutputFormat(), kw_only=True)  # of calls and reasoning
    grammars: GrammarChecker = field(kw_only=True)
    defaults: Mapping[str, float] = field(default_factory=dict)  # of generation_config.json
    max_new_tokens: int | None = None  # of generation_config.json
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # as templates call them

    @property
    def max_model_len(self) -> int:
        """Tokens of one request, prompt and output together."""
        return self.context.tokens

    @property
    def calls_tools(self) -> bool:
        """Whether its template knows of tools, and how it calls them is known."""
        takes = self.template is not None and self.template.for_tools.takes_tools
        return takes and self.output.tools is not None

    @property
    def special_marks(self) -> Mapping[str, int]:
        """Special tokens that tell parts of the output apart, by name."""
        ids = {mark: self.tokenizer.token_to_id(mark) for mark in self.output.marks}
        return {mark: i for mark, i in ids.items() if i in self.vocabulary.special}

    @property
    def chars_max(self) -> int:
        """A longer text has more tokens than the context, whatever it says."""
        return self.max_model_len * self.vocabulary.longest_chars

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; the caller has checked its length against `chars_max`. Raises ApiError 400."""
        if len(text) <= INLINE_CHARS_MAX:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        self.check_known(ids)
        return ids

    def check_known(self, ids: list[int]) -> None:
        """Tokenizers may have tokens that were added and never taught. Raises ApiError 400."""
        if ids and (last := max(ids)) >= self.vocab_size:
            name = self.tokenizer.id_to_token(last)
            raise ApiError(400, f"{name!r:.80} is token {last}, and this model has {self.vocab_size}")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, in the words that a stream of them would have."""
        text, pending = text_of(self.tokenizer, ids, skip_special_tokens)
        return text + pending.decode(errors="replace")


def load_model(config: ClusterConfig) -> Model:
    """Read a Hugging Face directory or a GGUF file. Raises ConfigError naming the file that is missing or wrong."""
    try:
        folder = folder_of(Path(config.model), Path(config.run_dir))
    except (GgufError, OSError) as error:
        raise ConfigError(f"{config.model}: {error}") from error
    settings = Settings.read(folder / "config.json", required=True).with_section("text_config")
    generation = Settings.read(folder / "generation_config.json")
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ConfigError(f"cannot read {path}: {error}") from error
    tokenizer_settings = Settings.read(folder / "tokenizer_config.json")
    _add_tokens(tokenizer, tokenizer_settings)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    limit = positions_max(settings.values, settings.count(POSITIONS)) or config.engine.max_model_len
    if limit <= 0:
        raise ConfigError(
            f"{folder / 'config.json'} has no max_position_embeddings: set engine.max_model_len"
        )
    max_model_len = config.engine.context_len(limit)
    vocabulary = vocabulary_of(tokenizer)
    template, no_template = load_template(folder, chars_max=max_model_len * vocabulary.longest_chars)
    if no_template:
        log.warning("no chat", reason=no_template)
    vocab_size = settings.count("vocab_size") or tokenizer.get_vocab_size()
    special = special_tokens(folder, tokenizer_settings.values)
    ends = _ends((generation, settings), vocab_size, _end_of(tokenizer, special.get("eos_token")))
    return Model(
        name=config.model_name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        context=ServedContext(max_model_len),
        vocab_size=vocab_size,
        eos_token_ids=ends,
        grammars=GrammarChecker(tokenizer, vocab_size, ends),
        template=template,
        no_template=no_template,
        output=_output_format(template, config.gateway),
        defaults=_sampling_defaults(generation),
        max_new_tokens=generation.count("max_new_tokens"),
        special_tokens=special,
    )


def _output_format(template: ChatTemplate | None, settings: GatewayConfig) -> OutputFormat:
    if template is None:
        return OutputFormat()
    return output_format(template.for_tools.source, settings.tool_parser, settings.reasoning_parser)


def _add_tokens(tokenizer: Tokenizer, settings: Settings) -> None:
    """Tokens that stand in tokenizer_config.json alone, and what it says otherwise of known ones: as transformers."""
    key = "added_tokens_decoder"
    try:
        added = sorted((int(i), AddedToken(**token)) for i, token in (settings.values.get(key) or {}).items())
    except (AttributeError, TypeError, ValueError) as error:
        raise settings.error(key, f"it does not hold tokens by their ids: {error}") from error
    for number, token in added:
        tokenizer.add_tokens([token])
        if (found := tokenizer.token_to_id(token.content)) != number:
            raise settings.error(key, f"{token.content!r:.80} is token {found}, not {number}")


def _ends(files: Sequence[Settings], vocab_size: int, of_tokenizer: tuple[int, ...]) -> tuple[int, ...]:
    """What the first of the model's files says that names any, and the tokenizer's own: models are taught to end their
    turns with that one, and files that were taken over from an older model do not know it."""
    named = next((ids for settings in files if (ids := settings.token_ids("eos_token_id"))), ())
    return tuple(i for i in dict.fromkeys((*named, *of_tokenizer)) if i < vocab_size)


def _end_of(tokenizer: Tokenizer, name: str | None) -> tuple[int, ...]:
    token = tokenizer.token_to_id(name) if name is not None else None
    return () if token is None else (token,)


def _sampling_defaults(generation: Settings) -> dict[str, float]:
    """What counts where a client says nothing has the bounds of what clients say."""
    given = {name: value for name in SAMPLING_DEFAULTS if (value := generation.values.get(name)) is not None}
    try:
        return Common.model_validate(given).model_dump(exclude_none=True)
    except (ValidationError, ApiError) as error:
        wrong = error.errors()[0]["loc"][0] if isinstance(error, ValidationError) else error.param
        raise generation.error(str(wrong), f"{given[str(wrong)]!r:.80} cannot be a default") from error


@dataclass(frozen=True, slots=True)
class Settings:
    """One JSON object of a model's files. A key that is null says nothing; what is wrong raises ConfigError."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, required: bool = False) -> Settings:
        if not path.exists() and not required:
            return cls(path, {})
        try:
            data = json.loads(path.read_bytes(), parse_float=whole_number)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} does not hold an object")
        return cls(path, data)

    def error(self, key: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}: {reason}")

    def with_section(self, key: str) -> Settings:
        """What the section `key` says, if there is one, goes before what stands beside it."""
        section = self.values.get(key) or {}
        if not isinstance(section, dict):
            raise self.error(key, f"expected an object, found {section!r:.80}")
        return Settings(self.path, {**self.values, **section})

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"expected an integer above 0, found {value!r:.80}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One id, or a list of them."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is None:
            return None
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, f"expected token ids, found {value!r:.80}")
        return tuple(ids)
