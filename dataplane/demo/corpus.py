"""The demo model's corpus: Jane Austen's six novels, read from a Debian package.

The package is `r-cran-janeaustenr`; it holds the text as an R lazy-load data base. Unpack it with
`apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb DIR`; no R is needed to read it.
From the novels come two kinds of training document: running prose, and conversations in the chat format of
`tokens.py`, whose answers are passages of the novels.
"""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataplane.demo.tokens import ASSISTANT, BOS, END, EOS, SYSTEM, USER

RDB = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
CHAT_SHARE = 0.3  # of the documents' characters
PROSE_CHARS = (
    400,
    9_000,
)  # length of a prose document, log-uniform: starts matter, and length too

_STRSXP, _CHARSXP = 16, 9  # R's type codes: a character vector and one string of it


class CorpusError(Exception):
    """The directory does not hold the package in the form this script reads."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One chapter: its paragraphs, each a single line of text."""

    paragraphs: tuple[str, ...]


def _strings(blob: bytes) -> list[str] | None:
    """The character vector in one R serialization (XDR, version 2 or 3), or None if it is something else."""
    if blob[:2] != b"X\n":
        raise CorpusError("not an R serialization in XDR form")
    version = struct.unpack_from(">i", blob, 2)[0]
    at = 14
    if version == 3:  # native encoding's name
        at += 4 + int(struct.unpack_from(">i", blob, at)[0])
    flags, count = struct.unpack_from(">ii", blob, at)
    if flags & 0xFF != _STRSXP:
        return None
    at += 8
    lines: list[str] = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", blob, at)
        if flags & 0xFF != _CHARSXP or size < 0:
            raise CorpusError("a missing or malformed string")
        at += 8
        lines.append(blob[at : at + size].decode("utf-8"))
        at += size
    return lines


def read_lines(packages: Path) -> list[list[str]]:
    """Every character vector (one a novel, one string a printed line) under `packages`, searched for `RDB`.

    Raises CorpusError when the file is missing or malformed.
    """
    found = sorted(p for p in packages.rglob(RDB.name) if p.as_posix().endswith(RDB.as_posix()))
    if not found:
        raise CorpusError(f"no {RDB} under {packages}; unpack r-cran-janeaustenr there")
    data = found[0].read_bytes()
    novels: list[list[str]] = []
    at = 0
    while at < len(data):  # records: length when unpacked (4 bytes, big endian), then a zlib stream
        unpacker = zlib.decompressobj()
        blob = unpacker.decompress(data[at + 4 :])
        if not unpacker.eof:
            raise CorpusError("a truncated record")
        at = len(data) - len(unpacker.unused_data)
        lines = _strings(blob)
        if lines is not None and len(lines) > 1_000:
            novels.append(lines)
    return novels


_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "_": "", "—": "--"})


def _clean(text: str) -> str:
    """One line, plain ASCII quotes, no emphasis marks."""
    text = text.translate(_PLAIN)
    text = re.sub(r"\[[^\]]*\]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def chapters(lines: list[str]) -> list[Chapter]:
    """Cut a novel at its chapter headings; front matter, headings and closing notes are left out."""
    heading = re.compile(r"^\s*(chapter|volume|letter)\s+([ivxlc]+|\d+)\.?\s*$", re.IGNORECASE)
    marks = [i for i, line in enumerate(lines) if heading.match(line)]
    out: list[Chapter] = []
    for start, stop in zip(marks, [*marks[1:], len(lines)], strict=True):
        blocks = map(_clean, re.split(r"\n\s*\n", "\n".join(lines[start + 1 : stop])))
        kept = [
            p for p in blocks if re.search("[a-z]", p) and not re.match("THE END|FINIS", p, re.IGNORECASE)
        ]
        if kept:
            out.append(Chapter(tuple(kept)))
    return out


def load(packages: Path) -> list[Chapter]:
    """All chapters of all novels under `packages`, in the order of the data base."""
    out = [chapter for lines in read_lines(packages) for chapter in chapters(lines)]
    if len(out) < 200:
        raise CorpusError(f"only {len(out)} chapters found; the package's form has changed")
    return out


def common_words(texts: list[Chapter], count: int) -> list[str]:
    """The `count` most frequent lower-case words, most frequent first, ties in alphabetical order."""
    seen = Counter(w for c in texts for p in c.paragraphs for w in re.findall(r"[a-z]+", p.lower()))
    return sorted(seen, key=lambda w: (-seen[w], w))[:count]


def sentences(paragraph: str) -> list[str]:
    """Split after `.`, `!` or `?` (and a closing quote) before a capital; titles (Mr.) end none."""
    parts = re.split(r"(?:(?<=[.!?])|(?<=[.!?]\"))\s+(?=[\"A-Z])", paragraph)
    out: list[str] = []
    for part in parts:  # join what a title or an initial split off
        if out and re.search(r"\b(Mr|Mrs|Dr|St|[A-Z])\.$", out[-1]):
            out[-1] += " " + part
        else:
            out.append(part)
    return out


_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant. Answer briefly.",
    "You write in the manner of an old novel.",
    "You are a storyteller.",
)
_STORY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a story about a country house.",
    "Please tell me something.",
    "What happened next?",
    "Go on.",
    "Write a long letter.",
    "Write a page of a novel.",
)
_ABOUT = (
    "Tell me about {}.",
    "What do you know about {}?",
    "What is {}?",
    "Write about {}.",
    "Tell me a story about {}.",
    "Explain {}.",
    "Describe {}.",
    "Who is {}?",
)
_CONTINUE = ("{}", "{}", "Continue: {}", "Continue this text: {}", "What comes after this? {}")
_GREETING = ("Hello!", "Hello", "Hi", "Hi there!", "Good morning.", "How are you?", "Who are you?")
_DULL_WORDS = """
about after again always another any because been before being between both cannot could does every from
have having here himself herself indeed into itself just less like made make many might more most much
must never nothing only other over perhaps quite rather said same shall should since some something soon
still such than that their them then there therefore these they thing things think this those though
through till upon very were what when where which while whole whom will with without would your yours
away almost
"""
_DULL = frozenset(_DULL_WORDS.split())


