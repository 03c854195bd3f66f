"""What a peer's process and the bench say to each other: one JSON object a line, on the peer's stdin and stdout.

    -> {"prompts": [[ids], ...], "tokens": N}     greedy, exactly N tokens for each prompt, all prompts at once
    <- {"times": [[seconds], ...], "tokens": [[ids], ...], "peak_bytes": ...}      when each token was there
    <- {"ready": {"openvino": "2026.4.1", ...}}    versions; once, before the first question
    <- {"error": "..."}                                 the process ends after it

Times are of one clock, from the moment the question had been read; several tokens may share one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setup:
    """What all peers are started with. `scratch` is a directory to convert the checkpoint into."""

    model: str
    dtype: str  # float32 | bfloat16
    threads: int
    batch_max: int
    context_max: int  # tokens of one stream, prompt and output together
    scratch: str
    device: str = "cpu"


@dataclass(slots=True)
class Answer:
    """times[i][k]: seconds from the question to token k of prompt i."""

    times: list[list[float]]
    tokens: list[list[int]]


Generate = Callable[[list[list[int]], int], Answer]


def serve(load: Callable[[Setup], Generate], packages: tuple[str, ...]) -> None:
    """The peer's main: load, then answer until stdin ends. The setup is the first argument, in JSON."""
    # Libraries print, and so do their C++ parts: our channel is a copy of stdout, and stdout goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict[str, object]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        generate = load(Setup(**json.loads(sys.argv[1])))
        generate([[3] * 16], 2)  # some compile or allocate with the first request
        say({"ready": {name: metadata.version(name) for name in packages}})
        for line in sys.stdin:
            question = json.loads(line)
            answer = generate(question["prompts"], question["tokens"])
            say({"times": answer.times, "tokens": answer.tokens, "peak_bytes": peak_bytes()})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def peak_bytes(process: int | str = "self") -> int:
    """Most resident memory that a process has had. (getrusage would count what its parent had when it forked.)"""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no VmHWM")
