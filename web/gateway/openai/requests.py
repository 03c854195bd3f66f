"""Request bodies of the OpenAI-compatible API, as strict types: whatever is not understood is refused by name.

Silently ignoring a parameter would give another answer than the client asked for.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, Field, model_validator

from web.gateway.errors import ApiError, shorten
from web.gateway.openai.messages import Messages
from web.gateway.openai.strict import Strict, same
from web.gateway.openai.structured import Choices, ResponseFormat, Schema, Source, StructuredOutputs
from web.gateway.openai.tools import ToolChoice, Tools, tool_use

CHOICES_MAX = 128
STOPS_MAX = 64
STOP_TOKEN_IDS_MAX = 256
LOGPROBS_MAX = 20
BAD_WORDS_MAX = 128
TEMPLATE_CHARS_MAX = 64 << 10
INT64_MAX = 2**63 - 1

# Parameters that are known but not supported, with the values that mean "as if absent".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "access_programs": (),
    "audio": (),
    "background_options": (),
    "context_management": ([],),
    "function_call": ("none", "auto"),  # without functions both say the same
    "functions": ([],),
    "image": (),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none", "medium"),  # of the completions API: the chat API has it
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),  # of the chat API: the completions API has it
    "ec_transfer_params": ({},),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
# Accepted and without effect here, whatever they say: they do not change the answer.
IGNORED = frozenset(
    {
        # OpenAI's: who asks, what for, and how fast it is to go
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",  # no model that is served here was taught what it says
        # vLLM's: caches, the size of chunks, and what belongs to something that is refused itself
        "guided_decoding_backend",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "return_mm_kwargs",
        "return_token_offsets",
        "session_id",
        "stream_interval",
        "truncation_side",
    }
)
# The same of other servers: LiteLLM, llama.cpp, Ollama, OpenRouter, SGLang, TGI. The document does not name them.
OTHER_HINTS = frozenset(
    {
        "cache_control",
        "cache_prompt",
        "client_metadata",  # of Codex
        "custom_labels",
        "data_parallel_rank",
        "drop_params",
        "id_slot",
        "keep_alive",
        "litellm_call_id",
        "litellm_session_id",
        "max_retries",
        "num_retries",
        "provider",
        "request_id",
        "return_progress",
        "rid",
        "slot_id",
        "stream_timeout",
        "tags",
        "timeout",
        "timings_per_token",
        "trace",
        "trace_id",
        "usage",
        "user_id",
    }
)
OTHER_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "custom_params": ({},),
    "debug": ({},),
    "deferred": (False,),
    "details": (False,),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ebnf": ("",),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "extra_body": ({},),
    "extra_headers": ({},),
    "extra_query": ({},),
    "grammar": ("",),
    "lora_path": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n_discard": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "options": ({},),
    "plugins": ([],),
    "post_sampling_probs": (False,),
    "regex": ("",),
    "repeat_penalty": (1,),
    "return_cached_tokens_details": (False,),
    "return_full_text": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_tokens": (False,),
    "safe_prompt": (False,),
    "separate_reasoning": (True,),
    "smoothing_factor": (0,),
    "stop_regex": ([],),
    "stream_reasoning": (True,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "transforms": ([],),
    "typical_p": (1,),
    "watermark": (False,),
    "xtc_probability": (0,),
}
# What another server calls otherwise: SGLang's key of the requests that may share a cache.
OTHER_NAMES = {"extra_key": "cache_salt"}
# Variables of a chat template that the request's own parameters set.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})
ERRORS_MAX = 100  # more are not told apart: each costs memory, and a body has room for a million

TokenId = Annotated[int, Field(ge=0)]
# A list is given up at its first wrong item: otherwise a long one makes a million errors, and stops all streams
# for seconds.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
BadWord = Annotated[str, Field(min_length=1, max_length=1024)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=STOPS_MAX)]


class EventOptions(Strict):
    """Of any stream. `include_event_ids`: false for readers that take every line for data (load generators do)."""

    include_event_ids: bool | None = None
    # Padding against those who look at the size of packets: it is no text.
    include_obfuscation: bool | None = None


class StreamOptions(EventOptions):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Request(Strict):
    """A body: what says nothing may be in it."""

    @model_validator(mode="before")
    @classmethod
    def _drop_silent(cls, data: Any) -> Any:
        """Take out what changes nothing; refuse, by name, what is known but not supported."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for given, value in data.items():
            name = given
            if OTHER_NAMES.get(given) in cls.model_fields and OTHER_NAMES[given] not in data:
                name = OTHER_NAMES[given]
            if name not in cls.model_fields:
                if value is None or name in IGNORED or name in OTHER_HINTS:
                    continue
                neutrals = UNSUPPORTED.get(name, OTHER_UNSUPPORTED.get(name))
                if neutrals is not None:
                    if not any(same(value, neutral) for neutral in neutrals):
                        raise ApiError(400, f"{name} is not supported", name)
                    continue
            kept[name] = value
        return kept