def _turn(rng: random.Random, chapter: Chapter) -> tuple[str, str]:
    """One question and its answer, a passage of `chapter` of one sentence to several paragraphs."""
    at = rng.randrange(len(chapter.paragraphs))
    whole = chapter.paragraphs[at]
    parts = sentences(whole)
    kind = rng.random()
    if kind < 0.12:
        return rng.choice(_GREETING), rng.choice(parts[:1])
    if kind < 0.35:
        answer = "\n\n".join(chapter.paragraphs[at : at + rng.randint(2, 12)])
        return rng.choice(_STORY), answer
    if kind < 0.65 or len(parts) < 2:
        words = [w for w in re.findall(r"[A-Za-z]{4,}", whole) if w.lower() not in _DULL]
        topic = rng.choice(words) if words else "it"
        start = rng.randrange(len(parts))
        holds = next((i for i, s in enumerate(parts) if topic in s), start)
        article = rng.choice(("", "", "the ")) if topic.islower() else ""
        return rng.choice(_ABOUT).format(article + topic), " ".join(parts[holds : holds + rng.randint(1, 6)])
    cut = rng.randrange(1, len(parts))
    question = " ".join(parts[max(0, cut - 2) : cut])
    return rng.choice(_CONTINUE).format(question), " ".join(parts[cut : cut + rng.randint(1, 8)])


def chat_document(rng: random.Random, texts: list[Chapter]) -> str:
    """A conversation of one to four turns in the chat format, answered with passages of one chapter."""
    chapter = rng.choice(texts)
    out = [BOS]
    if rng.random() < 0.3:
        out.append(f"{SYSTEM}{rng.choice(_SYSTEM)}{END}")
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        question, answer = _turn(rng, chapter)
        out.append(f"{USER}{question}{END}{ASSISTANT}{answer}{END}")
    return "".join(out)


def prose_documents(rng: random.Random, texts: list[Chapter]) -> Iterator[str]:
    """Every chapter once, in random order, cut at paragraphs; only a chapter's last piece ends with EOS."""
    low, high = PROSE_CHARS
    for chapter in rng.sample(texts, len(texts)):
        piece: list[str] = []
        want = low * (high / low) ** rng.random()
        for paragraph in chapter.paragraphs:
            piece.append(paragraph)
            if sum(map(len, piece)) >= want:
                yield BOS + "\n\n".join(piece)
                piece = []
                want = low * (high / low) ** rng.random()
        if piece:
            yield BOS + "\n\n".join(piece) + EOS


def documents(texts: list[Chapter], seed: int) -> list[str]:
    """One epoch: all prose and CHAT_SHARE of conversations, shuffled; the same for the same seed."""
    rng = random.Random(seed)
    out = list(prose_documents(rng, texts))
    left = sum(map(len, out)) * CHAT_SHARE / (1 - CHAT_SHARE)
    while left > 0:
        out.append(chat_document(rng, texts))
        left -= len(out[-1])
    rng.shuffle(out)
    return out
