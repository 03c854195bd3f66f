"""`kfadmin pod` without a cluster: who a pod is, what it finds, its Secrets, and how many instances there should be."""

from __future__ import annotations

import base64
import http.server
import json
import os
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from controlplane.certs.folder import CertFolder
from controlplane.contract.auth import Role, derive, identify
from controlplane.contract.config import TlsConfig
from controlplane.contract.errors import ConfigError, RequestError, Unavailable
from controlplane.contract.identity import Files, ProcessName, ProcessRole
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, OperationState
from controlplane.contract.status import (
    ClusterStatus,
    NodeState,
    NodeStatus,
    OperationAnswer,
    OperationRequest,
    PipelineState,
    PipelineStatus,
    StageStatus,
)
from controlplane.contract.topology import Mode
from controlplane.kfadmin.main import app
from controlplane.kfadmin.pod import release
from controlplane.kfadmin.pod.api import KubernetesApi
from controlplane.kfadmin.pod.autoscale import Rules, decide, kv_use, pods_of
from controlplane.kfadmin.pod.place import PodPlace, PodPlan, config_of, label_value, labels_of, read_plan
from controlplane.kfadmin.pod.secret_files import Release, secrets_of
from controlplane.kfadmin.pod.verbs import command_of, prepare
from controlplane.kfadmin.rundir import RunDir
from controlplane.process import start_ticks
from controlplane.supervisor import ProcessFile

ENV = {
    "KF_POD_NAME": "shop-node-s1-2",
    "KF_POD_UID": "5f0c77aa-1",
    "KF_POD_IP": "10.1.2.3",
    "KF_NODE_NAME": "w7",
}
OF_NODE = {"KF_STAGE": "1", "KF_STAGES": "4"}
PLAN = PodPlan({"cluster": "shop"}, ("etcd:2379",), ("https://c:8100",), ("https://g",), insecure=True)


# ---- who a pod is


@pytest.mark.parametrize(
    ("env", "role", "name"),
    [
        ({}, ProcessRole.CONTROLLER, "c2"),
        ({}, ProcessRole.GATEWAY, "g2"),
        ({"KF_POD_NAME": "shop-etcd-0"}, ProcessRole.ETCD, "e0"),
        (OF_NODE, ProcessRole.NODE, "n9"),
        ({"KF_STAGE": "0", "KF_STAGES": "1", "KF_POD_NAME": "a-node-s0-11"}, ProcessRole.NODE, "n11"),
    ],
)
def test_names_come_from_ordinals(env: dict[str, str], role: ProcessRole, name: str) -> None:
    assert PodPlace.of(ENV | env).process(role) == name


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"KF_POD_IP": ""}, "downward API"),
        ({"KF_STAGE": "4", "KF_STAGES": "4"}, "KF_STAGE = '4'"),
        ({"KF_STAGE": "", "KF_STAGES": "4"}, "KF_STAGE = ''"),
        ({"KF_POD_NAME": "shop-7d9f-x2x"}, "ends in no ordinal"),
        ({}, "have to be set in a node's pod"),
    ],
)
def test_a_pod_that_is_none_of_ours_is_told_so(env: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PodPlace.of(ENV | env).process(ProcessRole.NODE)


def test_pods_bind_every_address_and_register_their_own() -> None:
    for address, bind in (("10.1.2.3", "0.0.0.0"), ("fd00::7", "::")):
        place = PodPlace.of(ENV | {"KF_POD_IP": address})
        config = config_of(PLAN, place, ProcessRole.GATEWAY, Path("/run"))
        assert (config.host, config.advertised) == (bind, address)


def test_settings_of_gateways_alone_have_the_certificate_for_clients() -> None:
    tls = TlsConfig(ca="/c/ca.pem", cert="/c/{process}.pem")
    plan = msgspec.structs.replace(PLAN, tls=tls, https=("/h/tls.crt", "/h/tls.key"), insecure=False)
    found = {
        role: config_of(plan, PodPlace.of(ENV), role, Path("/run")).https
        for role in (ProcessRole.GATEWAY, ProcessRole.CONTROLLER)
    }
    assert found[ProcessRole.GATEWAY] == ("/h/tls.crt", "/h/tls.key")
    assert found[ProcessRole.CONTROLLER] == ("/c/{process}.pem", "/c/{process}.pem")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"settings": {"host": "0.0.0.0"}}, "settings.host is a pod's own"),
        ({"settings": {}, "etcd": ["nowhere"]}, "etcd"),
        ({"settings": {}, "more": 1}, "more"),
        (None, "cannot read"),
    ],
)
def test_a_fault_in_the_plan_is_named(tmp_path: Path, plan: Any, said: str) -> None:
    path = tmp_path / "plan.json"
    if plan is not None:
        path.write_text(json.dumps({"etcd": ["e:2379"], "admin": [], "gateways": []} | plan))
    with pytest.raises(ConfigError, match=said):
        read_plan(path)


