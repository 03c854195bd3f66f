"""Log probabilities of a prompt's tokens, as both APIs write them down (pure).

They may be a hundred thousand: what is written of that many is for a thread, and for answers in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from controlplane.contract.prompt_scores import PROMPT_SCORES_BYTES_MAX, scores_bytes, unpack_scores
from controlplane.contract.requests import Token
from web.gateway.errors import ApiError
from web.gateway.model import Model
from web.gateway.openai import answers
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.detok import Detokenizer
from web.gateway.text.spans import Spans

# Log probabilities of a prompt in a stream: they are written on the event loop, 3 us each.
STREAMED_MAX = 1 << 14
ENTRY_BYTES = 400  # of one as an object, and in the answer


def check_scores(model: Model, prompt_len: int, top: int, param: str, stream: bool) -> None:
    """Raises ApiError naming the limit, and `param`."""
    if old := model.context.without_scores:
        text = f"{param}: node {min(old)} runs code that has no log probabilities of prompts: it has to be restarted"
        raise ApiError(503, text, param, retry_after_s=5)
    if (size := scores_bytes(prompt_len, top)) > PROMPT_SCORES_BYTES_MAX:
        text = (
            f"{param}: {top + 1} log probabilities for each of {prompt_len} tokens have {size} bytes,"
            f" at most {PROMPT_SCORES_BYTES_MAX} are taken"
        )
        raise ApiError(400, text, param)
    if stream and (count := prompt_len * (top + 1)) > STREAMED_MAX:
        text = f"{param}: {count} log probabilities of the prompt, streams have {STREAMED_MAX}: use stream: false"
        raise ApiError(400, text, param)


def written_bytes(prompt_len: int, top: int) -> int:
    """About what they take in a gateway until the answer has left."""
    return scores_bytes(prompt_len, top) + ENTRY_BYTES * prompt_len * (top + 1)


def echo_logprobs(
    model: Model, prompt: Sequence[int], scores: bytes, of: int, top: int, skip_special_tokens: bool
) -> dict[str, Any]:
    """The completions API's four lists for the tokens of an echoed prompt. `scores` have the `of` most likely tokens,
    the answer `top` of them. The first token has no log probability."""
    detok = Detokenizer(model.tokenizer, (), skip_special_tokens)
    spans = Spans(detok)
    text = ""
    for token in _tokens(prompt, scores, of, top):
        text += spans.push(token, hidden=False)
    text, tokens, parts = spans.release(text, finished=True)
    lists = answers.completion_logprobs(model.vocabulary, Piece(text, tokens=tokens, spans=parts), 0)
    lists["token_logprobs"][0] = lists["top_logprobs"][0] = None
    return lists


def prompt_logprobs(
    model: Model, prompt: Sequence[int], scores: bytes, of: int, top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's: for each token but the first, by token id, the token itself and the `top` likeliest in its place."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, answers.LOGPROB_MIN),
            "rank": rank,
            "decoded_token": model.vocabulary.text(token),
        }

    found: list[dict[str, dict[str, Any]] | None] = [None]
    for token, (logprob, rank, best) in zip(prompt[1:], _read(scores, of, top), strict=True):
        entries = {str(token): entry(token, logprob, rank)}
        for place, (other, value) in enumerate(best, 1):
            entries.setdefault(str(other), entry(other, value, place))
        found.append(entries)
    return found


def _read(scores: bytes, of: int, top: int) -> Iterator[tuple[float, int, tuple[tuple[int, float], ...]]]:
    """Of each token its log probability, its rank, and the likeliest in its place."""
    records = unpack_scores(scores, of)
    tokens, values = records["top"]["token"][:, :top].tolist(), records["top"]["logprob"][:, :top].tolist()
    own = zip(records["logprob"].tolist(), records["rank"].tolist(), tokens, values, strict=True)
    for logprob, rank, ids, logprobs in own:  # a small vocabulary has fewer than are asked for
        yield logprob, rank, tuple((i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0)


def _tokens(prompt: Sequence[int], scores: bytes, of: int, top: int) -> list[Token]:
    """As if they had been generated."""
    tokens = [Token(0, 0, prompt[0])]
    for token, (logprob, _, best) in zip(prompt[1:], _read(scores, of, top), strict=True):
        tokens.append(Token(0, len(tokens), token, logprob, best))
    return tokens
