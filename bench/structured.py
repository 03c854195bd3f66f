"""Structured output at Llama-3's vocabulary: what JSON costs of the decode rate, and who waits for a cold schema.

Model V has random weights, so its steps are short and its documents are of random words: a mask is the same work as for
a model that writes sense, and a larger part of the step. Its tokenizer is made here, of 128,256 pieces of text from
Python's own library, since one of Llama-3 cannot be had without a download.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import shutil
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from bench.contract import Result, progress
from bench.map import SHARED_STEPS, THREADS
from bench.models import LLAMA3_VOCAB, checkpoint
from bench.peers.protocol import Setup
from bench.systems import OurSystem, started
from controlplane.contract.requests import GatewayMessage, Sampling
from controlplane.grammar import load_compiler
from dataplane.core.rules import Rule
from dataplane.grammars import Grammars

ROWS = 32
PROMPT = 16
ENDS = (2,)  # of model V
SOURCE_BYTES = 40 << 20  # of text that pieces are counted in
PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+")
PIECE_BYTES_MAX = 32
WALK = 300  # tokens of one document whose masks are timed alone
LATE = 0.4  # of the streams' length: when a request with a schema joins them
TEXT: dict[str, object] = {"type": "string"}
BOUNDED: dict[str, object] = {"type": "string", "maxLength": 60}


def documents(text: dict[str, object]) -> str:
    """A grammar of lists that do not end by themselves, so that all streams are as long."""
    return of_items(
        {
            "name": text,
            "kind": {"enum": ["letter", "visit", "ball", None]},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": text},
            "open": {"type": "boolean"},
        }
    )


def of_50_kb(number: int) -> str:
    """A grammar that nobody has seen."""
    values = [f"value {k}" for k in range(10)]
    return of_items(
        {f"field_{number}_{i}": {"enum": [f"{value} {i}" for value in values]} for i in range(300)}
    )


def of_items(properties: dict[str, object]) -> str:
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    schema = {"type": "array", "minItems": 100_000, "items": item}
    return json.dumps({"grammars": [{"json_schema": schema}]}, separators=(",", ":"))


# The first as clients' schemas are; where the length of texts is bounded, the library goes through the vocabulary near
# their ends.
KINDS = {"json": documents(TEXT), "json_bounded_texts": documents(BOUNDED)}


def run(quick: bool) -> Result:
    rounds, tokens = (9, SHARED_STEPS) if quick else (15, 2 * SHARED_STEPS)
    result = Result(
        "structured", settings={"rows": ROWS, "tokens": tokens, "threads": THREADS, "quick": quick}
    )
    with _model() as path:
        _masks(result, path)
        setup = Setup(str(path), "bfloat16", THREADS, 2 * ROWS, PROMPT + tokens + 1, "")
        with started(setup, lambda name: name == "node", result.absent) as systems:
            node = systems["node"]
            assert isinstance(node, OurSystem)
            _rates(result, node, rounds, tokens)
            _cold(result, node, rounds, tokens)
    return result


# ---- the rate


def _rates(result: Result, node: OurSystem, rounds: int, tokens: int) -> None:
    """Tokens/s of a batch, free and held to the schema, in turns."""
    free = Sampling(max_tokens=tokens, seed=1, temperature=1.0)
    kinds = {"free": free, **{name: replace(free, grammar=text) for name, text in KINDS.items()}}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for sampling in kinds.values():
        node.generate(_prompts(0), 8, replace(sampling, max_tokens=8))  # compiled once
    for number in range(rounds):
        for name, sampling in kinds.items():
            times = node.generate(_prompts(number), tokens, sampling).times
            begun, ended = max(row[0] for row in times), min(row[-1] for row in times)
            rates[name].append(sum(begun < at <= ended for row in times for at in row) / (ended - begun))
        progress(f"round {number}: {', '.join(f'{name} {values[-1]:.0f}' for name, values in rates.items())}")
    for name, values in rates.items():
        result.measure(f"tokens_per_s_b{ROWS}_{name}", values)
    for name in KINDS:
        shares = [ours / theirs for ours, theirs in zip(rates[name], rates["free"], strict=True)]
        result.measure(f"{name}_of_free", shares, "ratios")


def _prompts(number: int) -> list[list[int]]:
    numbers = random.Random(number)
    return [[numbers.randrange(3, LLAMA3_VOCAB - 300) for _ in range(PROMPT)] for _ in range(ROWS)]


# ---- a cold schema


def _cold(result: Result, node: OurSystem, rounds: int, tokens: int) -> None:
    """Beside a full batch one more request comes: free, with a schema of 50 KB that is known, with one that is not.
    Its time to the first token, and the longest wait for a token that the others had meanwhile."""
    free = Sampling(max_tokens=tokens, seed=1, temperature=1.0)
    known = replace(free, grammar=of_50_kb(0))
    first: dict[str, list[float]] = {"free": [], "warm": [], "cold": []}
    gap: dict[str, list[float]] = {name: [] for name in first}
    node.generate(_prompts(0)[:1], 2, replace(known, max_tokens=2))
    result.settings["cold_schema_bytes"] = len(known.grammar)
    for number in range(rounds):
        for name, late in (
            ("free", free),
            ("warm", known),
            ("cold", replace(free, grammar=of_50_kb(1 + number))),
        ):
            first_s, gap_s = asyncio.run(_beside(node, _prompts(number), tokens, free, late))
            first[name].append(first_s * 1000)
            gap[name].append(gap_s * 1000)
    for name in first:
        result.measure(f"first_token_ms_{name}", first[name])
        result.measure(f"longest_gap_of_others_ms_{name}", gap[name])


async def _beside(
    node: OurSystem, prompts: list[list[int]], tokens: int, free: Sampling, late: Sampling
) -> tuple[float, float]:
    """Seconds to the first token of who comes late, and the others' longest gap from then on."""
    front = node.front
    submits = [front.submit(prompt, tokens, free) for prompt in prompts]
    comer = front.submit(prompts[0][::-1], 4, replace(late, max_tokens=4))
    times: dict[int, list[float]] = {submit.rid: [] for submit in (*submits, comer)}
    go, sent = asyncio.Event(), 0.0

    async def questions() -> AsyncIterator[GatewayMessage]:
        nonlocal sent
        for submit in submits:
            yield submit
        await go.wait()
        sent = time.perf_counter()
        yield comer
        await asyncio.Event().wait()

    missing = len(times)
    async with contextlib.aclosing(front.answers(questions())) as answers:
        async for now, item in answers:
            times[item.rid].append(now)
            if item.position >= LATE * tokens:
                go.set()
            missing -= item.finish is not None
            if not missing:
                break
    own = times.pop(comer.rid)
    gaps = (b - a for row in times.values() for a, b in pairwise(row) if b > sent)
    return own[0] - sent, max(gaps)


