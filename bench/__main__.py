"""`python -m bench NAME [--quick] [--json FILE]`."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

from bench.contract import finish

BENCHES = {
    "recovery": "kill each stage under load: gap to the next token, phases, exactness; against stop-restart",
    "takeover": "kill a node that holds 0.25, 1 and 3 GB of KV: the pause, and whether anybody else is suspected",
    "overhead": "latency with replication, and with parity, against latency without; --only replicate or parity",
    "protection": "copies and parity on emulated A10s: memory, cost, recovery of 16K tokens, what failures cost",
    "secure": "tokens/s with certificates and sealed links (TCP) against tokens/s without",
    "kevlarflow": "the paper's evaluation: nodes fail under load, emulated A10s; Table 1 and figures; --scene, --rate",
    "decode": "tokens/s of one node and of a 4-stage pipeline, against the engines that install beside us",
    "structured": "JSON held to a schema: its share of the decode rate, time to first token with a cold schema",
    "speculate": "drafts of a request's own text and of a draft model: tokens/s against none, batch 1 and 32",
    "profile": "where a decode step of one node goes: kernels, threads, Python",
    "lumen": "copies placed by load and recovery by load, against stop-restart and fixed neighbours; --simulate",
    "prefill": "prompt tokens/s of the same systems",
    "falsealarms": "full load and no fault: how often a node is suspected or taken for dead, per hour",
    "scale": "one controller against 64 to 4,000 simulated nodes: CPU, kill to written topology, memory; --only SIZES",
    "gateway": "tokens/s through one gateway, CPU of its process a token, what it adds to the time to first token",
    "transport": "links over each transport: latency, bandwidth, CPU, idle cost; against ucx_perftest and sockets",
    "prefix": "prefix caching: hit rates against an ideal cache, first tokens of cached prompts, what misses pay",
    "allreduce": "sums between two ranks of a host in shared memory, against gloo",
    "failsafe": "the FailSafe paper's evaluation, simulated: ranks of H100s that fail by real traces; --figures",
    "lostrank": "ranks of a stage that are killed while it decodes contexts of 16K tokens: the pause",
    "parity": "erasure codes: encoding and decoding, against Intel ISA-L",
    "blocktable": "filling the arrays of a decode step of 256 sequences, against plain Python",
}


OPTIONS = (
    "device",
    "only",
    "minutes",
    "scene",
    "rate",
    "time_scale",
    "figures",
    "simulate",
)  # that not every bench takes


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
    parser.add_argument("--minutes", type=float, help="falsealarms: how long (default: 60)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="decode and prefill: where (default: cpu)")
    parser.add_argument(
        "--only",
        metavar="A,B",
        help="decode and prefill: these systems; kevlarflow: latency or recovery; overhead: replicate or parity;"
        " lumen: how many instances (default: all)",
    )
    parser.add_argument("--scene", type=int, choices=(1, 2, 3), help="kevlarflow: which failure (default: 1)")
    parser.add_argument("--rate", type=float, help="kevlarflow: requests per second (default: several)")
    parser.add_argument("--time-scale", type=float, help="kevlarflow: how much faster emulated time runs")
    parser.add_argument("--simulate", action="store_true", help="lumen: many instances, in virtual time")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="kevlarflow, failsafe, protection: draw into this folder"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped then, too
    module = importlib.import_module(f"bench.{arguments.name}")
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name)}
    if unknown := [name for name in options if name not in getattr(module, "OPTIONS", ())]:
        parser.error(f"{arguments.name} does not take --{', --'.join(unknown).replace('_', '-')}")
    if "only" in options:
        options["only"] = frozenset(options["only"].split(","))
    result = module.run(quick=arguments.quick, **options)
    finish(result, arguments.json)
    sys.exit(0)


if __name__ == "__main__":
    main()
