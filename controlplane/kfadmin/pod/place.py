"""What a pod is to be, from what the chart writes for all pods and what Kubernetes says of this one.

The chart's ConfigMap has one file (`PodPlan`) that is the same for every pod of a release; name, address and machine
come from the downward API. Pod NAME-3 of a StatefulSet is the controller c3, the gateway g3 or etcd's member e3, the
same one again after each restart. Nodes have a StatefulSet for each stage, so that Kubernetes can keep those apart that
hold copies of each other: of S stages, pod NAME-3 of stage 1 is the node n(3 S + 1), the one of instance 3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from controlplane.contract.config import ENDPOINT, NAME, ClusterConfig, TlsConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import ProcessRole
from controlplane.contract.ranges import check_bounds
from controlplane.kfadmin.fleet import OF_A_HOST
from controlplane.kfadmin.up import demo_model, packaged_model
from controlplane.unreadable import UNREADABLE

PLAN_FILE = Path("/etc/kevlarflow/plan.json")
ORDINAL = re.compile(r".*-(0|[1-9][0-9]{0,4})")
LABEL_CHARS_MAX = 63
# Of a pod, from the downward API: what the chart sets.
POD_NAME, POD_UID, POD_IP, NODE_NAME = "KF_POD_NAME", "KF_POD_UID", "KF_POD_IP", "KF_NODE_NAME"
STAGE, STAGES = "KF_STAGE", "KF_STAGES"  # of a node's pod: its stage, and how many there are
LETTERS = {
    ProcessRole.ETCD: "e",
    ProcessRole.CONTROLLER: "c",
    ProcessRole.GATEWAY: "g",
    ProcessRole.NODE: "n",
}


class PodPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all pods of a release share."""

    # Of the cluster, as `[settings]` of a fleet file has them: without what is a host's own.
    settings: dict[str, Any]
    etcd: tuple[Annotated[str, ENDPOINT], ...]
    admin: tuple[str, ...]  # URLs of the controllers
    gateways: tuple[str, ...]
    etcd_members: dict[str, str] = {}  # DNS name by name, of an etcd of the release's own
    tls: TlsConfig = TlsConfig()
    # Certificate and key that clients of gateways see; empty: the cluster's.
    https: tuple[str, str] = ("", "")
    # Label of ours, outermost first: label of the Kubernetes node that its value is taken from.
    fault_domains: dict[str, str] = {}
    insecure: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class PodPlace:
    """What Kubernetes says of this pod."""

    name: str
    uid: str
    address: str  # its IP address
    machine: str  # the node's name in Kubernetes
    stage: int = 0
    stages: int = 0  # 0: of a pod that is no node's

    @classmethod
    def of(cls, env: Mapping[str, str]) -> PodPlace:
        """Raises ConfigError."""
        name, uid, address, machine = (env.get(key, "") for key in (POD_NAME, POD_UID, POD_IP, NODE_NAME))
        if not (name and uid and address and machine):
            raise ConfigError(
                f"{POD_NAME}, {POD_UID}, {POD_IP} and {NODE_NAME} have to be set, as the chart does from the"
                " downward API: `kfadmin pod` runs in a pod"
            )
        stage, stages = env.get(STAGE, ""), env.get(STAGES, "")
        if not stages:
            return cls(name, uid, address, machine)
        if not (stage.isdecimal() and stages.isdecimal() and int(stage) < int(stages)):
            raise ConfigError(
                f"{STAGE} = {stage!r} and {STAGES} = {stages!r}: a stage, and a number of stages above it"
            )
        return cls(name, uid, address, machine, int(stage), int(stages))

    def process(self, role: ProcessRole) -> str:
        """The name of the process. Raises ConfigError."""
        match = ORDINAL.fullmatch(self.name)
        if match is None:
            raise ConfigError(
                f"{POD_NAME} = {self.name!r} ends in no ordinal: processes are named by pods of a StatefulSet"
            )
        number = int(match[1])
        if role is ProcessRole.NODE:
            if not self.stages:
                raise ConfigError(f"{STAGE} and {STAGES} have to be set in a node's pod")
            number = number * self.stages + self.stage
        return f"{LETTERS[role]}{number}"

    @property
    def bind(self) -> str:
        """Every address of the pod, so that `kubectl port-forward`, which comes over loopback, arrives as well."""
        return "::" if ":" in self.address else "0.0.0.0"


def read_plan(path: Path) -> PodPlan:
    """Raises ConfigError naming the file and what is wrong in it."""
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=PodPlan)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; the chart mounts it from a ConfigMap"
        ) from error
    except UNREADABLE as error:
        raise ConfigError(f"{path}: {error}") from error
    if taken := [key for key in OF_A_HOST if key in plan.settings]:
        raise ConfigError(f"{path}: settings.{taken[0]} is a pod's own: `kfadmin pod run` sets it")
    return plan


def config_of(
    plan: PodPlan, place: PodPlace, role: ProcessRole, run_dir: Path, domains: Mapping[str, str] | None = None
) -> ClusterConfig:
    """The settings of this pod's process. `domains`: of a node, the values of `plan.fault_domains` by our labels.
    Raises ConfigError."""
    given = plan.settings.get("model")
    https = plan.https if role is ProcessRole.GATEWAY else ("", "")
    tls = msgspec.structs.replace(plan.tls, https_cert=https[0], https_key=https[1])
    settings = {
        **plan.settings,
        "run_dir": str(run_dir),
        "model": str(demo_model() if given is None else packaged_model(Path(str(given)))),
        "etcd": plan.etcd,
        "host": place.bind,
        "advertise": place.address,
        "labels": {} if domains is None else labels_of(plan, place, domains),
        "tls": msgspec.to_builtins(tls),
        "insecure": plan.insecure,
    }
    try:
        config = msgspec.convert(settings, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from error
    if place.stages and place.stages != config.stages:
        raise ConfigError(
            f"{STAGES} = {place.stages}, and settings.stages = {config.stages}: they have to be equal"
        )
    return config


def labels_of(plan: PodPlan, place: PodPlace, domains: Mapping[str, str]) -> dict[str, str]:
    """Where the pod is, outermost first, the machine last. Raises ConfigError."""
    if missing := [label for label in plan.fault_domains if label not in domains]:
        raise ConfigError(
            f"the Kubernetes node {place.machine} has no label {plan.fault_domains[missing[0]]}, which says its"
            f" {missing[0]}: label it, or take {missing[0]} out of faultDomains"
        )
    found = {label: label_value(domains[label]) for label in plan.fault_domains}
    return found if "host" in found else {**found, "host": label_value(place.machine)}


def label_value(text: str) -> str:
    """As it is where a label of ours takes it; else a digest, which is as good for telling places apart."""
    if len(text) <= LABEL_CHARS_MAX and NAME.fault(text) is None:
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:16]
