"""What drafts bring: the demo model alone on a node, without them, with those of its own text, and with a draft model.

All three clusters run at the same time and answer in turn, so that a drift of the machine hits all. The prompts are of
two kinds. *Text that repeats*, as a quotation or an edit does: some sentences, twice, and the beginning of the first
once more. *Plain text* (`text_`) is the beginning of a sentence; there the text's own n-grams are of little use. Greedy
choice, one pipeline of one stage.

Before anything is timed every system has to give the same tokens; where one does not the bench ends with an error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from tokenizers import Tokenizer

from bench.cluster import running
from bench.contract import Result, progress
from bench.frontdoor import FrontDoor
from bench.map import THREADS
from controlplane.contract.config import EngineConfig, Speculation
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster
from dataplane.demo import draft_dir, model_dir

MODES: tuple[Speculation, ...] = ("off", "ngram", "draft")
LABELS = {"off": "plain", "ngram": "ngram", "draft": "draft"}
BATCH = 32
TOKENS = 192
LIMIT_S = 240.0  # no round begins that would end later, with --quick
SENTENCES = (
    "The old lady said that she was glad to see him, and that the house was always open to her friends.",
    "It was a fine morning, and the whole party walked to the village before the carriage was ready.",
    "He had not been in the room for a minute before he saw that the letter was gone from the table.",
    "She took the road by the river, as her sister had asked her, and came home before it was dark.",
)
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class TokensDiffer(KevlarFlowError):
    """Drafts have changed what comes out."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    mode: Speculation
    prompts: list[list[int]]


def run(quick: bool) -> Result:
    rounds = 5 if quick else 15
    result = Result(
        "speculate",
        settings={
            "model": "kevlar-demo",
            "tokens": TOKENS,
            "rounds": rounds,
            "threads": THREADS,
            "quick": quick,
        },
    )
    encode = Tokenizer.from_file(str(model_dir() / "tokenizer.json")).encode
    repeats = [encode(_repeating(i)).ids for i in range(BATCH)]  # of 100 tokens, about
    goes_on = [encode(SENTENCES[i % len(SENTENCES)][: 40 + i]).ids for i in range(BATCH)]
    cases = [
        *(Case("b1", mode, repeats[:1]) for mode in ("off", "ngram")),
        *(Case("text_b1", mode, goes_on[:1]) for mode in MODES),
        *(Case(f"b{BATCH}", mode, repeats) for mode in MODES),
        *(Case(f"text_b{BATCH}", mode, goes_on) for mode in MODES),
    ]
    with ExitStack() as stack:
        clusters = {mode: stack.enter_context(_cluster(mode)) for mode in MODES}
        fronts = {mode: FrontDoor(cluster) for mode, cluster in clusters.items()}
        _same_tokens(fronts, repeats[:4] + goes_on[:4])
        rates: dict[tuple[str, str], list[float]] = {}
        counts = {mode: _counts(cluster) for mode, cluster in clusters.items()}
        began = time.monotonic()
        for number in range(rounds):
            if quick and number > 2 and (time.monotonic() - began) * (number + 1) / number > LIMIT_S:
                result.settings["rounds"] = number
                break
            for case in cases if number % 2 else reversed(cases):
                rate = _tokens_per_s(fronts[case.mode], case.prompts)
                rates.setdefault((case.name, LABELS[case.mode]), []).append(rate)
            progress(f"round {number + 1} of {rounds}")
        for mode in ("ngram", "draft"):
            seen = _counts(clusters[mode])
            drafts, accepted = (seen[name] - counts[mode][name] for name in COUNTERS[1:])
            result.metrics[f"acceptance_{mode}"] = accepted / drafts if drafts else 0.0
            result.metrics[f"draft_tokens_{mode}"] = drafts
    for (name, label), values in rates.items():
        result.measure(f"tokens_per_s_{label}_{name}", values)
    for name, label in rates:
        if label != "plain":
            ratio = (
                result.metrics[f"tokens_per_s_{label}_{name}"] / result.metrics[f"tokens_per_s_plain_{name}"]
            )
            result.ratios[f"{label}_{name}"] = ratio
    # The names that are looked for: n-grams on text that repeats, the draft model on text that does not.
    result.ratios["draft_b1"] = result.ratios["draft_text_b1"]
    return result


def _repeating(number: int) -> str:
    """A text, and its beginning once more. All of a batch differ."""
    first = number % len(SENTENCES)
    text = f"{SENTENCES[first]} {SENTENCES[(first + 1) % len(SENTENCES)]}"
    return f"{text} {text} {SENTENCES[first][: 30 + number // len(SENTENCES)]}"


def _cluster(mode: Speculation) -> AbstractContextManager[LocalCluster]:
    engine = EngineConfig(
        pool_blocks=4096,
        threads=THREADS,
        prefix_caching=False,
        speculation=mode,
        draft_model=str(draft_dir()) if mode == "draft" else "",
    )
    return running(Mode.NONE, instances=1, stages=1, engine=engine, controllers=1)


def _same_tokens(fronts: dict[Speculation, FrontDoor], prompts: Sequence[Sequence[int]]) -> None:
    """Also what every system warms up with. Raises TokensDiffer."""
    answers = {mode: front.generate(prompts, TOKENS).tokens for mode, front in fronts.items()}
    for mode, tokens in answers.items():
        if tokens != answers["off"]:
            raise TokensDiffer(f"with speculation = {mode!r} other tokens come than without")


def _tokens_per_s(front: FrontDoor, prompts: Sequence[Sequence[int]]) -> float:
    """All tokens but the very first, over the time from that one until the last stream has ended: of a batch the other
    prompts are in it, and the streams that end late because they had fewer drafts."""
    times = front.generate(prompts, TOKENS).times
    begin, end = min(row[0] for row in times), max(row[-1] for row in times)
    return (sum(map(len, times)) - 1) / (end - begin)


def _counts(cluster: LocalCluster) -> dict[str, int]:
    nodes = cluster.status().nodes
    return {
        name: sum(node.counters.get(f"scheduler_spec_decode_{name}", 0) for node in nodes)
        for name in COUNTERS
    }
