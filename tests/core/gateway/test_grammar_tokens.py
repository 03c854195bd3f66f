"""Grammars over every kind of tokenizer: what a client reads is what the grammar allows, byte tokens included."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from controlplane.grammar import Compiler, GrammarError, error_of
from tests.core.gateway.tokenizers_of_kinds import KINDS, SPECIAL
from web.gateway.text.detok import Detokenizer

END = 1
PATTERN = r"[a-zé你 ]{1,6}(ok|done|ก)?"
FOLLOWED = [name for name in KINDS if name.startswith("byte")]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_text_is_the_grammars(name: str) -> None:
    kind = KINDS[name]
    compiler = Compiler(kind.tokenizer.to_str(), kind.size, (END,))
    vocabulary = kind.tokenizer.get_vocab()
    prompt = (vocabulary.get("s", END + 2),)
    bytes_used = 0
    for seed in range(150):
        rng, log = random.Random(seed), []
        matcher = compiler.compile(f"start: /{PATTERN}/")
        while True:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            assert error_of(matcher) == ""
            token = rng.choice(np.flatnonzero(bits).tolist())
            if token == END:
                break
            assert kind.tokenizer.id_to_token(token) not in SPECIAL
            matcher.consume_token(token)
            log.append(token)
        text = "".join(map(Detokenizer(kind.tokenizer, prompt, True).push, log))
        assert re.fullmatch(PATTERN, text), [kind.tokenizer.id_to_token(token) for token in log]
        bytes_used += any(ord(character) > 127 for character in text)
    assert bytes_used > 10


@pytest.mark.parametrize("name", [name for name in KINDS if name not in FOLLOWED])
def test_a_tokenizer_whose_text_the_library_does_not_know_is_refused_in_words(name: str) -> None:
    kind = KINDS[name]
    with pytest.raises(GrammarError, match="decoder type"):
        Compiler(kind.tokenizer.to_str(), kind.size, (END,))