# ---- masks alone


def _masks(result: Result, model: Path) -> None:
    """Microseconds of one row's mask and its token, in the thread that makes them for a batch."""
    begun = time.perf_counter()
    compiler = load_compiler(model, LLAMA3_VOCAB, ENDS)
    result.metrics["tokenizer_s"] = time.perf_counter() - begun
    grammars = Grammars(compiler, 1)
    compiled = []
    for number in range(5):
        begun = time.perf_counter()
        _follow(grammars, of_50_kb(number), 1)
        compiled.append((time.perf_counter() - begun) * 1000)
    result.measure("compile_50_kb_ms", compiled)
    for name, text in KINDS.items():
        rules, numbers, spent = _follow(grammars, text, ROWS), random.Random(1), []
        for _ in range(WALK):
            moves = [(rule, numbers.choice(allowed(rule))) for rule in rules]
            begun = time.perf_counter()
            grammars.advance(moves)
            grammars.settle()
            spent.append((time.perf_counter() - begun) / ROWS * 1e6)
        result.measure(f"mask_us_a_row_{name}", spent)
    grammars.close()


def _follow(grammars: Grammars, text: str, count: int) -> list[Rule]:
    masks = np.zeros((count, -(-LLAMA3_VOCAB // 32)), np.int32)
    rules = [Rule(masks, slot) for slot in range(count)]
    for rule in rules:
        grammars.begin(rule, text, [])
    while not all(rule.settled for rule in rules):
        time.sleep(0.0002)
    return rules


def allowed(rule: Rule) -> list[int]:
    bits = np.unpackbits(rule.masks[rule.slot].view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


# ---- the model


@contextlib.contextmanager
def _model() -> Iterator[Path]:
    """Model V with a tokenizer whose pieces are text."""
    source = checkpoint("V", "bfloat16")
    with tempfile.TemporaryDirectory(prefix="kf-bench-structured-") as folder:
        path = Path(folder)
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(source / name, path / name)
        (path / "model.safetensors").symlink_to(source / "model.safetensors")
        tokenizer().save(str(path / "tokenizer.json"))
        yield path


def tokenizer() -> Tokenizer:
    """Byte-level, LLAMA3_VOCAB tokens: three special ones, all bytes, then the commonest pieces of Python's library,
    then pairs of these."""
    letters = _letters()
    vocabulary: dict[str, int] = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    for letter in letters.values():
        vocabulary.setdefault(letter, len(vocabulary))
    common = [piece for piece, _ in _pieces().most_common()]
    pairs = (" ".join(pair) for pair in product(common[:400], common[:400]))
    for piece in (*common, *pairs):
        if len(vocabulary) == LLAMA3_VOCAB:
            break
        data = piece.encode()
        if len(data) <= PIECE_BYTES_MAX:
            vocabulary.setdefault("".join(letters[byte] for byte in data), len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return made


def _pieces() -> Counter[str]:
    counts: Counter[str] = Counter()
    left = SOURCE_BYTES
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if left <= 0:
            break
        with contextlib.suppress(OSError, UnicodeError):
            text = path.read_text(encoding="utf-8")
            left -= len(text)
            counts.update(PIECE.findall(text))
    return counts


def _letters() -> dict[int, str]:
    """How byte-level tokenizers write each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
