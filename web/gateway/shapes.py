"""The parts of answers, as plain dicts for msgspec: OpenAI's shapes with vLLM's extra fields (pure)."""

from __future__ import annotations

from typing import Any

from controlplane.contract.requests import Token
from web.gateway.choice import Piece
from web.gateway.vocabulary import Vocabulary

LOGPROB_MIN = -9999.0  # JSON has no infinity


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def completion_choice(index: int, piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish,
        "stop_reason": piece.stop_reason,
    }


def chat_delta(index: int, delta: dict[str, str], piece: Piece, logprobs: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}
    if piece.finish is not None:
        choice["stop_reason"] = piece.stop_reason
    return choice


def chat_choice(index: int, piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": piece.text},
        "logprobs": logprobs,
        "finish_reason": piece.finish,
        "stop_reason": piece.stop_reason,
    }


class CompletionLogprobs:
    """The four parallel lists of the completions API; `text_offset` goes on over the chunks of a stream."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0

    def take(self, tokens: list[Token]) -> dict[str, Any]:
        texts = [self._vocabulary.text(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "tokens": texts,
            "top_logprobs": [
                {self._vocabulary.text(i): _finite(p) for i, p in _with_chosen(token)} for token in tokens
            ],
        }


def chat_logprobs(vocabulary: Vocabulary, tokens: list[Token], top: int) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": vocabulary.text(token),
            "logprob": _finite(logprob),
            "bytes": list(vocabulary.raw(token)),
        }

    content = [
        entry(token.token, token.logprob) | {"top_logprobs": [entry(i, p) for i, p in token.top[:top]]}
        for token in tokens
    ]
    return {"content": content}


def _with_chosen(token: Token) -> list[tuple[int, float]]:
    """The most likely tokens, and the chosen one if it is not among them."""
    top = list(token.top)
    if token.logprob is not None and all(i != token.token for i, _ in top):
        top.append((token.token, token.logprob))
    return top


def _finite(logprob: float | None) -> float:
    return LOGPROB_MIN if logprob is None else max(logprob, LOGPROB_MIN)
