"""The cluster's settings: one file (TOML or JSON) that every process reads."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import msgspec

from controlplane.contract.address import address_of, authority_of, endpoint_of, host_of, port_range
from controlplane.contract.errors import ConfigError
from controlplane.contract.ranges import Form, Range, SettingsError, Text, check_bounds, parsed
from controlplane.contract.topology import Mode, quota_blocks

ETCD_LEASE_MIN_S = 2  # what etcd makes of a shorter one
POOL_BLOCKS_MIN = 4
CPU_POOL_BLOCKS = 2048  # if nothing is said
INSTANCES_MAX = 4096
# Instances times stages. The topology is one value: with so many nodes, copies and all, it has 1.3 MB of the 1.5 MiB
# that etcd takes unless it is told otherwise.
NODES_MAX = 8000
LABELS_MAX = 8  # of a host
BEATS_TO_SUSPECT_MIN = 2  # heartbeats within `suspect_after_s`
ROUNDING_S = 1e-9  # of differences of settings
CODE_PARITIES = {"xor": 1, "rdp": 2}
RDP_SHARDS_MAX, RS_SHARDS_MAX = 16, 257  # of kernels/coding; for `rs` parities count, too
XFORMERS_BLOCK = 64  # tokens of its pages
SLOTS_MAX = (1 << 31) - 1  # positions of a KV pool: kernels number them in 32 bits


def _collector(text: str) -> None:
    """Raises ValueError."""
    scheme, slashes, place = text.partition("://")
    if scheme not in ("http", "https") or not slashes:
        raise ValueError(f"{text!r} is not http://HOST:PORT")
    authority_of(place.removesuffix("/"))


def _origin(text: str) -> None:
    """Raises ValueError."""
    scheme, slashes, place = text.partition("://")
    if text != "*" and not (slashes and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme)):
        raise ValueError(f"{text!r} has no scheme")
    if text != "*":
        authority_of(place)


# Parts of keys in etcd, of file names and of metric labels.
NAME = Text(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "1 to 63 letters, digits, '.', '_' and '-', a letter or digit first"
)
PATH = Text(r"[^\x00]{1,4096}", "a path")
MAYBE_PATH = Text(r"[^\x00]{0,4096}", "a path, or nothing")
MODEL_NAME = Text(r"(?=.*\S)[^\x00-\x1f\x7f]{1,256}", "1 to 256 characters of text")
MAYBE_MODEL_NAME = Text(rf"({MODEL_NAME.pattern})?", f"{MODEL_NAME.what}, or nothing")
HOST = Form(host_of, "a host name or an IP address, without a port")
ORIGIN = Form(_origin, "an origin, such as https://example.org, or *")
ADVERTISE = Form(host_of, "a host name or an IP address, without a port, or nothing", empty=True)
COLLECTOR = Form(_collector, "http://HOST:4318, or nothing", empty=True)
PORTS = Text(r"([0-9]{1,5}(-[0-9]{1,5})?)?", "a port, a range such as 7100-7163, or nothing")
ENDPOINT = Form(endpoint_of, "host:port, the port from 1 to 65,535")

BROADCAST = ipaddress.IPv4Address("255.255.255.255")

PROFILES = ("instant", "a10-llama-8b-quarter")  # of dataplane/devices.py
PROFILE = Text("|".join(PROFILES), f"one of {', '.join(PROFILES)}")
PING_BYTES = 1024  # at most, of what keeps a link from being silent
RANGES = ("controller_ports", "node_ports", "link_ports")
DEFAULT_GROUP = "default"
RANKS_MAX = 64  # KF_RANKS_MAX of kernels/ranks/exchange.h
Speculation = Literal["off", "ngram", "draft"]


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    executor: Literal["torch", "oracle"] = "torch"  # oracle: hashes in place of a model, timed by `emulation`
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what the checkpoint says
    # model: as the checkpoint has them; int8: those that are not quantised there become eight bits with a scale for
    # each output when they are loaded.
    weights: Literal["model", "int8"] = "model"
    block_size: Annotated[int, Range(1, 1024)] = 16  # tokens in a KV block
    # KV blocks on a node: own, borrowed and replicas together. 0: 2,048 on a CPU; on a GPU as many as fit beside
    # weights and the largest step into `memory_utilization` of the device, which nodes that share it divide.
    pool_blocks: Annotated[int, Range(0, 1 << 26)] = 0
    memory_utilization: Annotated[float, Range(0.05, 0.98)] = 0.9
    # Rows of one step, prefill chunks and decodes together.
    max_batch_tokens: Annotated[int, Range(1, 1 << 16)] = 512
    max_running: Annotated[int, Range(1, 8192)] = 256  # requests in batches, per pipeline
    max_waiting: Annotated[int, Range(1, 1 << 20)] = 512  # queued requests, per pipeline; more are refused
    # That requests keep beside their KV (prompts, options), per pipeline; more are refused.
    request_bytes: Annotated[int, Range(1 << 20, 1 << 50)] = 1 << 30
    # Prompt and output together; 0: the checkpoint's own limit. A pipeline's share of the pool bounds it, too. longrope
    # has the frequencies of short contexts where this keeps within what the model was trained with, else of long ones.
    max_model_len: Annotated[int, Range(0, 1 << 24)] = 0
    threads: Annotated[int, Range(1, 1024)] = 1  # compute threads of a node, or of each of its ranks
    device: Literal["cpu", "cuda"] = "cpu"
    # exact: ours, equal bits on every path; xformers: GPUs only.
    attention: Literal["exact", "xformers"] = "exact"
    # Of products whose inputs several ranks may share. fixed: over shards that depend on the model alone, in 64-bit
    # fixed point, the same bits for any number of ranks; CPUs only, and no quantised weights or mixtures of experts.
    # auto: fixed where a node has several ranks.
    sums: Literal["auto", "float", "fixed"] = "auto"
    # In flight, per pipeline; 0: as many as stages can compute at the same time.
    microbatches: Annotated[int, Range(0, 256)] = 0
    # Decodes that cost a stage hardly more than one does: so many share a microbatch while there are places for all.
    # 0: 4 on a CPU, 64 on a GPU.
    microbatch_rows: Annotated[int, Range(0, 1 << 16)] = 0
    # Seconds that a step may take, from the first stage to its result, while somebody reads along: prompts go in chunks
    # that keep to it, of 16 tokens at least. 0: 1.5 times what a step that only decodes has been taking, 3 times where
    # that happens to a reader once (before a second token, after a failure).
    step_target_s: Annotated[float, Range(0, 60)] = 0.0
    prefix_caching: bool = True  # KV of prompts that begin alike is computed once
    # Tokens that are drafted and then verified together, where that is faster; they come out the same. ngram: what
    # followed in the request's own text when it last ended as it does now; draft: of a small model (`draft_model`).
    speculation: Speculation = "off"
    max_draft_tokens: Annotated[int, Range(1, 32)] = 8  # of one request in one step
    # A checkpoint directory, with the model's own tokens, on the hosts of first stages. It is to be small: its passes
    # are run between steps, on a CPU.
    draft_model: Annotated[str, Text(r"[^\x00]{0,4096}", "a path, or nothing")] = ""

    def __post_init__(self) -> None:
        check_bounds(self, "engine.")

    @property
    def rows_min(self) -> int:
        """Rows that are not split over two microbatches."""
        return self.microbatch_rows or (64 if self.device == "cuda" else 4)

    def context_len(self, positions_max: int, pool_blocks: int = 0) -> int:
        """The context that is served, in tokens, prompt and output together: what the model, whose limit is
        `positions_max`, `max_model_len` and the KV pool allow, of which a pipeline has half (a node that is borrowed
        serves two). `pool_blocks`: of the node, 0 if only the settings say: a GPU's pool may not be known to them."""
        asked = min(positions_max, self.max_model_len or positions_max)
        blocks = pool_blocks or self.pool_blocks or (CPU_POOL_BLOCKS if self.device == "cpu" else 0)
        return min(asked, self.block_size * quota_blocks(blocks, 2)) if blocks else asked


class ParityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How KV is coded in mode `parity`: the blocks of one name on all stages give `parities` blocks elsewhere."""

    # xor: one parity; rdp: two, by sums alone, for 16 stages at most; rs (Reed-Solomon): any number.
    code: Literal["xor", "rdp", "rs"] = "xor"
    parities: Annotated[int, Range(1, 8)] = 1  # K: so many stages of a pipeline may be lost at a time
    # Of a node, for others' parity, beside its KV pool.
    memory_bytes: Annotated[int, Range(1 << 16, 1 << 50)] = 1 << 30

    def __post_init__(self) -> None:
        check_bounds(self, "parity.")


class TimingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds."""

    heartbeat_s: Annotated[float, Range(0.01, 60)] = 0.1
    node_lease_s: Annotated[int, Range(ETCD_LEASE_MIN_S, 3600)] = 5
    leader_lease_s: Annotated[int, Range(ETCD_LEASE_MIN_S, 60)] = 2  # nobody fails over while one runs out
    # Silence that makes a node yellow, if phi finds it unusual.
    suspect_after_s: Annotated[float, Range(0.02, 600)] = 0.6
    # Silence on heartbeats and on links that makes it red. Nodes look each 0.05 s whom to speak to: three times within
    # this, and as long again for a report to say so.
    dead_after_s: Annotated[float, Range(0.2, 3600)] = 1.2
    # A pipeline that never served waits this long for its own nodes before it borrows.
    form_grace_s: Annotated[float, Range(0, 86400)] = 15.0
    # The gateway holds streams of a pipeline that is down this long.
    unavailable_grace_s: Annotated[float, Range(0, 86400)] = 5.0
    # Requests whose gateway is gone, KV whose scheduler is gone, logs of requests that have ended. After a takeover
    # gateways need a moment to claim theirs.
    orphan_grace_s: Annotated[float, Range(0.5, 86400)] = 10.0
    # A gateway that is told to stop lets answers in one piece finish for so long.
    stop_grace_s: Annotated[float, Range(0, 3600)] = 5.0
    # Of no effect: settings that were written by older code name it.
    quiesce_limit_s: Annotated[float, Range(0.05, 3600)] = 2.0
    # Launcher, doubled up to 10 s while a node keeps dying.
    restart_backoff_s: Annotated[float, Range(0.01, 10)] = 0.2
    # stop-restart only: extra time that loading a large model would take.
    reload_s: Annotated[float, Range(0, 86400)] = 0.0

    def __post_init__(self) -> None:
        check_bounds(self, "timing.")


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    # That the requests of all clients keep in a gateway, their bodies included; more are refused.
    memory_bytes: Annotated[int, Range(64 << 20, 1 << 50)] = 2 << 30
    client_share: Annotated[float, Range(0.1, 1)] = 0.5  # of it that one API key may have
    # The most urgent priority that clients may ask for. Lower ones run first, and preempt.
    priority_floor: Annotated[int, Range(-(1 << 31), (1 << 31) - 1)] = 0

    # Whether the usage tells how much of a prompt was cached. That depends on who asked before, so that the usage of a
    # stream that is taken up elsewhere is no longer what it was.
    prompt_tokens_details: bool = False
    # Whether a chat may come with a template of its own (`chat_template`). It runs in a sandbox that bounds its work,
    # on the gateway's own processor: for clients that are trusted.
    request_chat_template: bool = False
    # How the model writes tool calls and reasoning; auto: as its chat template shows.
    tool_parser: Literal[
        "auto", "none", "hermes", "llama3_json", "pythonic", "mistral", "mistral_named", "mistral_args"
    ] = "auto"
    reasoning_parser: Literal["auto", "none", "think", "mistral"] = "auto"
    # A folder in which each gateway writes a line of JSON for each request that has ended, never a prompt, to
    # NAME.access.log; four older files of 64 MiB are kept. Empty: none is written.
    access_log_dir: Annotated[str, MAYBE_PATH] = ""
    # Where gateways and nodes send traces of requests, "http://HOST:4318": a collector that speaks OTLP over HTTP.
    # Needs the extra otel.
    otlp_endpoint: Annotated[str, COLLECTOR] = ""
    # Whose pages a browser lets read answers: "https://example.org", or "*" for all. They need keys like others.
    cors_origins: tuple[Annotated[str, ORIGIN], ...] = ()
    # Settings files of other groups whose models are served here, too, by the name in `model`. Each says where its
    # etcd, secret, certificates and tokenizer are; what is not there yet is looked for again.
    groups: tuple[Annotated[str, PATH], ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, "gateway.")


class EmulationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hardware that this host does not have, for benches. Figures are the hardware's own; all of it then runs
    `time_scale` times faster."""

    time_scale: Annotated[float, Range(1e-3, 1e6)] = 1.0
    profile: Annotated[str, PROFILE] = "instant"  # of the device, with executor oracle: dataplane/devices.py
    # Of a node's network interface; 0: not limited.
    link_bytes_per_s: Annotated[float, Range(0, 1e15)] = 0.0
    sites: tuple[Annotated[int, Range(0, 4095)], ...] = ()  # where n0, n1 ... are; empty: all in one place
    latency_s: tuple[tuple[float, ...], ...] = ()  # one way, from site to site

    def __post_init__(self) -> None:
        check_bounds(self, "emulation.")

    @property
    def network(self) -> bool:
        return self.link_bytes_per_s > 0 or bool(self.latency_s)


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files in PEM; empty: connections between processes are plain. `{process}` in a path is the role and the name of
    the process that reads it, such as node-n3. All of them are read again when they have changed."""

    ca: Annotated[str, MAYBE_PATH] = ""  # authorities; two while one replaces the other
    cert: Annotated[str, MAYBE_PATH] = ""  # names the process: `contract/identity.py`
    key: Annotated[str, MAYBE_PATH] = ""  # mode 0600; "": in the file of `cert`
    # Name in the certificate of etcd's members; "": the host of each endpoint.
    etcd_name: Annotated[str, ADVERTISE] = ""
    # What clients and browsers see; "": plain HTTP on loopback, elsewhere `cert`.
    https_cert: Annotated[str, MAYBE_PATH] = ""
    https_key: Annotated[str, MAYBE_PATH] = ""  # "": in the file of `https_cert`

    def __post_init__(self) -> None:
        check_bounds(self, "tls.")

    @property
    def enabled(self) -> bool:
        return bool(self.ca)

    def paths(self, process: str) -> tuple[str, str, str]:
        """Of authorities, certificate and key, for one process."""
        ca, cert, key = (path.replace("{process}", process) for path in (self.ca, self.cert, self.key))
        return ca, cert, key or cert


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run_dir: Annotated[str, PATH]  # logs, secret, sockets, database; everything that `kfadmin up` writes
    model: Annotated[str, PATH]  # a Hugging Face checkpoint directory
    etcd: tuple[Annotated[str, ENDPOINT], ...]
    cluster: Annotated[str, NAME] = "kevlarflow"
    group: Annotated[str, NAME] = DEFAULT_GROUP
    served_model_name: Annotated[str, MAYBE_MODEL_NAME] = ""  # "": the directory's name
    instances: Annotated[int, Range(1, INSTANCES_MAX)] = 2
    stages: Annotated[int, Range(1, 1024)] = 4
    # Processes of a node that compute its stage together (tensor-parallel). It goes on with those that are left when
    # some end, whatever their number, and takes them in again.
    ranks: Annotated[int, Range(1, RANKS_MAX)] = 1
    spares: Annotated[int, Range(0, 4096)] = 0  # blank nodes for each stage, home to no pipeline
    mode: Mode = Mode.REPLICATE
    host: Annotated[str, HOST] = "127.0.0.1"  # where every port of ours is bound
    advertise: Annotated[str, ADVERTISE] = ""  # what is registered for others to connect to; "": host
    gateway_port: Annotated[int, Range(0, 65535)] = 8000  # 0: any free one
    admin_port: Annotated[int, Range(0, 65535)] = 8100  # the first controller's; 0: any free one
    # Where processes of the cluster reach each other, for firewalls: a port or a range, of which each process takes the
    # first that is free, n3 beginning with the fourth. "": any free ones.
    controller_ports: Annotated[str, PORTS] = ""  # gRPC: reports of nodes, figures of gateways
    # gRPC: gateways, and weights for other nodes; one for each node of a host.
    node_ports: Annotated[str, PORTS] = ""
    # Links between nodes: activations and KV; one for each node of a host.
    link_ports: Annotated[str, PORTS] = ""
    # "": SQLite in run_dir.
    database_url: Annotated[str, Text(r"|[a-z0-9+]+://.*", "empty, or DIALECT+DRIVER://...")] = ""
    transport: Literal["auto", "ucx", "sockets"] = "auto"  # what links between nodes travel on
    engine: EngineConfig = EngineConfig()
    timing: TimingConfig = TimingConfig()
    gateway: GatewayConfig = GatewayConfig()
    emulation: EmulationConfig = EmulationConfig()
    parity: ParityConfig = ParityConfig()
    tls: TlsConfig = TlsConfig()
    # Where this host stands, outermost first: { zone = "north", rack = "r7" }. What two nodes have in common from the
    # outermost on fails together; every host of a cluster has the same labels in the same order.
    labels: dict[str, str] = {}
    # Ports on other addresses than loopback without TLS. Only for a network that nobody else can reach.
    insecure: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if fault := _labels_fault(self.labels):
            raise SettingsError(fault)
        fault = conflict(self)
        if fault is not None:
            raise SettingsError(fault)

    @property
    def sums(self) -> Literal["float", "fixed"]:
        """Of products whose inputs several ranks may share."""
        if self.engine.sums == "auto":
            return "fixed" if self.ranks > 1 else "float"
        return self.engine.sums

    @property
    def advertised(self) -> str:
        """The host in every address that is registered."""
        return self.advertise or self.host

    def fault_domain(self, host: str, node: str) -> dict[str, str]:
        """Labels of a node for its record, outermost first. `host`: this machine's name, unless the labels have one."""
        own = {} if "host" in self.labels else {"host": host}
        return {**self.labels, **own, "node": node}

    @property
    def https(self) -> tuple[str, str] | None:
        """(certificate, key) that gateways and admin APIs show to clients; None: plain HTTP."""
        tls = self.tls
        if tls.https_cert:
            return tls.https_cert, tls.https_key or tls.https_cert
        return (tls.cert, tls.key or tls.cert) if tls.enabled and not is_loopback(self.host) else None

    @property
    def scope(self) -> str:
        """What is this group's own in a place that others share, such as etcd: no name has an @."""
        return self.cluster if self.group == DEFAULT_GROUP else f"{self.cluster}@{self.group}"

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name.removesuffix(".gguf")

    @property
    def secret_file(self) -> Path:
        return Path(self.run_dir) / "secret"

    @property
    def api_keys_file(self) -> Path:
        """One key a line; the gateway refuses requests without one of them."""
        return Path(self.run_dir) / "api-keys"

    @property
    def keys_file(self) -> Path:
        """API keys with names and limits, as `kfadmin keys` writes them; both files count."""
        return Path(self.run_dir) / "keys.json"

    @property
    def database(self) -> str:
        """A URL. In a path of one "?" begins its options and "%" an escape, so that they are escaped themselves."""
        return self.database_url or f"sqlite+aiosqlite:///{quote(str(Path(self.run_dir) / 'history.db'))}"

    def node_name(self, instance: int, stage: int) -> str:
        """Nodes are numbered instance by instance; spares come after the instances."""
        return f"n{instance * self.stages + stage}"


