"""A peer of `bench decode` is measured in the precision that is fastest for it on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import systems
from bench.contract import Result
from bench.map import Case, _record
from bench.peers.client import Kind, PeerAbsent
from bench.peers.protocol import Answer, Setup
from bench.systems import fastest_peer

KIND = Kind("openvino", "openvino_genai")
SETUP = Setup("model-bfloat16", "bfloat16", 2, 32, 400, "")
PRECISIONS = {"bfloat16": "model-bfloat16", "float32": "model-float32"}


class Engine:
    """Takes so many seconds a step."""

    name, load_s, peak_bytes = "openvino", 0.0, 0

    def __init__(self, setup: Setup, step_s: float) -> None:
        self.setup, self.step_s = setup, step_s

    def generate(self, prompts: list[list[int]], tokens: int) -> Answer:
        return Answer(
            [[self.step_s * step for step in range(tokens)] for _ in prompts], [[1] * tokens] * len(prompts)
        )


def engines(monkeypatch: pytest.MonkeyPatch, step_s: dict[str, float]) -> list[Setup]:
    """In place of processes; precisions that are not named are refused. Returns what was started."""
    begun: list[Setup] = []

    @contextmanager
    def peer(_kind: Kind, setup: Setup) -> Iterator[Engine]:
        begun.append(setup)
        if setup.dtype not in step_s:
            raise PeerAbsent(f"{setup.dtype} is not supported here")
        yield Engine(setup, step_s[setup.dtype])

    monkeypatch.setattr(systems, "_peer", peer)
    return begun


@pytest.mark.parametrize(
    ("step_s", "best"),
    [
        ({"bfloat16": 0.2, "float32": 0.1}, "float32"),
        ({"bfloat16": 0.1, "float32": 0.2}, "bfloat16"),
        ({"float32": 0.3}, "float32"),
        ({"bfloat16": 0.3}, "bfloat16"),
    ],
)
def test_the_fastest_of_those_that_it_runs_in(
    monkeypatch: pytest.MonkeyPatch, step_s: dict[str, float], best: str
) -> None:
    begun = engines(monkeypatch, step_s)
    tried: dict[str, dict[str, float | str]] = {}
    with fastest_peer(KIND, SETUP, PRECISIONS, tried) as peer:
        assert isinstance(peer, Engine)
        assert (peer.setup.dtype, peer.setup.model) == (best, f"model-{best}")
    assert len(begun) == 3
    found = tried["openvino"]
    for dtype in PRECISIONS:
        wanted = step_s.get(dtype)
        if wanted is None:
            assert found[dtype] == f"{dtype} is not supported here"
        else:
            assert found[dtype] == pytest.approx(wanted * (systems.PROBE_TOKENS - 1))


def test_one_precision_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = engines(monkeypatch, {"float32": 1.0})
    with fastest_peer(KIND, SETUP, {"float32": "model"}, {}) as peer:
        assert isinstance(peer, Engine)
    assert [(setup.dtype, setup.model) for setup in begun] == [("float32", "model")]


def test_absent_is_who_runs_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engines(monkeypatch, {})
    tried: dict[str, dict[str, float | str]] = {}
    with (
        pytest.raises(PeerAbsent, match="bfloat16: bfloat16 is not supported here; float32: float32 is not"),
        fastest_peer(KIND, SETUP, PRECISIONS, tried),
    ):
        raise AssertionError("it was started")


def test_a_batch_that_never_decoded_together_is_absent() -> None:
    """Its rate is nothing: a slow machine's first stream ended before the last one began."""
    case, result = Case("decode", 8, 256), Result("decode")
    rates = {case: {"node": [100.0, -0.0], "node_int8": [180.0, 190.0], "node_int4": [-0.0, 0.0]}}
    _record(result, case, rates, "")
    assert result.metrics == {"node_tokens_per_s_b8": 100.0, "node_int8_tokens_per_s_b8": 185.0}
    assert result.ratios == {"b8_node_int8_node": 1.8}
    assert "node_int4_decode_b8" in result.absent