def test_stages_of_pods_and_settings_are_the_same() -> None:
    place = PodPlace.of(ENV | {"KF_STAGE": "1", "KF_STAGES": "3"})
    with pytest.raises(ConfigError, match="KF_STAGES = 3"):
        config_of(PLAN, place, ProcessRole.NODE, Path("/run"), {})


def test_fault_domains_end_with_the_machine() -> None:
    plan = msgspec.structs.replace(PLAN, fault_domains={"zone": "topology.kubernetes.io/zone", "rack": "r"})
    place = PodPlace.of(ENV)
    assert list(labels_of(plan, place, {"rack": "r1", "zone": "a"}).items()) == [
        ("zone", "a"), ("rack", "r1"), ("host", "w7"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="w7 has no label topology"):
        labels_of(plan, place, {"rack": "r1"})
    long = "ip-10-0-0-1.eu-central-1.compute.internal." + "x" * 40
    assert label_value("a.b-c_d") == "a.b-c_d"
    assert len(label_value(long)) == 16 != label_value(long + "y")


# ---- what it finds


def test_a_pod_finds_its_files_with_rights_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, keys = tmp_path / "credentials", tmp_path / "keys"
    for folder in (credentials, keys):
        folder.mkdir()
    (credentials / "secret").write_text("s" * 64)
    (credentials / "secret").chmod(0o440)  # as Kubernetes gives it
    (keys / "api-keys").write_text("kf-1\n")
    monkeypatch.setenv("KF_CREDENTIALS", str(credentials))
    monkeypatch.setenv("KF_API_KEYS", str(keys))
    local = RunDir(tmp_path / "run")
    local.make_folders()
    (local.path / "hold" / "n9").touch()  # a container of this pod was told to leave, and was started again
    for role, name in ((ProcessRole.GATEWAY, "g0"), (ProcessRole.NODE, "n9")):
        config = config_of(PLAN, PodPlace.of(ENV | OF_NODE), role, local.path, {})
        prepare(local, PLAN, config, ProcessName(role, name))
    assert stat.S_IMODE((local.path / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(local.path.stat().st_mode) == 0o700
    assert local.admin_token()
    assert not list((local.path / "hold").iterdir())
    assert local.endpoints().admin == ("https://c:8100",)
    assert local.config() == config
    (keys / "api-keys").unlink()
    (keys / "api-keys").write_text("kf-2\n")
    assert local.api_key() == "kf-2"  # a changed Secret is seen
    assert os.readlink(local.log("n9")) == f"/proc/{os.getpid()}/fd/2"


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot read the cluster's secret"), ("short", "shorter")]
)
def test_a_pod_without_the_clusters_secret_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    monkeypatch.setenv("KF_CREDENTIALS", str(tmp_path))
    local = RunDir(tmp_path / "run")
    config = config_of(PLAN, PodPlace.of(ENV), ProcessRole.CONTROLLER, local.path)
    with pytest.raises(ConfigError, match=said):
        prepare(local, PLAN, config, ProcessName(ProcessRole.CONTROLLER, "c2"))


def test_a_controller_is_told_of_the_login_provider_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, local, place = tmp_path / "oidc.toml", RunDir(tmp_path / "run"), PodPlace.of(ENV)
    monkeypatch.setenv("KF_OIDC", str(file))
    config = config_of(PLAN, place, ProcessRole.CONTROLLER, local.path)
    me = ProcessName(ProcessRole.CONTROLLER, "c2")
    assert "--oidc" not in command_of(local, PLAN, place, config, me)
    file.touch()
    assert command_of(local, PLAN, place, config, me)[-2:] == ["--oidc", str(file)]


def test_verbs_say_what_is_missing() -> None:
    done = CliRunner().invoke(app, ["pod", "run", "node"], env={"KF_POD_NAME": ""})
    assert done.exit_code == 1
    assert "downward API" in done.stderr
    done = CliRunner().invoke(app, ["pod", "run", "relay"], env=ENV)
    assert done.exit_code == 2
    assert "etcd, controller, gateway, node" in done.stderr


# ---- probes


def probe(what: str, run_dir: Path, ordinal: int) -> tuple[int, str]:
    env = os.environ | ENV | OF_NODE | {"KF_RUN_DIR": str(run_dir), "KF_POD_NAME": f"shop-node-s1-{ordinal}"}
    done = subprocess.run(
        [sys.executable, "-m", "controlplane.kfadmin.pod.probe", what],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


LISTEN = "import socket; s = socket.create_server(('127.0.0.1', 0)); print('up', flush=True); input()"
SLEEP = "print('up', flush=True); input()"


def test_probes_tell_whether_a_node_runs_and_whether_it_serves(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    assert probe("live", tmp_path, 2)[0] == 0  # the group does not want it, or it is about to be started
    assert probe("ready", tmp_path, 2) == (1, "n9 has not been started\n")
    for code, ready in ((SLEEP, "does not listen yet"), (LISTEN, "")):
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        file = ProcessFile(child.pid, 0.0, 0, start_ticks(child.pid) or 0)
        (tmp_path / "nodes" / "n9.json").write_bytes(msgspec.json.encode(file))
        assert probe("live", tmp_path, 2)[0] == 0
        found = probe("ready", tmp_path, 2)
        assert (found[0] == 0) == (not ready)
        assert ready in found[1]
        child.communicate(b"\n")
    for what in ("live", "ready"):
        assert probe(what, tmp_path, 2) == (1, "n9 does not run: it has ended\n")


# ---- Secrets


def test_secrets_have_what_each_role_may_know(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    CertFolder(tmp_path / "certs").create("shop", now)
    counts = {ProcessRole.CONTROLLER: 2, ProcessRole.GATEWAY: 1, ProcessRole.NODE: 2, ProcessRole.ETCD: 0}
    release = Release("shop", "llm", counts, ("api.example.com", "FD00:0::1"))
    made = {one["metadata"]["name"]: one["data"] for one in secrets_of(tmp_path, release, timedelta(days=1))}
    files = {name: set(data) for name, data in made.items()}
    assert files == {
        "shop-credentials": {"secret"},
        "shop-api-keys": {"api-keys"},
        "shop-metrics": {"controllers", "gateways"},
        "shop-operator": {"token"},
        "shop-controller-certs": {"ca.pem", "controller-c0.pem", "controller-c1.pem"},
        "shop-gateway-certs": {"ca.pem", "gateway-g0.pem"},
        "shop-node-certs": {"ca.pem", "node-n0.pem", "node-n1.pem", "relay-host.pem"},
    }
    admin = derive(base64.b64decode(made["shop-credentials"]["secret"]).strip(), "admin")
    for name, key, role in (("metrics", "controllers", Role.METRICS), ("operator", "token", Role.OPERATOR)):
        caller = identify(base64.b64decode(made[f"shop-{name}"][key]).decode(), admin, now.timestamp())
        assert caller is not None
        assert caller.role is role
    leaves = {leaf.process: leaf for leaf in CertFolder(tmp_path / "certs").leaves()}
    assert {"api.example.com", "shop-gateway.llm.svc"} <= set(leaves["gateway-g0"].names)
    assert "shop-controller-1.shop-controller.llm.svc" in leaves["controller-c1"].names
    Files(
        TlsConfig(ca=str(tmp_path / "certs/ca.pem"), cert=str(tmp_path / "certs/{process}.pem")),
        ProcessName(ProcessRole.NODE, "n1"),
    )
    again = {one["metadata"]["name"]: one["data"] for one in secrets_of(tmp_path, release, timedelta(days=1))}
    # Nothing was due.
    assert {name: data for name, data in again.items() if "certs" in name} == {
        name: data for name, data in made.items() if "certs" in name
    }


def test_secrets_without_certificates_need_no_authority(tmp_path: Path) -> None:
    release = Release("shop", "llm", {ProcessRole.NODE: 2})
    made = secrets_of(tmp_path, release, timedelta(days=1), certificates=False)
    assert {one["metadata"]["name"] for one in made} == {
        f"shop-{what}" for what in ("credentials", "api-keys", "metrics", "operator")
    }


def test_a_scraper_has_a_key_for_metrics_alone(tmp_path: Path) -> None:
    release = Release("shop", "llm", {})

    def made() -> str:
        found = {
            one["metadata"]["name"]: one["data"] for one in secrets_of(tmp_path, release, timedelta(1), False)
        }
        return base64.b64decode(found["shop-metrics"]["gateways"]).decode()

    first = made()
    assert first == (tmp_path / "api-keys").read_text().split()[0]  # until there is one
    file = ["--file", str(tmp_path / "keys.json")]
    for name, option in (("client", []), ("prometheus", ["--metrics"])):
        key = CliRunner().invoke(app, ["keys", "create", name, *option, *file]).stdout
        (tmp_path / "metrics-key").write_text(key)
        if option:
            assert made() == key.strip()
        else:
            with pytest.raises(ConfigError, match="metrics-key is no key"):
                made()
    assert CliRunner().invoke(app, ["keys", "revoke", "prometheus", *file]).exit_code == 0
    with pytest.raises(ConfigError, match="metrics-key is no key"):
        made()


def test_secrets_need_an_authority(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pod", "secrets", "shop", "--dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "kfadmin certs init" in done.stderr
    assert done.stdout == ""


# ---- how many instances


def status(
    instances: int = 2,
    waiting: int = 0,
    used: int = 0,
    operations: tuple[Operation, ...] = (),
    closing: int = 0,
    paused: bool = False,
) -> ClusterStatus:
    """Of two stages; each node has 100 blocks, of which requests have `used`."""
    pipelines, nodes = [], []
    for number in range(instances):
        homes = [f"n{2 * number + stage}" for stage in range(2)]
        stages = tuple(StageStatus((home,), (Member(home, "i"),), False, (), 0) for home in homes)
        pipelines.append(
            PipelineStatus(
                f"p{number}",
                PipelineState.UP,
                1,
                stages,
                0,
                waiting if number == 0 else 0,
                closing=number >= instances - closing,
            )
        )
        nodes += [
            NodeStatus(
                home,
                NodeState.GREEN,
                stage=stage,
                serving=(f"p{number}/{stage}",),
                blocks_used=used,
                blocks_total=100,
            )
            for stage, home in enumerate(homes)
        ]
    return ClusterStatus(
        "shop", "default", "m", Mode.REPLICATE, True, 1, paused, "c0", "c0", 0.0, tuple(nodes), tuple(pipelines),
        (), (), operations,
    )  # fmt: skip


RULES = Rules(2, 4)
NOW = 10_000.0


def scaled(state: OperationState, ended: float = 0.0) -> tuple[Operation, ...]:
    return (Operation("s", OperationKind.SCALE, state=state, finished_unix_s=ended, instances=3),)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (status(), 2),
        (status(waiting=7), 2),
        (status(waiting=8), 3),
        (status(used=81), 3),
        (status(4, waiting=100), 4),
        (status(3, used=10), 2),
        (status(3, used=10, waiting=1), 3),
        (status(3, used=10, operations=scaled(OperationState.DONE, NOW - 599)), 3),
        (status(3, used=10, operations=scaled(OperationState.DONE, NOW - 601)), 2),
        (status(3, used=10, operations=scaled(OperationState.FAILED, NOW - 599)), 3),
        (status(waiting=8, operations=scaled(OperationState.FAILED, NOW - 599)), 2),
        (status(waiting=8, operations=scaled(OperationState.CANCELLED, NOW - 599)), 2),
        (status(waiting=8, operations=scaled(OperationState.FAILED, NOW - 601)), 3),
        (status(waiting=8, operations=scaled(OperationState.DONE, NOW - 1)), 3),
        (status(1, operations=scaled(OperationState.FAILED, NOW - 1)), 1),
        (status(3, used=10, operations=scaled(OperationState.RUNNING)), 3),
        (status(3, used=10, paused=True), 3),
        (status(2, used=10), 2),
        (status(1), 2),
        (status(6), 4),
        (status(4, closing=1), 3 - 1),
    ],
)
def test_instances_follow_load(seen: ClusterStatus, wanted: int) -> None:
    assert decide(seen, RULES, NOW).instances == wanted


def test_nothing_is_asked_for_while_an_operation_runs() -> None:
    decision = decide(status(1, operations=scaled(OperationState.RUNNING)), RULES, NOW)
    assert decision.scaling
    assert not decision.changes


def test_what_is_asked_for_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that cannot be finished would keep all others waiting."""
    asked: list[OperationRequest] = []

    def submit(request: OperationRequest) -> OperationAnswer:
        asked.append(request)
        return OperationAnswer(True, (), ())

    client = SimpleNamespace(current=lambda: status(waiting=100), settings=dict, submit=submit)
    api = SimpleNamespace(pods_of=lambda _: 2, set_pods_of=lambda *_: None)
    monkeypatch.setattr(release, "connect", lambda *_: nullcontext(client))
    monkeypatch.setattr(release, "KubernetesApi", lambda: nullcontext(api))
    done = CliRunner().invoke(app, ["pod", "autoscale", "shop-node-s0", "--min", "1", "--max", "4"])
    assert done.exit_code == 0, done.output
    assert [(request.instances, request.deadline_s) for request in asked] == [(3, 1800.0)]


def test_the_stage_with_the_least_left_counts() -> None:
    seen = status()
    nodes = (msgspec.structs.replace(seen.nodes[1], blocks_used=90), *seen.nodes[2:])
    assert kv_use(msgspec.structs.replace(seen, nodes=nodes)) == pytest.approx(0.45)


def test_pods_stay_while_anything_names_their_nodes() -> None:
    assert pods_of(status(2), 2, 0) == 2
    assert pods_of(status(2), 3, 1) == 4  # before they join
    assert pods_of(status(4, closing=2), 2, 0) == 4  # still serving
    assert pods_of(status(4), 3, 0) == 4  # still homes
    moved = status(4, closing=2)
    pipelines = tuple(
        msgspec.structs.replace(
            pipeline,
            stages=tuple(
                msgspec.structs.replace(stage, serving=(Member("n0", "i"),)) for stage in pipeline.stages
            ),
        )
        for pipeline in moved.pipelines
    )
    assert pods_of(msgspec.structs.replace(moved, pipelines=pipelines), 2, 0) == 2


@pytest.mark.parametrize("rules", [(0, 2), (3, 2), (1, 2, 0.0), (1, 2, 4.0, 0.3, 0.3)])
def test_rules_that_make_no_sense_are_refused(rules: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError):
        Rules(*rules)


# ---- Kubernetes' API


class Kubernetes(http.server.BaseHTTPRequestHandler):
    """The two resources that are asked for, as the API server answers them."""

    replicas = 4
    fail = 0

    def do_GET(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        assert self.headers["content-type"] == "application/merge-patch+json"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Kubernetes.replicas = body["spec"]["replicas"]
        self._answer()

    def _answer(self) -> None:
        paths = {
            "/api/v1/nodes/w7": {"metadata": {"name": "w7", "labels": {"topology.kubernetes.io/zone": "a"}}},
            "/apis/apps/v1/namespaces/llm/statefulsets/shop-node-s0/scale": {
                "kind": "Scale", "spec": {"replicas": Kubernetes.replicas},
            },
        }  # fmt: skip
        code = Kubernetes.fail or (200 if self.path in paths else 404)
        if self.headers["authorization"] != "Bearer t0k3n":
            code = 401
        body = json.dumps(paths.get(self.path, {}) if code == 200 else {"kind": "Status"}).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """Environment and service account of a pod, beside a server with a certificate."""
    certs = CertFolder(tmp_path / "certs")
    certs.create("k8s", datetime.now(UTC))
    (file,) = certs.issue([ProcessName(ProcessRole.ADMIN, "api")], ["127.0.0.1"], datetime.now(UTC))
    server = http.server.HTTPServer(("127.0.0.1", 0), Kubernetes)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    account = tmp_path / "account"
    account.mkdir()
    for name, content in (("token", "t0k3n\n"), ("namespace", "llm"), ("ca.crt", certs.ca.read_text())):
        (account / name).write_text(content)
    Kubernetes.replicas, Kubernetes.fail = 4, 0
    port = str(server.server_address[1])
    yield {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT_HTTPS": port}, account
    server.shutdown()
    server.server_close()


def test_labels_and_pods_come_from_kubernetes(kubernetes: tuple[dict[str, str], Path]) -> None:
    env, account = kubernetes
    with KubernetesApi(env, account) as api:
        assert api.node_labels("w7") == {"topology.kubernetes.io/zone": "a"}
        assert api.pods_of("shop-node-s0") == 4
        api.set_pods_of("shop-node-s0", 6)
        assert api.pods_of("shop-node-s0") == 6
        Kubernetes.fail = 503
        with pytest.raises(Unavailable, match="HTTP 503"):
            api.node_labels("w7")
        Kubernetes.fail = 403
        with pytest.raises(ConfigError, match=r"rbac\.create"):
            api.set_pods_of("shop-node-s0", 8)
    with pytest.raises(ConfigError, match="no service account"):
        KubernetesApi(env, account / "nowhere")
