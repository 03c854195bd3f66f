"""The container file: a linter has nothing against it, and what it names exists."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.deploy.chart import ROOT, example, render, templates

FOLDER = ROOT / "deploy" / "containers"
TEXT = (FOLDER / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def hadolint(path: Path) -> str:
    program = Path(sys.executable).with_name("hadolint")  # of the extra `test`
    return subprocess.run(
        [str(program), "--no-color", str(path)], capture_output=True, text=True, check=False
    ).stdout


def test_the_linter_has_nothing_against_it(tmp_path: Path) -> None:
    assert hadolint(FOLDER / "Containerfile") == ""
    bad = tmp_path / "Containerfile"
    bad.write_text(TEXT.replace(" --no-install-recommends", "", 1))
    assert "DL3015" in hadolint(bad)


def test_extras_and_entry_points_are_those_of_the_package() -> None:
    extras = {name for names in re.findall(r"extras=([a-z$,]+)", TEXT) for name in names.split(",")} - {
        "$extras"
    }
    assert {"gguf", "oidc", "otel", "postgres", "gpu"} == extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert re.search(r'^ENTRYPOINT \["kfadmin"\]$', TEXT, re.M)
    assert "kfadmin" in PROJECT["scripts"]
    assert any(line.startswith("torch==") for line in PROJECT["dependencies"])


def test_what_is_copied_is_what_the_package_is_built_from() -> None:
    ignore = (FOLDER / "Containerfile.dockerignore").read_text().split()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in config["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"} == kept
    assert not [name for name in kept if fnmatch.fnmatch(name, "tests*")]


def test_the_last_stage_runs_as_the_user_of_the_chart_and_writes_to_its_volumes() -> None:
    last = TEXT[TEXT.rindex("\nFROM ") :]
    user = re.findall(r"^USER (\d+):(\d+)$", last, re.M)
    spec = templates(render(example("one-machine")))["shop-node-s0"]["spec"]
    security = spec["securityContext"]
    assert user == [(str(security["runAsUser"]), str(security["runAsGroup"]))]
    assert f"--uid {security['runAsUser']}" in last
    mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    for variable in ("HOME", "TRITON_CACHE_DIR", "KF_RUN_DIR"):
        (path,) = re.findall(rf"\b{variable}=(/\S+)", last)
        assert any(path.startswith(mount) for mount in mounts), variable
    assert "gcc" not in last.replace("packages+=(gcc libc6-dev)", "").replace(
        "# etcd: for the release's own. gcc", ""
    )


def test_bases_are_pinned() -> None:
    assert re.search(r"^ARG BASE=docker\.io/library/python:3\.\d+\.\d+-slim-[a-z]+$", TEXT, re.M)
    assert re.findall(r"^FROM (\S+)", TEXT, re.M) == ["${BASE}", "${BASE}"]
