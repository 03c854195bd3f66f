"""What is imported is declared: what comes only with somebody else's requirement may go with its next release."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = CONFIG["project"]["optional-dependencies"]
PACKAGES = [name.rstrip("*") for name in CONFIG["tool"]["setuptools"]["packages"]["find"]["include"]]
OURS = {*PACKAGES, "bench", "tests"}
OF_USERS = EXTRAS.keys() - {"test", "bench", "dev"}
GENERATORS = {"grpc_tools"}  # `make proto`, of the extra `dev`
PEERS = {"vllm"}  # in an environment of its own: `make bench-peers`
UNINSTALLED = {
    "llama_cpp": ["llama-cpp-python"],
    "openvino": ["openvino-genai"],
}  # of the extra `bench`, for tests
CLIENTS = ROOT / "tests" / "clients"  # the same: `make clients`


def names(requirements: Iterable[str]) -> set[str]:
    found = {re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements}
    return {plain(match[0]) for match in found if match}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: Path) -> Iterator[str]:
    """Top-level modules of others."""
    for path in sorted(folder.rglob("*.py")):
        if path.is_relative_to(CLIENTS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import():
                    modules = [alias.name for alias in node.names]
                case ast.ImportFrom(level=0, module=str(module)):
                    modules = [module]
                case _:
                    continue
            tops = {module.partition(".")[0] for module in modules}
            yield from tops - sys.stdlib_module_names - OURS


@pytest.mark.parametrize(
    ("folder", "extras", "apart"),
    [
        *((package, OF_USERS, GENERATORS) for package in PACKAGES),
        ("bench", {*OF_USERS, "test", "bench"}, PEERS),
        ("tests", {*OF_USERS, "test"}, set()),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: set[str], apart: set[str]) -> None:
    declared = names(CONFIG["project"]["dependencies"]).union(*(names(EXTRAS[extra]) for extra in extras))
    brought_by = UNINSTALLED | dict(packages_distributions())
    undeclared = {
        module
        for module in set(imported(ROOT / folder)) - apart
        if not declared & {plain(name) for name in brought_by.get(module, [module])}
    }
    assert not undeclared


def test_each_module_of_the_control_plane_has_a_place_in_the_import_contracts_and_in_their_picture() -> None:
    contracts = CONFIG["tool"]["importlinter"]["contracts"]
    sources = {module for contract in contracts for module in contract["source_modules"]}
    forbidden = {module for contract in contracts for module in contract["forbidden_modules"]}
    picture = (
        (ROOT / "ARCHITECTURE.md").read_text().partition("## Who may import whom")[2].partition("\n## ")[0]
    )
    for path in (ROOT / "controlplane").iterdir():
        if path.stem.startswith("__") or not (path.suffix == ".py" or (path / "__init__.py").exists()):
            continue
        assert f"controlplane.{path.stem}" in sources | forbidden, path.stem
        assert re.search(rf"\b{path.stem}\b", picture), path.stem
