"""`python -m bench NAME [--quick] [--json FILE]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.contract import finish

BENCHES = {
    "recovery": "kill each stage under load: gap to the next token, phases, exactness; against stop-restart",
    "overhead": "latency with replication against latency without",
    "decode": "tokens/s of one node and of a 4-stage pipeline, against transformers",
}


def main() -> None:
    listing = "\n".join(f"  {name:<10} {text}" for name, text in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure one thing, beside what it is compared with.",
        epilog=f"benches:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="within five minutes on two cores")
    parser.add_argument("--json", type=Path, help="write the JSON object into this file, too")
    arguments = parser.parse_args()
    result = importlib.import_module(f"bench.{arguments.name}").run(quick=arguments.quick)
    finish(result, arguments.json)
    sys.exit(0)


if __name__ == "__main__":
    main()