class Common(Request):
    """What both APIs share. None: the client did not say."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    best_of: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=STOP_TOKEN_IDS_MAX)] | None = (
        None
    )
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    guided_whitespace_pattern: Source | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=BAD_WORDS_MAX)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of is not None and self.best_of < self.shown:
            raise ApiError(400, f"best_of ({self.best_of}) is less than n ({self.shown})", "best_of")
        if self.stream and self.choices > self.shown:
            raise ApiError(
                400, "best_of above n cannot be streamed: which are the best is known at the end", "best_of"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs cannot be streamed: use stream: false", "prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise ApiError(400, "truncate_prompt_tokens must be -1, or 1 or more", "truncate_prompt_tokens")
        if self.include_usage and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        for name in ("temperature", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ApiError(400, f"{name} must be finite", name)
        return self

    @property
    def shown(self) -> int:
        """Choices of a prompt that the answer has."""
        return self.n or 1

    @property
    def choices(self) -> int:
        """Choices of a prompt that are generated."""
        return self.best_of or self.shown

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage
            and self.stream_options is not None
            and bool(self.stream_options.continuous_usage_stats)
        )


class CompletionRequest(Common):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.nothing_new and not (self.echo or self.prompt_logprobs is not None):
            raise ApiError(400, "max_tokens: 0 needs echo or prompt_logprobs", "max_tokens")
        if isinstance(self.prompt, list) and not self.prompt:
            raise ApiError(400, "prompt must not be empty", "prompt")
        if len(self.prompts) * self.choices > CHOICES_MAX:
            raise ApiError(400, f"prompts times n (or best_of) must be at most {CHOICES_MAX}", "n")
        return self

    @property
    def nothing_new(self) -> bool:
        """Only the prompt is asked for. A token is generated nevertheless, which nobody sees."""
        return self.max_tokens == 0

    @property
    def echoed_logprobs(self) -> int | None:
        """The echoed prompt's: how many of the most likely tokens; None: there are none."""
        return self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: its text or its token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatRequest(Common):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=TEMPLATE_CHARS_MAX)] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """A template that knows of efforts writes the one that is asked for into the prompt; others know only whether
        to think."""
        own: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            own["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                own["enable_thinking"] = False
        if self.enable_thinking is not None:
            own["enable_thinking"] = self.enable_thinking
        return own | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        tool_use(self.tools, self.tool_choice)
        _check_continued(self.continue_final_message, self.add_generation_prompt)
        _check_template_kwargs(self.chat_template_kwargs)
        return self


def _check_continued(continued: bool | None, generation_prompt: bool | None) -> None:
    if continued and generation_prompt:
        text = "continue_final_message goes on with a message, add_generation_prompt begins one: give one of them"
        raise ApiError(400, text, "continue_final_message")


def _check_template_kwargs(variables: dict[str, Any] | None) -> None:
    if RESERVED & set(variables or ()):
        raise ApiError(400, "chat_template_kwargs names a reserved variable", "chat_template_kwargs")


class TokenizeRequest(Request):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_continued(self.continue_final_message, self.add_generation_prompt)
        _check_template_kwargs(self.chat_template_kwargs)
        return self


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: TokenIds


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Read a body. Raises ApiError 400 naming the parameter; the client's input is not echoed."""
    raw = _utf8(raw)
    try:
        return kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        # No name outlives its handler: an error that its own frame knows keeps the body until the collector comes.
        if error.error_count() > ERRORS_MAX or not any(map(_is_whole, error.errors(include_url=False))):
            raise _bad_request(error) from None
    # JSON has one kind of number: 3.0 is an integer. Only those who write it so pay for reading twice.
    try:
        return kind.model_validate(json.loads(raw, parse_float=whole_number))
    except pydantic.ValidationError as error:
        raise _bad_request(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _utf8(raw: bytes) -> bytes:
    """JSON is UTF-8; some clients send a mark before it, or UTF-16. What the Content-Type says of it does not count."""
    coding = json.detect_encoding(raw)
    if coding == "utf-8":
        return raw
    try:
        return raw.decode(coding).encode()
    except UnicodeError:
        raise ApiError(400, f"the body is not valid {coding}") from None


def _is_whole(error: Any) -> bool:
    value = error["input"]
    return bool(error["type"] == "int_type" and isinstance(value, float) and value.is_integer())


def whole_number(text: str) -> int | float:
    """JSON has one kind of number: 3.0 is an integer."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= 2**53 else value


def _bad_request(error: pydantic.ValidationError) -> ApiError:
    if error.error_count() > ERRORS_MAX:
        return ApiError(400, f"the body has {error.error_count()} mistakes: too many to name them")
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union's branches the one that fits but for a name says most.
    same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    first = next((e for e in same if e["type"] == "extra_forbidden"), errors[0])
    # `loc` of a union goes on with the names of its branches: the client knows only the parameter's path.
    path = [str(part) for part in first["loc"]]
    name = path[0][:64] if path else None
    match first["type"]:
        case "json_invalid":
            why = str(first["msg"]).removeprefix("Invalid JSON: ")
            return ApiError(400, f"the body is not valid JSON: {why[:200]}")
        case "missing":
            return ApiError(400, f"{'.'.join(path)} is required", name)
        case "extra_forbidden":
            where = f" in {path[0]}" if len(path) > 1 else ""
            return ApiError(400, f"unknown parameter {shorten(path[-1])}{where}", name)
    wanted = "; or: ".join(sorted({str(branch["msg"]) for branch in same}))
    return ApiError(400, f"{name or 'the body'}: {wanted[:300]}", name)
