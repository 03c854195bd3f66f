"""The cluster's settings: one file (TOML or JSON) that every process reads."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from controlplane.contract.errors import ConfigError
from controlplane.contract.topology import Mode


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    executor: Literal["torch", "oracle"] = "torch"  # oracle: hashes in place of a model, timed by `emulation`
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what the checkpoint says
    block_size: int = 16  # tokens in a KV block
    pool_blocks: int = 2048  # KV blocks on a node: own, borrowed and replicas together
    max_batch_tokens: int = 512  # rows of one step, prefill chunks and decodes together
    max_running: int = 256  # requests in batches, per pipeline
    max_waiting: int = 512  # queued requests, per pipeline; more are refused
    max_model_len: int = 0  # prompt and output together; 0: the checkpoint's own limit
    threads: int = 1  # compute threads of a node
    device: Literal["cpu", "cuda"] = "cpu"
    attention: Literal["exact", "xformers"] = (
        "exact"  # exact: ours, equal bits on every path; xformers: GPUs only
    )
    microbatches: int = 0  # in flight, per pipeline; 0: as many as stages can compute at the same time
    # Decodes that cost a stage hardly more than one does: so many share a microbatch while there are places for all.
    # 0: 4 on a CPU, 64 on a GPU.
    microbatch_rows: int = 0

    @property
    def rows_min(self) -> int:
        """Rows that are not split over two microbatches."""
        return self.microbatch_rows or (64 if self.device == "cuda" else 4)


class TimingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds."""

    heartbeat_s: float = 0.1
    node_lease_s: int = 5
    leader_lease_s: int = 2
    suspect_after_s: float = 0.6  # silence that makes a node yellow, if phi finds it unusual
    dead_after_s: float = 1.2  # silence on heartbeats and on links that makes it red
    form_grace_s: float = (
        15.0  # a pipeline that never served waits this long for its own nodes before it borrows
    )
    unavailable_grace_s: float = 5.0  # the gateway holds streams of a pipeline that is down this long
    # Requests whose gateway is gone, KV whose scheduler is gone, logs of requests that have ended.
    orphan_grace_s: float = 10.0
    stop_grace_s: float = 5.0  # a gateway that is told to stop lets answers in one piece finish for so long
    quiesce_limit_s: float = 2.0  # then a planned switch is called off and tried again later
    restart_backoff_s: float = 0.2  # launcher, doubled up to 10 s while a node keeps dying
    reload_s: float = 0.0  # stop-restart only: extra time that loading a large model would take


class EmulationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hardware that this host does not have, for benches. Figures are the hardware's own; all of it then runs
    `time_scale` times faster."""

    time_scale: float = 1.0
    profile: str = "instant"  # of the device, with executor oracle: dataplane/devices.py
    link_bytes_per_s: float = 0.0  # of a node's network interface; 0: not limited
    sites: tuple[int, ...] = ()  # where n0, n1 ... are; empty: all in one place
    latency_s: tuple[tuple[float, ...], ...] = ()  # one way, from site to site

    def __post_init__(self) -> None:
        if self.time_scale <= 0:
            raise ValueError("time_scale must be positive")
        count = len(self.latency_s)
        if any(len(row) != count for row in self.latency_s) or any(not 0 <= s < count for s in self.sites):
            raise ValueError("latency_s must be a square table that has every site")

    @property
    def network(self) -> bool:
        return self.link_bytes_per_s > 0 or bool(self.latency_s)


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run_dir: str  # logs, secret, sockets, database; everything that `kfadmin up` writes
    model: str  # a Hugging Face checkpoint directory
    etcd: tuple[str, ...]  # "host:port"
    cluster: str = "kevlarflow"
    group: str = "default"
    served_model_name: str = ""  # "": the directory's name
    instances: int = 2
    stages: int = 4
    spares: int = 0  # blank nodes for each stage, home to no pipeline
    mode: Mode = Mode.REPLICATE
    host: str = "127.0.0.1"  # where every port of ours is bound
    gateway_port: int = 8000  # 0: any free one
    admin_port: int = 8100  # the first controller's; 0: any free one
    database_url: str = ""  # "": SQLite in run_dir
    transport: Literal["auto", "ucx", "sockets"] = "auto"  # what links between nodes travel on
    engine: EngineConfig = EngineConfig()
    timing: TimingConfig = TimingConfig()
    emulation: EmulationConfig = EmulationConfig()

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name

    @property
    def secret_file(self) -> Path:
        return Path(self.run_dir) / "secret"

    @property
    def api_keys_file(self) -> Path:
        """One key a line; the gateway refuses requests without one of them."""
        return Path(self.run_dir) / "api-keys"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{Path(self.run_dir) / 'history.db'}"

    def node_name(self, instance: int, stage: int) -> str:
        """Nodes are numbered instance by instance; spares come after the instances."""
        return f"n{instance * self.stages + stage}"


def load_config(path: Path) -> ClusterConfig:
    """Read settings. Raises ConfigError naming the file and the field."""
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode()) if path.suffix == ".toml" else msgspec.json.decode(raw)
        config = msgspec.convert(data, ClusterConfig)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if config.instances < 1 or config.stages < 1:
        raise ConfigError(f"{path}: instances and stages must be at least 1")
    return config
