"""Small tokenizers of the kinds that models have, made here: nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The cat sat on the mat, and it was fine. I don't know what is done: ok fine done!",
    "naïve café 你好 世界 กขค ไทย 🎉😀 żółć здравствуй\n\tdef f(x):\n    return x\n",
]
SPECIAL = ["<s>", "</s>", "<|end|>"]


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: words of printable stand-ins for bytes; characters may span tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "a b", "你好呀"])  # added, and not special: they are text
    return tokenizer


def byte_fallback(strip: bool = True, order: str = "mark first") -> Tokenizer:
    """Llama 2 and Mistral (Gemma without the strip): word pieces with a leading mark, single bytes for the rest.

    `order` of the decoder's parts; "by pattern" replaces the mark in the whole text, in a way that only the library
    knows."""
    vocab = {name: at for at, name in enumerate(SPECIAL)}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = ["▁", "▁ok", "▁fine", "▁done", "▁Hello", "s", "A", "▁▁", "ก", "world", ".", "é", "x<0x41>"]
    vocab |= {word: 259 + at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    mark = decoders.Replace(Regex("▁") if order == "by pattern" else "▁", " ")
    parts = [decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [mark, *parts, *tail] if order == "mark first" else [*parts, mark, *tail]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def unigram() -> Tokenizer:
    """T5 and XLM-R: Metaspace, no bytes."""
    words = [(name, 0.0) for name in (*SPECIAL, "<unk>")]
    words += [
        (word, -float(at)) for at, word in enumerate(["▁", "▁the", "▁cat", "s", "▁你", "好", "e", "▁▁x", "�"])
    ]
    tokenizer = Tokenizer(models.Unigram(words, 3, False))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT: marks on what goes on with a word."""
    words = [
        *SPECIAL,
        "[UNK]",
        "the",
        "cat",
        "##s",
        "do",
        "##n",
        "'",
        "t",
        ".",
        ",",
        "n",
        "not",
        "你",
        "##好",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def words() -> Tokenizer:
    """No decoder: tokens are joined by spaces."""
    names = [*SPECIAL, "[UNK]", "the", "cat", "sat", "你好"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def end_marks() -> Tokenizer:
    """GPT-1 and CLIP: marks on the ends of words, and no space after the last one: only the library can say."""
    names = [*SPECIAL, "the</w>", "ca", "t</w>", "s", "你好</w>"]
    tokenizer = Tokenizer(
        models.BPE({word: at for at, word in enumerate(names)}, [], end_of_word_suffix="</w>")
    )
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def by_library(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=skip)
    return text


def by_bytes(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> str:
    """Byte fallback, said another way than the gateway's and the library's: all bytes, then one decoding."""
    data = bytearray()
    for token in ids:
        name = tokenizer.id_to_token(token)
        if name in SPECIAL and skip:
            continue
        byte = re.fullmatch("<0x(..)>", name)
        data += bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()
    text = data.decode(errors="replace")
    return text.removeprefix(" ") if '"Strip"' in tokenizer.to_str() else text


@dataclass(frozen=True)
class Kind:
    """`whole`: the text of all ids, which a stream must have given in the end."""

    tokenizer: Tokenizer
    whole: Callable[[Tokenizer, Sequence[int], bool], str]

    @property
    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size())


KINDS = {
    "byte level": Kind(byte_level(), by_library),
    "byte fallback": Kind(byte_fallback(), by_bytes),
    "byte fallback without strip": Kind(byte_fallback(strip=False), by_bytes),
    "byte fallback, then the mark": Kind(byte_fallback(order="mark last"), by_bytes),
    "unigram": Kind(unigram(), by_library),
    "word piece": Kind(word_piece(), by_library),
    "words": Kind(words(), by_library),
    "end marks": Kind(end_marks(), by_library),
}
