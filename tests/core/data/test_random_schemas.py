"""Documents of random schemas: whatever is drawn of what the masks leave, what ends is valid."""

from __future__ import annotations

import json
import random

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer

from controlplane.grammar import Compiler, error_of, load_compiler
from dataplane.demo import model_dir
from tests.random_schemas import Schema, random_schema
from web.gateway.openai.structured import json_grammar

ENDS = (1, 2)
TOKENS_MAX = 600


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return load_compiler(model_dir(), 2048, ENDS)


def document(compiler: Compiler, schema: Schema, seed: int) -> list[int] | None:
    """Tokens drawn evenly; None: it did not end."""
    matcher, numbers, log = compiler.compile(json_grammar(schema)), np.random.default_rng(seed), []
    while len(log) < TOKENS_MAX:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert error_of(matcher) == ""
        allowed = np.flatnonzero(bits)
        assert len(allowed), "no way on"
        token = int(numbers.choice(allowed))
        if token in ENDS:
            return log
        matcher.consume_token(token)
        log.append(token)
    return None


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_what_ends_is_valid(compiler: Compiler, first: int) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    ended = 0
    for seed in range(first, first + 50):
        schema = random_schema(random.Random(seed))
        log = document(compiler, schema, seed)
        if log is not None:
            ended += 1
            validator = jsonschema_rs.validator_for(schema, validate_formats=True)
            validator.validate(json.loads(tokenizer.decode(log)))
    assert ended > 45


@pytest.mark.parametrize("kind", ["time", "date-time"])
def test_times_have_no_sixtieth_second(compiler: Compiler, kind: str) -> None:
    """pydantic's and Python's have none."""
    for schema in (
        {"type": "string", "format": kind},
        {"type": "string", "format": kind, "pattern": "^[^x]*$"},
    ):
        matcher = compiler.compile(json_grammar(schema))
        day = "2026-05-14T" if kind == "date-time" else ""
        for second, fits in (("59", True), ("60", False)):
            tokens = compiler._tokenizer.tokenize_str(f'"{day}23:59:{second}Z"')
            assert (matcher.deep_copy().try_consume_tokens(tokens) == len(tokens)) is fits
    value = {"properties": {"when": {"enum": [{"format": kind}]}}}
    assert json.loads(json_grammar(value))["grammars"][0]["json_schema"]["properties"] == value["properties"]
