"""tokenizer.json of what a GGUF file says of its tokens: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

The splits of text before BPE are those of the models' own tokenizers, which GGUF names in `tokenizer.ggml.pre`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controlplane.gguf.header import GgufError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE = ("gpt-2", "smollm", *LLAMA3, "qwen2", "deepseek-r1-qwen")

Json = dict[str, Any]


def tokenizer_json(fields: Mapping[str, Any]) -> Json:
    """Raises GgufError for a kind of tokenizer that is not supported, or fields that do not fit together."""
    tokens = strings(fields, "tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise GgufError("tokenizer.ggml.tokens: they are not all different, or have not as many types")
    kind = fields.get("tokenizer.ggml.model")
    match kind:
        case "gpt2":
            parts = _byte_level(fields, tokens)
        case "llama":
            parts = _sentence_piece(fields, tokens, types)
        case _:
            raise GgufError(f"tokenizer.ggml.model: {kind!r:.80} is not supported; supported: gpt2, llama")
    added = [
        _added(number, token, types[number] != USER)
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, USER, UNKNOWN)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _begin(fields, tokens, kind) or parts.get("post_processor"),
    }


def strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise GgufError(f"{key}: expected texts")
    return value


def begins(fields: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with a token of its own."""
    said = fields.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    return fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in LLAMA3


def token_text(fields: Mapping[str, Any], name: str) -> str | None:
    """The text of a token with a part to play: "bos", "eos", "unknown", "padding"."""
    number = fields.get(f"tokenizer.ggml.{name}_token_id")
    tokens = fields.get("tokenizer.ggml.tokens") or []
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _added(number: int, token: str, special: bool) -> Json:
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **no, "special": special}


def _begin(fields: Mapping[str, Any], tokens: Sequence[str], kind: object) -> Json | None:
    bos = token_text(fields, "bos")
    if not begins(fields) or bos is None:
        return None
    template = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*template, {"Sequence": {"id": "B", "type_id": 1}}]
    names = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": template, "pair": pair, "special_tokens": names}


def _model(tokens: Sequence[str], merges: Sequence[Sequence[str]], **more: Any) -> Json:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges, **more,
    }  # fmt: skip


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE:
        raise GgufError(f"tokenizer.ggml.pre: {pre!r:.80} is not supported; supported: {', '.join(PRE)}")
    merges = [merge.split(" ") for merge in strings(fields, "tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise GgufError("tokenizer.ggml.merges: expected two texts in each")
    level: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    before: list[Json] = [level]
    if pre == "smollm":
        before = [{"type": "Digits", "individual_digits": True}, level]
    elif pre != "gpt-2":
        split = LLAMA3_SPLIT if pre in LLAMA3 else QWEN2_SPLIT
        before = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
            {**level, "use_regex": False},
        ]
    return {
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "post_processor": {**level, "trim_offsets": False},
        "decoder": level,
        "model": _model(tokens, merges, ignore_merges=pre in LLAMA3),
    }


def _sentence_piece(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Json:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise GgufError("tokenizer.ggml.scores: expected one for each token")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True) is not False
    first: list[Json] = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
    last: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *last],
        },
        "model": _model(
            tokens,
            _merges(tokens, scores, types),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=token_text(fields, "unknown"),
        ),
    }


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[list[str]]:
    """Every pair that makes a token, the better token first: what SentencePiece does when it joins the best pair."""
    numbers = {token: number for number, token in enumerate(tokens)}
    found = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind != NORMAL:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        made = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
        found += [(-score, numbers[a], numbers[b], a, b) for a, b in made]
    return [[a, b] for *_, a, b in sorted(found)]
