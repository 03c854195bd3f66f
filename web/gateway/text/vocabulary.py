"""Single tokens as the bytes that they add to a text: what streams, logprobs and /detokenize have in common (pure).

The text of ids is the UTF-8 of the bytes of all of them. With byte-level BPE that is what the tokenizers library
says, too. With byte fallback (Llama 2, Mistral) it is not: the library shows a run of byte tokens as U+FFFD, one for
each byte, unless the whole run is valid, so that its text changes after it was sent ("ก", then "ก" and one byte more:
four U+FFFD). Here a character stays once it is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

TOKENIZERS_MAX = 32  # a gateway has one

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PARTS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Kind(Enum):
    """How the tokenizer's decoder makes text."""

    BYTE_LEVEL = "byte_level"  # each token names its bytes (GPT-2, Llama 3, Qwen)
    # A token's text depends on nothing but whether it is the first (Llama 2, T5, BERT).
    TOKENWISE = "tokenwise"
    OTHER = "other"  # it may depend on more: only the library itself knows


class Table(dict[int, tuple[bytes, str | None]]):
    """token -> (its bytes, their text unless they are part of a character); a look-up costs a stream no call."""

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int]) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.hidden = hidden

    def __missing__(self, token: int) -> tuple[bytes, str | None]:
        raw = b"" if token in self.hidden else self._vocabulary.raw(token)
        found = self[token] = (raw, whole(raw))
        return found


class Vocabulary:
    """Caches what it has computed once; its size is bounded by the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str()).get("decoder")
        self._falls_back = "ByteFallback" in _types(decoder)
        self.special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        by_name = tokenizer.get_vocab()
        self.longest_chars = max(map(len, by_name), default=1)
        self._anchor = self._find_anchor(by_name)
        self.kind = _kind(decoder)
        if self.kind is Kind.TOKENWISE and self._anchor is None:
            self.kind = Kind.OTHER
        self._tables: dict[frozenset[int], Table] = {}
        self._whole = self.table(False)

    def table(self, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> Table:
        """`shown`: special tokens that are not skipped; a model has one such set."""
        hidden = self.special - shown if skip_special_tokens else frozenset()
        if hidden not in self._tables:
            self._tables[hidden] = Table(self, hidden)
        return self._tables[hidden]

    def raw(self, token: int, first: bool = False) -> bytes:
        """Exact bytes of the token within a text, or as the `first` one that counts: decoders strip a space there."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""  # a row of the model that the tokenizer has no word for
        if self.kind is Kind.BYTE_LEVEL:
            # The library does so with added tokens, too: one that contains "é" shows the byte 0xE9.
            known = all(c in _ALPHABET for c in name)
            return bytes(_ALPHABET[c] for c in name) if known else name.encode()
        byte = self.fallback(token)
        if byte and (not first or byte >= b"\x80"):
            return byte
        if first or self._anchor is None:
            return self._decode(token).encode()
        return self._decode(self._anchor, token)[len(self._decode(self._anchor)) :].encode()

    def fallback(self, token: int) -> bytes:
        """The byte that the token stands for; nothing if it is of another kind."""
        byte = _BYTE_TOKEN.fullmatch(self.tokenizer.id_to_token(token) or "") if self._falls_back else None
        return bytes([int(byte[1], 16)]) if byte else b""

    def text(self, token: int, first: bool = False) -> str:
        """How logprobs name a token: its text within the stream, and parts of characters as OpenAI does, by bytes."""
        if token in self.special:
            return str(self.tokenizer.id_to_token(token))
        if self.tokenizer.id_to_token(token) is None:
            return f"token_id:{token}"
        raw = self.raw(token, True) if first else self._whole[token][0]
        text = whole(raw)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if text is None else text

    def beginning(self, ids: Sequence[int], hidden: frozenset[int]) -> int:
        """Where the first token is that counts; len(ids) if none does."""
        counts = (
            at for at, t in enumerate(ids) if t not in hidden and self.tokenizer.id_to_token(t) is not None
        )
        return next(counts, len(ids))

    def _decode(self, *ids: int) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _find_anchor(self, by_name: dict[str, int]) -> int | None:
        """An ordinary token to set others after."""
        for name, token in sorted(by_name.items(), key=lambda item: item[1]):
            if token in self.special or _BYTE_TOKEN.fullmatch(name):
                continue
            text = self._decode(token)
            if text and text.isalnum() and self._decode(token, token).startswith(text):
                return token
        return None


@lru_cache(TOKENIZERS_MAX)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """One for a tokenizer, whoever asks."""
    return Vocabulary(tokenizer)


def whole(raw: bytes) -> str | None:
    """The text of bytes; None: they are not UTF-8 by themselves."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _kind(decoder: Any) -> Kind:
    parts = decoder["decoders"] if _type(decoder) == "Sequence" else [decoder]
    types = [_type(part) for part in parts]
    if types == ["ByteLevel"]:
        return Kind.BYTE_LEVEL
    if types in (["WordPiece"], ["None"]):
        return Kind.TOKENWISE
    if not set(types) <= _PARTS:
        return Kind.OTHER
    # What comes after Fuse sees all tokens as one text: harmless if it changes single characters, or takes a space from
    # the beginning.
    after = parts[types.index("Fuse") + 1 :] if "Fuse" in types else []
    rest = [part for part in after if not _changes_characters(part)]
    harmless = (
        all(_type(p) == "Strip" and p["start"] <= 1 and p["stop"] == 0 for p in rest) and len(rest) <= 1
    )
    return Kind.TOKENWISE if harmless else Kind.OTHER


def _changes_characters(part: Any) -> bool:
    """Each by itself, and none away."""
    return _type(part) == "Replace" and len(part["pattern"].get("String", "")) == 1 and part["content"] != ""


def _type(decoder: Any) -> str:
    return str(decoder["type"]) if decoder else "None"


def _types(decoder: Any) -> set[str]:
    inner = decoder["decoders"] if _type(decoder) == "Sequence" else []
    return {_type(decoder), *(_type(part) for part in inner)}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follows from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
