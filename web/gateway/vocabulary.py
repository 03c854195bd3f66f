"""Single tokens as text and as bytes, for logprobs and /tokenize (pure)."""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follows from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Caches what it has computed once; its size is bounded by the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, tuple[str, bytes]] = {}
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._alphabet = _byte_alphabet() if '"ByteLevel"' in decoder else None
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.longest_chars = max(map(len, tokenizer.get_vocab()), default=1)

    def text(self, token: int) -> str:
        """The token alone; U+FFFD stands for a part of a character."""
        return self._lookup(token)[0]

    def raw(self, token: int) -> bytes:
        """Exact bytes, so that clients can put characters together that span tokens."""
        return self._lookup(token)[1]

    def _lookup(self, token: int) -> tuple[str, bytes]:
        found = self._texts.get(token)
        if found is None:
            text: str = self._tokenizer.decode([token], skip_special_tokens=False)
            found = self._texts[token] = (text, self._bytes(token, text))
        return found

    def _bytes(self, token: int, text: str) -> bytes:
        name = self._tokenizer.id_to_token(token) or ""
        if name not in self._added:
            if self._alphabet is not None and all(c in self._alphabet for c in name):
                return bytes(self._alphabet[c] for c in name)
            if match := _BYTE_TOKEN.fullmatch(name):
                return bytes([int(match[1], 16)])
        return text.encode()
