"""A cluster over several hosts, in one file (TOML) of its operator: settings that all share, and what runs where.

    [settings]                       # controlplane/contract/config.py; what is left out is as without it
    cluster = "shop"

    [hosts.a]
    address = "10.77.1.2"            # others reach it there: an address of the host, or a name of it
    labels = { rack = "r1" }         # outermost first
    etcd = true
    controller = true
    gateway = true
    nodes = ["n0"]

A host's etcd member, controller and gateway have the host's name. All that a host needs is made of this (`plan`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec

from controlplane.contract.address import join, port_range, too_few
from controlplane.contract.config import HOST, MAYBE_PATH, NAME, PORTS, RANGES, ClusterConfig, TlsConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import RELAY_NAME, ProcessName, ProcessRole, etcd_name
from controlplane.contract.ranges import Range, check_bounds, parsed

# A host decides these by itself, from where it was joined and what the file says of it.
OF_A_HOST = ("run_dir", "host", "advertise", "etcd", "tls", "labels", "insecure")
NOWHERE = {"run_dir": "-", "model": "-", "insecure": True}  # to hold settings of no host against their bounds
QUORUM_WORDS = "an even number of members survives no more failures than one fewer"


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    address: Annotated[str, HOST]  # registered: others connect to it
    bind: Annotated[str, HOST] = ""  # where ports are bound; "": the address
    labels: dict[str, str] = {}
    etcd: bool = False
    controller: bool = False
    gateway: bool = False
    nodes: tuple[Annotated[str, NAME], ...] = ()
    # In place of what the settings say, for a host with a firewall of its own.
    controller_ports: Annotated[str, PORTS] = ""
    node_ports: Annotated[str, PORTS] = ""
    link_ports: Annotated[str, PORTS] = ""
    # Files on the host that clients and browsers see in place of the cluster's own certificate (`tls.https_cert`).
    https_cert: Annotated[str, MAYBE_PATH] = ""
    https_key: Annotated[str, MAYBE_PATH] = ""

    def __post_init__(self) -> None:
        check_bounds(msgspec.structs.replace(self, bind=self.address) if not self.bind else self)


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    settings: dict[str, Any]
    hosts: dict[str, Host]
    etcd_port: Annotated[int, Range(1, 65535)] = 2379
    etcd_peer_port: Annotated[int, Range(1, 65535)] = 2380

    def __post_init__(self) -> None:
        check_bounds(self)


class HostPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host is to be; the part of its bundle that is no secret."""

    name: str
    settings: dict[str, Any]  # without run_dir and tls, and without a model where the demo's is meant
    etcd_members: dict[str, str]  # address of each
    etcd_port: int
    etcd_peer_port: int
    etcd: bool
    controller: bool
    gateway: bool
    nodes: tuple[str, ...]
    https: tuple[str, str]  # certificate and key that clients see; empty: the cluster's own
    admin: tuple[str, ...]  # URLs of every controller, and of every gateway
    gateways: tuple[str, ...]

    @property
    def cluster(self) -> str:
        return str(self.settings.get("cluster", ClusterConfig(run_dir="-", model="-", etcd=()).cluster))

    def etcd_bracketed(self) -> dict[str, str]:
        """Addresses of etcd's members as URLs have them."""
        return {name: bracketed(address) for name, address in self.etcd_members.items()}

    def processes(self) -> list[ProcessName]:
        """Who has a certificate on this host."""
        of_role = {
            ProcessRole.ETCD: [self.name] if self.etcd else [],
            ProcessRole.CONTROLLER: [self.name] if self.controller else [],
            ProcessRole.GATEWAY: [self.name] if self.gateway else [],
            ProcessRole.NODE: list(self.nodes),
            ProcessRole.RELAY: [RELAY_NAME] if self.nodes else [],
            ProcessRole.ADMIN: [self.name],
        }
        return [ProcessName(role, name) for role, names in of_role.items() for name in names]

    def config(self, run_dir: Path, certs: Path, model: Path) -> ClusterConfig:
        """The settings of its processes; `model`: where it is on this host. Raises ConfigError."""
        tls = TlsConfig(
            ca=str(certs / "ca.pem"),
            cert=str(certs / "{process}.pem"),
            etcd_name=etcd_name(self.cluster),
            https_cert=self.https[0],
            https_key=self.https[1],
        )
        where = {"run_dir": str(run_dir), "model": str(model), "tls": msgspec.to_builtins(tls)}
        return _config({**self.settings, **where})


def read_fleet(path: Path) -> Fleet:
    """Raises ConfigError naming the file and what is wrong in it."""
    try:
        fleet = msgspec.convert(parsed(path.read_bytes()), Fleet)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        _check(fleet)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return fleet


