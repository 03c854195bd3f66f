"""Entry point of a node process: `kf-node --config FILE --node n3`, or a fork of the launcher."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import structlog

from controlplane.contract.config import ClusterConfig, EmulationConfig, load_config
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.ids import Member, new_incarnation
from controlplane.contract.lifetime import begin, run_to_exit
from controlplane.contract.logs import configure_logging
from controlplane.contract.version import settings_digest
from controlplane.etcd.errors import NameTaken
from controlplane.etcd.register import TAKE_OVER
from dataplane.accelerators import CPU, Place, assign, count_devices
from dataplane.devices import precise_loop
from dataplane.fetch import provision
from dataplane.lifeline import hold
from dataplane.loading import load_executor, load_grammars, load_proposer
from dataplane.moment import MOMENT
from dataplane.node import Node
from dataplane.report_stream import relay_address

# A node computes on processors that its host's relay, controller and gateway may need for an instant each: they are to
# have them at once, or every hop of a recovery waits for somebody's layers.
NICE = 5

if TYPE_CHECKING:
    from dataplane.core.speculation import Proposer
    from dataplane.executor import StageExecutor
    from dataplane.grammars import Grammars
    from dataplane.oracle import OracleExecutor


def run_node(config: ClusterConfig, node: str, take_over: str = "", place: Place = CPU) -> NoReturn:
    """Serve until stopped (SIGTERM, SIGINT) or retired, and end the process. A name is "n" and a number; its stage
    follows from it. Raises ModelError or ConfigError before it serves.

    `take_over`: the incarnation that has to give its name up to this process. `place`: where it computes, as its
    launcher says.
    """
    configure_logging(node)
    begin()
    if config.engine.device == "cpu":
        os.nice(NICE)
    stage = int(node.removeprefix("n")) % config.stages
    settings = settings_digest(config)  # of what the operator wrote: equal on every host
    source = provision(config, node, stage)
    config = msgspec.structs.replace(config, model=str(source.path))
    executor = load_executor(config, stage, place)
    executor.warm_up()
    grammars = load_grammars(config, stage, executor)
    proposer = load_proposer(config, stage, executor)
    emulated = config.emulation != EmulationConfig()
    MOMENT.time_scale = config.emulation.time_scale
    member = Member(node, new_incarnation())
    hold(Path(config.run_dir), member)
    run_to_exit(
        node,
        lambda: _serve(
            config, member, stage, executor, settings, take_over, place, grammars, proposer, source.checkpoint
        ),
        precise_loop if emulated else None,
        name_taken=(NameTaken,),
    )


async def _serve(
    config: ClusterConfig,
    me: Member,
    stage: int,
    executor: StageExecutor | OracleExecutor,
    settings: str,
    take_over: str,
    place: Place,
    grammars: Grammars | None,
    proposer: Proposer | None,
    checkpoint: str,
) -> None:
    relay = _relay(config)
    node = Node(
        config, me, stage, executor, settings, (take_over,), place, relay, grammars, proposer, checkpoint
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.stop)
    await node.run()


def _relay(config: ClusterConfig) -> str:
    """Its address, or nothing where there can be none: nothing depends on it."""
    try:
        return relay_address(Path(config.run_dir))
    except OSError as error:
        structlog.get_logger().warning(
            "no relay can be reached: reporting by itself", run_dir=config.run_dir, error=error.strerror
        )
        return ""


def _place(config: ClusterConfig, arguments: argparse.Namespace) -> Place:
    """Raises ConfigError."""
    if config.engine.device == "cpu":
        return CPU
    place = assign([arguments.node], count_devices())[arguments.node]
    return Place(arguments.device or place.device, arguments.device_share, place.devices)


def main() -> None:
    parser = argparse.ArgumentParser(prog="kf-node", description="One stage of a model on one device.")
    parser.add_argument("--config", type=Path, required=True, help="the cluster's settings (TOML or JSON)")
    parser.add_argument("--node", required=True, help="name of this node: n0, n1, ...")
    parser.add_argument("--take-over", metavar="INCARNATION", default="", help=TAKE_OVER)
    parser.add_argument(
        "--device", help="cuda:0, cuda:1 ... (default: the first, where the settings say cuda)"
    )
    parser.add_argument("--device-share", type=float, default=1.0, help="of the device (default: all of it)")
    arguments = parser.parse_args()
    if not arguments.node.removeprefix("n").isdigit():
        parser.error(f"--node {arguments.node}: a node's name is n and a number")
    try:
        config = load_config(arguments.config)
        run_node(config, arguments.node, arguments.take_over, _place(config, arguments))
    except (KevlarFlowError, NameTaken) as error:
        structlog.get_logger().error(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
