"""Prompts that are cut to a length before they are used: vLLM's truncate_prompt_tokens (pure)."""

from __future__ import annotations

from web.gateway.model import Model
from web.gateway.openai.requests import Common


def cut(request: Common, model: Model, ids: list[int], max_tokens: int | None) -> list[int]:
    """The last tokens of a prompt, or with truncation_side "right" the first, as many as the request says; -1: as many
    as the context has room for beside the output."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit < 0:
        limit = max(1, model.max_model_len - (max_tokens or 1))
    return ids[:limit] if request.truncation_side == "right" else ids[-limit:]
