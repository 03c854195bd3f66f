"""What a process is made of: one digest for one code, one for one set of settings."""

from __future__ import annotations

from pathlib import Path

import msgspec

from controlplane.contract.config import ClusterConfig, EngineConfig, load_config
from controlplane.contract.version import code_version, settings_digest, tree_digest

CONFIG = ClusterConfig(run_dir="/run/a", model="/models/m", etcd=("127.0.0.1:2379",))


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree_digest(root)


def test_code_is_named_by_its_sources(tmp_path: Path) -> None:
    first = {"dataplane/a.py": "x = 1\n", "kernels/cpu/k.c": "int k;\n", "dataplane/b.pyx": "cdef int b\n"}
    base = tree(tmp_path / "1", first)
    assert base == tree(tmp_path / "2", first), "the place does not count"
    assert base != tree(tmp_path / "3", first | {"dataplane/a.py": "x = 2\n"})
    assert base != tree(tmp_path / "4", first | {"kernels/cpu/k.c": "long k;\n"})
    assert base != tree(tmp_path / "5", first | {"web/new.py": ""})
    assert base != tree(tmp_path / "6", {"dataplane/aa.py": "x = 1\n", **dict(list(first.items())[1:])})
    built = {"dataplane/b.c": "generated", "dataplane/b.cpython-311.so": "built here"}
    assert base == tree(tmp_path / "7", first | built), "two builds of the same sources are the same code"
    assert base != tree(tmp_path / "8", first | {"dataplane/c.cpython-311.so": "a wheel has only this"})
    assert base == tree(tmp_path / "9", first | {"notes/readme.py": "not ours", "web/__pycache__/a.pyc": "x"})


def test_this_process_knows_its_version() -> None:
    package, _, digest = code_version().partition("+")
    assert package
    assert digest == tree_digest(Path(__file__).parents[3])


def test_settings_are_named_by_what_they_say(tmp_path: Path) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text('model = "/models/m"\netcd = ["127.0.0.1:2379"]\nrun_dir = "/run/b"\ninstances = 2\n')
    assert settings_digest(load_config(toml)) == settings_digest(CONFIG), (
        "defaults and the place do not count"
    )
    changed = [
        msgspec.structs.replace(CONFIG, instances=3),
        msgspec.structs.replace(CONFIG, engine=EngineConfig(max_running=7)),
        msgspec.structs.replace(CONFIG, model="/models/n"),
    ]
    assert len({settings_digest(config) for config in (CONFIG, *changed)}) == 4