def plan(fleet: Fleet, name: str) -> HostPlan:
    """Raises ConfigError if there is no such host."""
    host = fleet.hosts.get(name)
    if host is None:
        raise ConfigError(f"no host {name!r} in the file: it has {', '.join(sorted(fleet.hosts))}")
    members = {other: one.address for other, one in fleet.hosts.items() if one.etcd}
    settings = {
        **fleet.settings,
        "host": host.bind or host.address,
        "advertise": host.address,
        "labels": _labels(name, host),
        **{setting: ports for setting in RANGES if (ports := getattr(host, setting))},
        "etcd": [join(address, fleet.etcd_port) for address in members.values()],
    }
    draft = _config({**settings, **NOWHERE})
    return HostPlan(
        name=name,
        settings=settings,
        etcd_members=members,
        etcd_port=fleet.etcd_port,
        etcd_peer_port=fleet.etcd_peer_port,
        etcd=host.etcd,
        controller=host.controller,
        gateway=host.gateway,
        nodes=host.nodes,
        https=(host.https_cert, host.https_key),
        admin=tuple(
            f"https://{join(o.address, draft.admin_port)}" for o in fleet.hosts.values() if o.controller
        ),
        gateways=tuple(
            f"https://{join(o.address, draft.gateway_port)}" for o in fleet.hosts.values() if o.gateway
        ),
    )


def warnings(fleet: Fleet) -> list[str]:
    """What works but does not survive what it could."""
    members = sum(host.etcd for host in fleet.hosts.values())
    controllers = sum(host.controller for host in fleet.hosts.values())
    found = []
    if members % 2 == 0:
        found.append(f"etcd has {members} members: {QUORUM_WORDS}")
    elif members == 1:
        found.append(
            "etcd has one member: without its host nothing is reconfigured; give three hosts `etcd = true`"
        )
    if controllers == 1:
        found.append(
            "one controller: without its host nothing is repaired; give another host `controller = true`"
        )
    return [*found, *_together(fleet)]


def _together(fleet: Fleet) -> list[str]:
    """Stages of which one label has every node although hosts differ in it: their copies can be nowhere else."""
    stages = _config({**plan(fleet, next(iter(fleet.hosts))).settings, **NOWHERE}).stages
    where: dict[tuple[int, str], set[str]] = {}
    for host in fleet.hosts.values():
        for label, node in itertools.product(host.labels, host.nodes):
            where.setdefault((int(node.removeprefix("n")) % stages, label), set()).add(host.labels[label])
    every = {label: {host.labels[label] for host in fleet.hosts.values()} for _, label in where}
    return [
        f"every node of stage {stage} is in {label} {min(values)}: no copy of its KV survives that"
        for (stage, label), values in sorted(where.items())
        if len(values) == 1 < len(every[label])
    ]


def _check(fleet: Fleet) -> None:
    """Raises ConfigError."""
    if taken := [key for key in OF_A_HOST if key in fleet.settings]:
        raise ConfigError(f"settings.{taken[0]} is a host's own: `kfadmin host join` sets it")
    if not fleet.hosts:
        raise ConfigError("no host: a table [hosts.NAME] for each")
    for name in fleet.hosts:
        if fault := NAME.fault(name) or ("no dots, which certificates keep apart" if "." in name else None):
            raise ConfigError(f"hosts.{name}: {fault}")
    for what in ("etcd", "controller", "gateway"):
        if not any(getattr(host, what) for host in fleet.hosts.values()):
            raise ConfigError(f"no host has `{what} = true`")
    plans = [plan(fleet, name) for name in fleet.hosts]  # holds the settings against their bounds
    for one in plans:
        _check_ports(one)
    _check_labels(fleet)
    config = _config({**plans[0].settings, **NOWHERE})
    if not config.gateway_port or not config.admin_port:
        raise ConfigError("gateway_port and admin_port cannot be 0: other hosts have to know them")
    wanted = {f"n{number}" for number in range((config.instances + config.spares) * config.stages)}
    counted = Counter(node for host in fleet.hosts.values() for node in host.nodes)
    if twice := sorted(node for node, count in counted.items() if count > 1):
        raise ConfigError(f"{twice[0]} runs on {counted[twice[0]]} hosts: a node has one")
    if missing := sorted(wanted - counted.keys()):
        raise ConfigError(
            f"no host has {', '.join(missing)}: {config.instances} instances and {config.spares} spares of"
            f" {config.stages} stages have n0 to n{len(wanted) - 1}"
        )
    if unknown := sorted(counted.keys() - wanted):
        raise ConfigError(f"{unknown[0]} is no node of this cluster, which has n0 to n{len(wanted) - 1}")


def _check_ports(host: HostPlan) -> None:
    config = _config({**host.settings, **NOWHERE})
    for setting, processes in zip(RANGES, (1, len(host.nodes), len(host.nodes)), strict=True):
        ports = getattr(config, setting)
        if fault := too_few(setting, ports, processes):
            raise ConfigError(f"hosts.{host.name}: {fault}")
        for name in ("etcd_port", "etcd_peer_port") if host.etcd else ():
            if getattr(host, name) in port_range(ports):
                raise ConfigError(
                    f"hosts.{host.name}: {name} = {getattr(host, name)} is in {setting} = {ports!r}"
                )


def _check_labels(fleet: Fleet) -> None:
    first = next(iter(fleet.hosts))
    for name, host in fleet.hosts.items():
        ours, theirs = list(host.labels), list(fleet.hosts[first].labels)
        if ours != theirs:
            raise ConfigError(
                f"labels of {name} are {ours}, and those of {first} {theirs}: all hosts have the same, outermost first"
            )


def _labels(name: str, host: Host) -> dict[str, str]:
    return {**host.labels, **({} if "host" in host.labels else {"host": name})}


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def _config(given: dict[str, Any]) -> ClusterConfig:
    try:
        return msgspec.convert(given, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from error
