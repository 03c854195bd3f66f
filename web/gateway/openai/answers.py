"""The parts of answers, as plain dicts for msgspec: OpenAI's shapes with vLLM's extra fields (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from controlplane.contract.requests import Token
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.parsers.parsed import CallDelta
from web.gateway.text.spans import Span
from web.gateway.text.vocabulary import Vocabulary

LOGPROB_MIN = -9999.0  # JSON has no infinity


def usage(
    prompt_tokens: int, cached_tokens: int | None, completion_tokens: int, reasoning_tokens: int | None
) -> dict[str, Any]:
    """`cached_tokens`: of the prompt, that were not computed again; None: nobody is to know. `reasoning_tokens`: of the
    completion; None: the model is none that reasons."""
    details = {} if reasoning_tokens is None else {"reasoning_tokens": reasoning_tokens}
    return (
        {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }
        | ({} if cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": cached_tokens}})
        | ({"completion_tokens_details": details} if details else {})
    )


def completion_choice(index: int, piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish,
        "stop_reason": piece.stop_reason,
    }


def chat_delta(index: int, delta: dict[str, Any], piece: Piece, logprobs: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}
    if piece.finish is not None:
        choice["stop_reason"] = piece.stop_reason
    return choice


def tool_call_delta(part: CallDelta, new_id: Callable[[int], str]) -> dict[str, Any]:
    """One entry of a delta's `tool_calls`. The first one of a call has its name, and an id."""
    if not part.name:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index} | tool_call(part, new_id)


def tool_call(part: CallDelta, new_id: Callable[[int], str]) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": new_id(part.index), "type": "function", "function": function}


def chat_choice(
    index: int, piece: Piece, calls: list[dict[str, Any]], logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": piece.text}
    if not piece.text and (calls or piece.reasoning):
        message["content"] = None
    if piece.reasoning:
        message["reasoning_content"] = piece.reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": piece.finish,
        "stop_reason": piece.stop_reason,
    }


def completion_logprobs(vocabulary: Vocabulary, piece: Piece, offset: int) -> dict[str, Any]:
    """The four parallel lists of the completions API. `offset`: characters before the output (echo)."""
    named = [_names(vocabulary, token, span) for token, span in _spanned(piece)]
    return {
        "text_offset": [offset + span.offset for span in piece.spans],
        "token_logprobs": [_finite(token.logprob) for token in piece.tokens],
        "tokens": [names[token.token] for token, names in zip(piece.tokens, named, strict=True)],
        "top_logprobs": [
            {names[i]: _finite(p) for i, p in _with_chosen(token)}
            for token, names in zip(piece.tokens, named, strict=True)
        ],
    }


def chat_logprobs(vocabulary: Vocabulary, piece: Piece, top: int) -> dict[str, Any]:
    """`bytes` of the tokens, joined, are the answer's."""

    def entry(name: str, logprob: float | None, raw: bytes) -> dict[str, Any]:
        return {"token": name, "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for token, span in _spanned(piece):
        names = _names(vocabulary, token, span)
        others = [entry(names[i], p, vocabulary.raw(i, span.first)) for i, p in token.top[:top]]
        chosen = entry(names[token.token], token.logprob, span.raw)
        content.append(chosen | {"top_logprobs": others})
    return {"content": content}


def _spanned(piece: Piece) -> Iterator[tuple[Token, Span]]:
    return zip(piece.tokens, piece.spans, strict=True)


def _names(vocabulary: Vocabulary, token: Token, span: Span) -> dict[int, str]:
    """How the chosen token and the most likely ones are called: each otherwise, as clients look them up by name."""
    by_name: dict[str, int] = {}
    for i in dict.fromkeys((token.token, *(i for i, _ in token.top))):
        name = vocabulary.text(i, span.first)
        by_name[name if name not in by_name else f"token_id:{i}"] = i
    return {i: name for name, i in by_name.items()}


def _with_chosen(token: Token) -> list[tuple[int, float]]:
    """The most likely tokens, and the chosen one if it is not among them: with the value that it has elsewhere."""
    if token.logprob is None:
        return list(token.top)
    top = [(i, token.logprob if i == token.token else p) for i, p in token.top]
    if all(i != token.token for i, _ in top):
        top.append((token.token, token.logprob))
    return top


def _finite(logprob: float | None) -> float:
    return LOGPROB_MIN if logprob is None else max(logprob, LOGPROB_MIN)
