"""From a request's parameters to the contract's Sampling: every default is resolved here, at the edge."""

from __future__ import annotations

import math

from msgspec.structs import replace

from controlplane.contract.requests import Sampling
from web.gateway.errors import ApiError, shorten
from web.gateway.model import Model
from web.gateway.openai.generation import Plan
from web.gateway.openai.requests import INT64_MAX, Common
from web.gateway.openai.too_long import too_long
from web.gateway.text.choice_decoder import TextRules
from web.gateway.text.parsers.output import OutputRules

BIAS_MAX = 100.0
TOP_P_MIN = 1e-6  # what 0 means: the most likely token alone, which is always likelier than this
BAD_WORD_TOKENS_MAX = 64


def make_sampling(request: Common, model: Model, logprobs: int | None, grammar: str = "") -> Sampling:
    """What all choices of all prompts share, made once as it may be long; `grammar` as it was checked.

    Raises ApiError 400 naming the parameter."""
    defaults = model.defaults
    top_k = request.top_k if request.top_k is not None else int(defaults.get("top_k", 0))
    check_tokens(model, request.stop_token_ids or [], "stop_token_ids")
    return Sampling(
        max_tokens=0,
        seed=0,
        temperature=_pick(request.temperature, defaults.get("temperature"), 1.0),
        top_k=min(max(0, top_k), model.vocab_size),  # all of them: the same as off
        top_p=max(TOP_P_MIN, _pick(request.top_p, defaults.get("top_p"), 1.0)),
        min_p=_pick(request.min_p, defaults.get("min_p"), 0.0),
        repetition_penalty=_pick(request.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
        presence_penalty=_pick(request.presence_penalty, None, 0.0),
        frequency_penalty=_pick(request.frequency_penalty, None, 0.0),
        logit_bias=_logit_bias(request.logit_bias, model),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(
            dict.fromkeys((*(() if request.ignore_eos else model.eos_token_ids), *_named(request, model)))
        ),
        logprobs=0
        if logprobs is None and request.choices > request.shown
        else logprobs,  # they tell the best
        bad_words=_bad_words(request.bad_words, model),
        grammar=grammar,
        cache_salt=request.cache_salt or "",
    )


def choices_of(
    shared: Sampling,
    model: Model,
    prompt: tuple[int, ...],
    max_tokens: int,
    seed: int,
    count: int,
    prompt_logprobs: int | None = None,
) -> list[Plan]:
    """The choices of one prompt: of their sampling nothing differs but the seed. `prompt_logprobs`: how many of the
    most likely tokens are needed for each token of the prompt.

    Raises ApiError 400 naming the parameter."""
    check_length(model, len(prompt), max_tokens)
    if shared.min_tokens > max_tokens:
        text = f"min_tokens ({shared.min_tokens}) exceeds max_tokens ({max_tokens})"
        raise ApiError(400, text, "min_tokens")
    own = replace(shared, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return [Plan(prompt, replace(own, seed=(seed + n) & INT64_MAX)) for n in range(count)]


def text_rules(request: Common, model: Model, spans: bool, output: OutputRules | None = None) -> TextRules:
    """`spans`: log probabilities are asked for, which name the text of each token. `output`: what is told apart."""
    return TextRules(
        output=output,
        shown=frozenset(model.special_marks.values()) if output is not None else frozenset(),
        spans=spans,
        stops=request.stops,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
        stop_tokens=_named(request, model),
    )


def _named(request: Common, model: Model) -> dict[int, str | int]:
    """Tokens that end the output for this client, and how it named them: by id, or special ones as stop strings,
    which are never found in a text that does not show them."""
    named: dict[int, str | int] = {token: token for token in request.stop_token_ids or ()}
    if request.skip_special_tokens is not False:
        for stop in request.stops:
            token = model.tokenizer.token_to_id(stop)
            if token in model.vocabulary.special:
                named.setdefault(token, stop)
    return named


def check_length(model: Model, prompt_len: int, max_tokens: int) -> None:
    """Raises ApiError 400 naming the limit when prompt and output do not fit into the context."""
    limit = model.max_model_len
    if prompt_len == 0:
        raise ApiError(400, "the prompt has no tokens", "prompt")
    if prompt_len + 1 > limit:
        raise too_long(limit, f"the prompt is too long: it has {prompt_len}", "prompt")
    if prompt_len + max_tokens > limit:
        asked = f"{prompt_len + max_tokens} were asked for ({prompt_len} in the prompt, {max_tokens} in max_tokens)"
        raise too_long(limit, asked, "max_tokens")


def check_chars(model: Model, chars: int, param: str) -> None:
    """Refuse a text that cannot fit before spending time on tokenizing it."""
    if chars > model.chars_max:
        raise too_long(model.max_model_len, f"the prompt is too long: it has {chars} characters", param)


def check_tokens(model: Model, ids: list[int], param: str) -> tuple[int, ...]:
    """Token ids that came from a client."""
    return _token_ids(ids, model, param)


def _token_ids(ids: list[int], model: Model, param: str) -> tuple[int, ...]:
    if ids and max(ids) >= model.vocab_size:
        raise ApiError(400, f"{param}: token ids must be below {model.vocab_size}", param)
    return tuple(ids)


def _logit_bias(bias: dict[str, float] | None, model: Model) -> tuple[tuple[int, float], ...]:
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token < model.vocab_size:
            text = f"logit_bias: {shorten(key)} is not a token id below {model.vocab_size}"
            raise ApiError(400, text, "logit_bias")
        if not (math.isfinite(value) and -BIAS_MAX <= value <= BIAS_MAX):
            raise ApiError(
                400, f"logit_bias: values must be between -{BIAS_MAX:g} and {BIAS_MAX:g}", "logit_bias"
            )
        result[token] = value  # "5" and "05" are one: the last counts, as of equal keys in JSON
    return tuple(sorted(result.items()))


def _bad_words(words: list[str] | None, model: Model) -> tuple[tuple[int, ...], ...]:
    """Each as its tokens within a text and, where these are others, after a space."""
    if not words:
        return ()
    if old := model.context.without_scores:
        text = f"bad_words: node {min(old)} runs code that passes over them: it has to be restarted"
        raise ApiError(503, text, "bad_words", retry_after_s=5)
    found: set[tuple[int, ...]] = set()
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False).ids)
            if not 0 < len(ids) <= BAD_WORD_TOKENS_MAX:
                why = f"{shorten(word)} has {len(ids)} tokens, allowed are 1 to {BAD_WORD_TOKENS_MAX}"
                raise ApiError(400, f"bad_words: {why}", "bad_words")
            model.check_known(list(ids))
            found.add(ids)
    return tuple(sorted(found))


def _pick(asked: float | None, of_model: float | None, default: float) -> float:
    return float(asked if asked is not None else of_model if of_model is not None else default)