def instances_max(stages: int) -> int:
    """Instances of so many stages that a group may have."""
    return min(INSTANCES_MAX, NODES_MAX // stages)


def _labels_fault(labels: Mapping[str, str]) -> str | None:
    if len(labels) > LABELS_MAX:
        return f"labels = {dict(labels)}: at most {LABELS_MAX}"
    for text in (*labels, *labels.values()):
        if fault := NAME.fault(text):
            return f"labels = {dict(labels)}: {text!r}: {fault}"
    return "labels: node is every node's own name" if "node" in labels else None


def redacted(config: ClusterConfig) -> ClusterConfig:
    """The settings without passwords."""
    return msgspec.structs.replace(config, database_url=hidden_password(config.database_url))


def hidden_password(database_url: str) -> str:
    """There may be one before the host, or in the query (left out)."""
    scheme, slashes, rest = database_url.partition("?")[0].partition("://")
    account, at, place = rest.rpartition("@")
    user, colon, _ = account.partition(":")
    return f"{scheme}{slashes}{user}{colon and ':***'}{at}{place}"


def conflict(config: ClusterConfig) -> str | None:
    """Two settings that do not fit together, each being allowed alone; None if all do. Names both and their values."""
    return next(_conflicts(config), None)


def _conflicts(config: ClusterConfig) -> Iterator[str]:
    engine, timing, emulation = config.engine, config.timing, config.emulation
    # ---- names
    if config.model_name == ".." or MODEL_NAME.fault(config.model_name):
        yield f"model = {config.model!r} ends with no name that clients could ask for: give served_model_name"
    if twice := _twice(config.gateway.groups):
        yield f"gateway.groups names {twice!r} twice"
    # ---- sizes
    if config.instances * config.stages > NODES_MAX:
        yield (
            f"instances = {config.instances} times stages = {config.stages} is more than {NODES_MAX:,} nodes: etcd"
            " would refuse the topology"
        )
    decodes_max = engine.max_batch_tokens * engine.microbatches
    if engine.microbatches and engine.max_running > decodes_max:
        yield (
            f"engine.max_running = {engine.max_running} is more than engine.max_batch_tokens ="
            f" {engine.max_batch_tokens} times engine.microbatches = {engine.microbatches}:"
            " not every running request would have a row in a round of steps"
        )
    if engine.pool_blocks * engine.block_size > SLOTS_MAX:
        yield (
            f"engine.pool_blocks = {engine.pool_blocks} times engine.block_size = {engine.block_size} is"
            f" more than {SLOTS_MAX:,} positions"
        )
    if engine.max_model_len == 1:
        yield "engine.max_model_len = 1 has no room for a prompt and a token: allowed are 0 and 2 or more"
    if engine.weights == "int8" and engine.device != "cpu":
        yield f"engine.weights = 'int8' has kernels for engine.device = 'cpu' only, not {engine.device!r}"
    if config.sums == "fixed" and (engine.device != "cpu" or engine.weights == "int8"):
        why = f"ranks = {config.ranks}" if engine.sums == "auto" else "engine.sums = 'fixed'"
        yield (
            f"{why} has kernels for engine.device = 'cpu' and engine.weights = 'model' only, not"
            f" {engine.device!r} and {engine.weights!r}"
        )
    if config.ranks > 1 and engine.sums == "float":
        yield (
            f"ranks = {config.ranks} needs engine.sums = 'fixed' or 'auto', not 'float': tokens would depend on how"
            " many ranks there are"
        )
    if config.ranks > 1 and engine.executor != "torch":
        yield f"ranks = {config.ranks} needs engine.executor = 'torch', not {engine.executor!r}"
    if engine.attention == "xformers" and engine.device != "cuda":
        yield f"engine.attention = 'xformers' needs engine.device = 'cuda', not {engine.device!r}"
    if engine.attention == "xformers" and engine.block_size % XFORMERS_BLOCK:
        yield (
            f"engine.attention = 'xformers' has operators for blocks of a multiple of {XFORMERS_BLOCK} tokens, and"
            f" engine.block_size = {engine.block_size}"
        )
    if (engine.speculation == "draft") != bool(engine.draft_model):
        yield (
            f"engine.speculation = {engine.speculation!r} and engine.draft_model = {engine.draft_model!r}: 'draft'"
            " needs a model, and nothing else has a use for one"
        )
    if engine.speculation == "draft" and engine.executor == "oracle":
        yield "engine.speculation = 'draft' needs engine.executor = 'torch', not 'oracle'"
    if 0 < engine.pool_blocks < POOL_BLOCKS_MIN:
        yield f"engine.pool_blocks = {engine.pool_blocks}: allowed are 0 and {POOL_BLOCKS_MIN} or more"
    # ---- protection
    parity = config.parity
    if parity.code != "rs" and parity.parities != CODE_PARITIES[parity.code]:
        yield (
            f"parity.code = {parity.code!r} has {CODE_PARITIES[parity.code]} parities, not parity.parities ="
            f" {parity.parities}: only 'rs' has any number"
        )
    if config.mode is Mode.PARITY:
        shards_max = RDP_SHARDS_MAX if parity.code == "rdp" else RS_SHARDS_MAX - parity.parities
        if config.stages > shards_max:
            yield f"parity.code = {parity.code!r} takes at most {shards_max} stages, and stages = {config.stages}"
        if config.instances < 2:
            yield (
                f"mode = 'parity' keeps the parity of a pipeline on nodes of others, and instances = {config.instances}"
            )
    # ---- times
    if not timing.heartbeat_s < timing.suspect_after_s < timing.dead_after_s:
        yield (
            f"timing.heartbeat_s = {timing.heartbeat_s}, timing.suspect_after_s = {timing.suspect_after_s} and"
            f" timing.dead_after_s = {timing.dead_after_s} must grow in this order"
        )
    elif timing.suspect_after_s < BEATS_TO_SUSPECT_MIN * timing.heartbeat_s:
        yield (
            f"timing.suspect_after_s = {timing.suspect_after_s} is less than {BEATS_TO_SUSPECT_MIN} times"
            f" timing.heartbeat_s = {timing.heartbeat_s}: one late heartbeat would make a node suspect"
        )
    elif timing.dead_after_s - timing.suspect_after_s < timing.heartbeat_s - ROUNDING_S:
        yield (
            f"between timing.suspect_after_s = {timing.suspect_after_s} and timing.dead_after_s ="
            f" {timing.dead_after_s} is less than timing.heartbeat_s = {timing.heartbeat_s}: a node that is suspected"
            " would be dead before it can say a word"
        )
    # ---- addresses
    if is_unspecified(config.advertised):
        yield (
            f"host = {config.host!r} is bound well but nobody can connect to it, and advertise ="
            f" {config.advertise!r}: give the address that others reach this host at"
        )
    advertised = address_of(config.advertised)
    if advertised is not None and (advertised.is_multicast or advertised == BROADCAST):
        yield f"host = {config.host!r} and advertise = {config.advertise!r}: nobody connects to a group of hosts"
    if is_loopback(config.host) and advertised is not None and not advertised.is_loopback:
        yield (
            f"host = {config.host!r} is reached from this host only, and advertise = {config.advertise!r} tells"
            " others to connect: bind an address that they reach"
        )
    host = address_of(config.host)
    if config.transport == "ucx" and host and advertised and host.version != advertised.version:
        yield (
            f"host = {config.host!r} and advertise = {config.advertise!r} are of IPv{host.version} and"
            f" IPv{advertised.version}, and transport = 'ucx' has no links between them: give both in one of them, or"
            " transport = 'sockets'"
        )
    if config.tls.enabled and advertised and advertised.version == 6 and advertised.is_link_local:
        yield (
            f"host = {config.host!r} and advertise = {config.advertise!r}: certificates name no link-local address"
            " with its interface, so that nobody would believe those of this host: give an address of another kind"
        )
    yield from _port_conflicts(config)
    if twice := _twice(config.etcd):
        yield f"etcd names {twice!r} twice: each member is to be there once"
    # ---- certificates
    tls = config.tls
    if bool(tls.ca) != bool(tls.cert) or (tls.key and not tls.cert):
        yield f"tls.ca = {tls.ca!r}, tls.cert = {tls.cert!r} and tls.key = {tls.key!r} go together"
    if tls.https_key and not tls.https_cert:
        yield f"tls.https_key = {tls.https_key!r} needs tls.https_cert"
    if not is_loopback(config.host) and not tls.enabled and not config.insecure:
        yield (
            f"host = {config.host!r} is not loopback, and tls.ca and tls.cert are empty: tokens, prompts and KV would"
            " pass in clear. `kfadmin up` makes certificates, on several hosts `kfadmin certs init` and `kfadmin"
            " certs issue`; insecure = true is for a network that nobody else can reach"
        )
    # ---- emulated networks
    count = len(emulation.latency_s)
    if any(len(row) != count for row in emulation.latency_s):
        yield f"emulation.latency_s = {emulation.latency_s} must be a square table"
    bound = Range(0, 60)
    if any(bound.fault(cell) for row in emulation.latency_s for cell in row):
        yield f"emulation.latency_s = {emulation.latency_s}: {bound.fault(-1)}"
    slow_s = max((cell for row in emulation.latency_s for cell in row), default=0.0) / emulation.time_scale
    if slow_s >= timing.dead_after_s:
        yield (
            f"emulation.latency_s = {emulation.latency_s} makes messages take {slow_s:g} s, and"
            f" timing.dead_after_s = {timing.dead_after_s}: nodes would be taken for dead"
        )
    bytes_per_s = emulation.link_bytes_per_s * emulation.time_scale
    if bytes_per_s and bytes_per_s * timing.dead_after_s <= PING_BYTES:
        yield (
            f"emulation.link_bytes_per_s = {emulation.link_bytes_per_s} lets no message through within"
            f" timing.dead_after_s = {timing.dead_after_s}: nodes would be taken for dead"
        )
    if any(site >= count for site in emulation.sites):
        yield f"emulation.sites = {emulation.sites} names a site that emulation.latency_s has no row for ({count})"


def _twice(items: Sequence[str]) -> str | None:
    return next((item for index, item in enumerate(items) if item in items[:index]), None)


def _port_conflicts(config: ClusterConfig) -> Iterator[str]:
    found: dict[str, range] = {}
    for name in ("gateway_port", "admin_port", *RANGES):
        value: int | str = getattr(config, name)
        try:
            ports = port_range(str(value or ""))
        except ValueError as error:
            yield f"{name} = {value!r}: {error}"
            continue
        for other, theirs in found.items():
            if ports and theirs and max(ports[0], theirs[0]) <= min(ports[-1], theirs[-1]):
                yield f"{other} = {getattr(config, other)!r} and {name} = {value!r} must differ"
        found[name] = ports


def is_loopback(host: str) -> bool:
    """Whether only processes of this host reach it. A name other than localhost may be any address."""
    try:
        address = address_of(host)
    except ValueError:
        return False
    return host == "localhost" if address is None else address.is_loopback


def is_unspecified(host: str) -> bool:
    """Whether this is every address of a host, such as 0.0.0.0: to bind, not to connect to."""
    try:
        address = address_of(host)
    except ValueError:
        return False
    return address is not None and address.is_unspecified


def load_config(
    path: Path, defaults: Mapping[str, object] | None = None, given: Mapping[str, object] | None = None
) -> ClusterConfig:
    """Read settings. `defaults`: of what the file may leave out; `given`: what counts whatever it says.

    Raises ConfigError naming the file, the field and its value.
    """
    try:
        data = parsed(path.read_bytes(), json=path.suffix != ".toml")
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: the settings must be one object with a field for each")
        config = msgspec.convert({**(defaults or {}), **data, **(given or {})}, ClusterConfig)
        if path.resolve() in (Path(group).resolve() for group in config.gateway.groups):
            raise ConfigError(f"{path}: gateway.groups names this file, whose group is served anyway")
        return config
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # msgspec's are ones, too
        raise ConfigError(f"{path}: {error}") from error
