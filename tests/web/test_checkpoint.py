"""What `kfadmin up` says of a model before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from controlplane.contract.errors import ConfigError
from controlplane.kfadmin.checkpoint import check_model
from controlplane.kfadmin.main import app
from controlplane.kfadmin.up import demo_model


@pytest.mark.parametrize(
    ("content", "stages", "told"),
    [
        ({"num_hidden_layers": 2}, 3, "stages = 3 and num_hidden_layers = 2"),
        ({"text_config": {"num_hidden_layers": 2}, "num_hidden_layers": 9}, 3, "num_hidden_layers = 2"),
        ([], 1, "does not hold an object"),
        ("{", 1, "Expecting"),
        (b"\xff\xfe\x00", 1, "utf-16"),
        ("[" * 100_000, 1, "recursion"),
        (None, 1, "it has no config.json"),
    ],
)
def test_models_that_cannot_be(tmp_path: Path, content: Any, stages: int, told: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        raw = content if isinstance(content, str | bytes) else json.dumps(content)
        file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(ConfigError, match=told):
        check_model(tmp_path, stages)


@pytest.mark.parametrize(
    ("content", "stages"),
    [
        ({"num_hidden_layers": 2}, 2),
        ({"num_hidden_layers": 2}, None),  # where nodes load no model
        ({"text_config": {"num_hidden_layers": 2}}, 2),
        ({"num_hidden_layers": "2"}, 9),  # a node says what is wrong with it
        ({"text_config": None}, 9),
        ({}, 9),
    ],
)
def test_models_that_may_be(tmp_path: Path, content: Any, stages: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    check_model(tmp_path, stages)


def test_nothing_starts_for_more_stages_than_the_model_has_layers(tmp_path: Path) -> None:
    """Nodes would end and be started again without end."""
    run_dir = tmp_path / "run dir ü"
    found = CliRunner().invoke(app, ["up", "--stages", "9", "--run-dir", str(run_dir)])
    assert found.exit_code == 1
    assert f"stages = 9 and num_hidden_layers = 8 of {demo_model()}" in found.output
    assert not run_dir.exists()
