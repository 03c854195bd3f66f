"""Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside the `.proto` files (`make proto`).

The results are committed, so only whoever changes a `.proto` file needs grpcio-tools. `--check` writes
nothing and exits 1 when the committed files are not what the `.proto` files give.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PROTOS = ("kv.proto", "rpc.proto")


def generate(target: Path) -> list[Path]:
    """Generate everything under `target` (a root of import paths); the files written."""
    from grpc_tools import protoc  # a development dependency: not there where the package is only used

    package = HERE.relative_to(ROOT)
    names = [str(package / proto) for proto in PROTOS]
    arguments = ["protoc", f"-I{ROOT}", f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main([*arguments, *names]) != 0:
        raise SystemExit("protoc failed")
    # Only rpc.proto has services; for kv.proto the plug-in would write an empty module.
    if protoc.main(["protoc", f"-I{ROOT}", f"--grpc_python_out={target}", str(package / "rpc.proto")]) != 0:
        raise SystemExit("protoc failed")
    return sorted((target / package).glob("*_pb2*.py*"))


def stale(root: Path = ROOT) -> list[str]:
    """Names of committed files that differ from what the `.proto` files give now."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        return [
            path.name
            for path in fresh
            if not (root / path.relative_to(scratch)).exists()
            or (root / path.relative_to(scratch)).read_bytes() != path.read_bytes()
        ]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        names = stale()
        for name in names:
            print(f"{name} is out of date: run `make proto`", file=sys.stderr)
        return 1 if names else 0
    for path in generate(ROOT):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
