"""The Helm chart: what it renders is valid, keeps to our rules, and is what processes take."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.contract.oidc import OidcRoles, load_oidc
from controlplane.kfadmin.pod.place import PodPlace, config_of, read_plan
from controlplane.kfadmin.pod.secret_files import Release
from controlplane.kfadmin.pod.verbs import OIDC as OIDC_FILE
from tests.deploy.chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    ROOT,
    Document,
    example,
    of_kind,
    render,
    templates,
)

VALUES = {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES} | {"defaults": {}}
RENDERED = {name: render(values) for name, values in VALUES.items()}
OTHERS = {"ServiceMonitor", "PrometheusRule", "Certificate"}  # of operators: Kubernetes has no schema of them
VERSIONS = ("1.28.0", "1.37.0")
EACH = pytest.mark.parametrize("name", RENDERED)


def merged(name: str, **more: Any) -> Document:
    values = copy.deepcopy(VALUES[name])
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def plan_of(documents: list[Document], folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text(of_kind(documents, "ConfigMap")[f"{RELEASE}-plan"]["data"]["plan.json"])
    return path


def test_helm_has_nothing_against_it() -> None:
    found = helm_python.lint(str(CHART))
    assert not found["errors"]
    assert [one["error"] for one in found["messages"]] == ["icon is recommended"]


@EACH
@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(name: str, version: str) -> None:
    kinds = set()
    for doc in RENDERED[name]:
        kinds.add(doc["kind"])
        if doc["kind"] not in OTHERS:
            kubernetes_validate.validate(doc, version, strict=True)
    assert {"StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"} <= kinds


def test_a_document_with_a_fault_is_not_valid() -> None:
    doc = copy.deepcopy(of_kind(RENDERED["defaults"], "StatefulSet")[f"{RELEASE}-controller"])
    doc["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(doc, VERSIONS[-1], strict=True)


@EACH
def test_names_are_unique(name: str) -> None:
    names = [(doc["kind"], doc["metadata"]["name"]) for doc in RENDERED[name]]
    assert len(names) == len(set(names))


# ---- containers


@EACH
def test_containers_run_as_nobody_in_particular(name: str) -> None:
    for owner, template in templates(RENDERED[name]).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is ("serviceAccountName" in spec), owner
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert "initContainers" not in spec
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


@EACH
def test_containers_have_limits_probes_and_named_ports(name: str) -> None:
    for owner, template in templates(RENDERED[name]).items():
        for container in template["spec"]["containers"]:
            for part in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][part].keys(), owner
            ports = container.get("ports", [])
            assert all(port["name"] for port in ports)
            if owner.endswith("-autoscale"):
                continue  # it ends by itself
            for probe in ("livenessProbe", "readinessProbe"):
                asked = container[probe]
                if "httpGet" in asked:
                    assert asked["httpGet"]["port"] in {port["name"] for port in ports}
                else:
                    assert asked["exec"]["command"][:3] == ["python", "-m", "controlplane.kfadmin.pod.probe"]
    for service in of_kind(RENDERED[name], "Service").values():
        assert all(port["name"] for port in service["spec"].get("ports", ())), service["metadata"]["name"]


@EACH
def test_what_is_written_goes_to_volumes_and_secrets_come_as_files(name: str) -> None:
    for owner, template in templates(RENDERED[name]).items():
        spec = template["spec"]
        claims = {
            claim["metadata"]["name"]
            for claim in of_kind(RENDERED[name], "StatefulSet")
            .get(owner, {"spec": {}})["spec"]
            .get("volumeClaimTemplates", ())
        }
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} == volumes.keys() | claims, owner
            assert "/tmp" in mounts
            given = json.dumps([container.get("args"), container.get("command")])
            assert not re.search(r"(?i)password|secret|bearer|kf-[0-9a-f]{8}", given), owner
            for variable in container.get("env", ()):
                assert (
                    not re.search(r"(?i)password|secret|token|key", variable["name"])
                    or "valueFrom" in variable
                )
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440  # a key that others may read is refused
            assert volume.get("emptyDir") != {}, f"{owner}: {volume['name']} has no bound"


@EACH
def test_nodes_have_the_time_that_leaving_takes(name: str) -> None:
    for owner, template in templates(RENDERED[name]).items():
        if "-node-" not in owner:
            continue
        (container,) = template["spec"]["containers"]
        *_, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert template["spec"]["terminationGracePeriodSeconds"] >= int(seconds) + 20


def test_gateways_have_the_time_that_stopping_takes() -> None:
    documents = render({"settings": {"timing": {"stop_grace_s": 61.5}}})
    spec = templates(documents)[f"{RELEASE}-gateway"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= 5 + 62 + 2 + 2


# ---- what holds the parts together


def chosen(selector: Document, labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", ())
    )


@EACH
def test_budgets_and_services_choose_the_pods_of_one_part(name: str) -> None:
    documents = RENDERED[name]
    pods = {owner: template["metadata"]["labels"] for owner, template in templates(documents).items()}
    sets = of_kind(documents, "StatefulSet")
    for owner, doc in sets.items():
        selector = doc["spec"]["selector"]
        assert [other for other, labels in pods.items() if chosen(selector, labels)] == [owner]
        budget = of_kind(documents, "PodDisruptionBudget")[owner]["spec"]
        assert budget == {"maxUnavailable": 1, "selector": selector}
        service = of_kind(documents, "Service")[doc["spec"]["serviceName"]]
        assert chosen({"matchLabels": service["spec"]["selector"]}, pods[owner])
        assert service["spec"]["clusterIP"] == "None"
    assert of_kind(documents, "PodDisruptionBudget").keys() == sets.keys()


@EACH
def test_nodes_that_hold_copies_of_each_other_are_kept_apart(name: str) -> None:
    stages = VALUES[name].get("settings", {}).get("stages", 2)
    documents = RENDERED[name]
    required = VALUES[name].get("nodes", {}).get("antiAffinity", "required") == "required"
    domains = VALUES[name].get("faultDomains", [{"nodeLabel": "topology.kubernetes.io/zone"}])
    for stage in range(stages):
        spec = templates(documents)[f"{RELEASE}-node-s{stage}"]["spec"]
        apart = spec["affinity"]["podAntiAffinity"]
        key = f"{'required' if required else 'preferred'}DuringSchedulingIgnoredDuringExecution"
        (term,) = apart[key]
        term = term if required else term["podAffinityTerm"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"]["kevlarflow.dev/stage"] == str(stage)
        spread = spec.get("topologySpreadConstraints", [])
        assert [one["topologyKey"] for one in spread] == [one["nodeLabel"] for one in domains]
        for one in spread:
            assert one["labelSelector"]["matchLabels"]["kevlarflow.dev/stage"] == str(stage)


@EACH
def test_nobody_gets_in_but_where_a_policy_says(name: str) -> None:
    documents = RENDERED[name]
    policies = of_kind(documents, "NetworkPolicy")
    own = policies[RELEASE]["spec"]
    assert own["policyTypes"] == ["Ingress", "Egress"]
    for owner, template in templates(documents).items():
        assert chosen(own["podSelector"], template["metadata"]["labels"]), owner
    (within,) = own["ingress"]
    assert within["from"] == [{"podSelector": own["podSelector"]}]
    let_in = {one["port"] for one in within["ports"]}
    assert listening(documents) - let_in == ({"metrics"} if "etcd" in roles(documents) else set())
    for policy in policies.values():
        for rule in policy["spec"].get("ingress", ()):
            assert rule["from"], policy["metadata"]["name"]
            assert rule["ports"]


def listening(documents: list[Document]) -> set[str]:
    """Names of all ports of the release's pods."""
    pods = (template["spec"]["containers"] for template in templates(documents).values())
    return {port["name"] for containers in pods for one in containers for port in one.get("ports", ())}


def roles(documents: list[Document]) -> set[str]:
    return {
        template["metadata"]["labels"]["app.kubernetes.io/component"]
        for template in templates(documents).values()
    }


@EACH
def test_processes_listen_where_their_pods_say(name: str) -> None:
    documents = RENDERED[name]
    settings = json.loads(of_kind(documents, "ConfigMap")[f"{RELEASE}-plan"]["data"]["plan.json"])["settings"]
    said = {"node": {"grpc": "node_ports", "links": "link_ports"}, "controller": {"grpc": "controller_ports"}}
    services = of_kind(documents, "Service")
    for template in templates(documents).values():
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        (container, *_) = template["spec"]["containers"]
        ports = {port["name"]: str(port["containerPort"]) for port in container.get("ports", ())}
        for port, setting in said.get(role, {}).items():
            assert ports[port] == settings[setting]
            offered = {
                one["name"]: str(one["port"]) for one in services[f"{RELEASE}-{role}"]["spec"]["ports"]
            }
            assert offered[port] == settings[setting]


def test_only_who_asks_kubernetes_has_an_account() -> None:
    documents = RENDERED["three-zones"]
    accounts = {owner: one["spec"].get("serviceAccountName") for owner, one in templates(documents).items()}
    assert {owner for owner, account in accounts.items() if account} == {
        *(f"{RELEASE}-node-s{stage}" for stage in range(4)),
        f"{RELEASE}-autoscale",
    }
    rules = [
        rule
        for kind in ("Role", "ClusterRole")
        for doc in of_kind(documents, kind).values()
        for rule in doc["rules"]
    ]
    assert {(rule["resources"][0], *rule["verbs"]) for rule in rules} == {
        ("nodes", "get"),
        ("statefulsets/scale", "get", "patch"),
    }
    assert of_kind(documents, "Role")[f"{RELEASE}-autoscale"]["rules"][0]["resourceNames"] == [
        f"{RELEASE}-node-s{stage}" for stage in range(4)
    ]
    assert not of_kind(RENDERED["one-machine"], "ServiceAccount")


# ---- what processes make of it


@EACH
def test_pods_take_the_plan(name: str, tmp_path: Path) -> None:
    plan = read_plan(plan_of(RENDERED[name], tmp_path))
    env = {
        "KF_POD_NAME": f"{RELEASE}-node-s1-1",
        "KF_POD_UID": "5f0c",
        "KF_POD_IP": "10.1.2.3",
        "KF_NODE_NAME": "worker-7",
    }
    spec = templates(RENDERED[name])[f"{RELEASE}-node-s1"]["spec"]
    env |= {one["name"]: one["value"] for one in spec["containers"][0]["env"] if "value" in one}
    place = PodPlace.of(env)
    config = config_of(plan, place, ProcessRole.NODE, tmp_path, {"zone": "north"})
    assert place.process(ProcessRole.NODE) == f"n{config.stages + 1}"
    assert (config.host, config.advertised, config.tls.enabled) == ("0.0.0.0", "10.1.2.3", True)
    pods = of_kind(RENDERED[name], "StatefulSet")[f"{RELEASE}-node-s1"]["spec"]["replicas"]
    assert pods == config.instances + config.spares
    assert (config.engine.device == "cuda") == (
        "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
    )


def test_certificates_of_cert_manager_have_the_names_that_ours_have() -> None:
    documents = RENDERED["three-zones"]
    made = of_kind(documents, "Certificate")
    counts = {ProcessRole.CONTROLLER: 3, ProcessRole.GATEWAY: 8, ProcessRole.NODE: 32, ProcessRole.ETCD: 3}
    release = Release(RELEASE, NAMESPACE, counts)
    for role in counts:
        spec = made[f"{RELEASE}-{role.value}"]["spec"]
        wanted: set[str] = {"etcd.shop.internal"} if role is ProcessRole.ETCD else set()
        for process in release.processes(role):
            wanted |= {process.dns("shop"), *release.names(process)}
        assert set(spec["dnsNames"]) == wanted, role
        (volume,) = (
            volume
            for owner, one in templates(documents).items()
            if owner.startswith(f"{RELEASE}-{role.value}")
            for volume in one["spec"]["volumes"][:9]
            if volume["name"] == "certs" and owner.endswith((role.value, "-s0"))
        )
        assert volume["secret"]["secretName"] == spec["secretName"]


def test_an_etcd_that_is_there_already_is_used(tmp_path: Path) -> None:
    documents = RENDERED["gpu"]
    assert not [name for name in of_kind(documents, "StatefulSet") if name.endswith("-etcd")]
    plan = read_plan(plan_of(documents, tmp_path))
    assert plan.etcd[0] == "etcd-0.etcd.infra.svc:2379"
    assert not plan.etcd_members
    assert plan.tls.etcd_name == ""


def test_names_of_etcd_members_are_those_of_pods(tmp_path: Path) -> None:
    plan = read_plan(plan_of(RENDERED["defaults"], tmp_path))
    counts = {ProcessRole.ETCD: 3, ProcessRole.CONTROLLER: 3}
    release = Release(RELEASE, NAMESPACE, counts)
    assert plan.tls.etcd_name == "etcd.kevlarflow.internal"
    for name, host in plan.etcd_members.items():
        assert host in release.names(ProcessName(ProcessRole.ETCD, name))
    for number, url in enumerate(plan.admin):
        assert url.split("/")[2].split(":")[0] in release.names(
            ProcessName(ProcessRole.CONTROLLER, f"c{number}")
        )


def test_alerts_are_those_of_the_repository() -> None:
    wanted = yaml.safe_load((ROOT / "docs" / "monitoring" / "alerts.yml").read_text())
    assert of_kind(RENDERED["three-zones"], "PrometheusRule")[RELEASE]["spec"] == wanted


def test_scrapers_have_a_token_and_know_whom_they_ask() -> None:
    documents = RENDERED["three-zones"]
    services = of_kind(documents, "Service").values()
    for monitor in of_kind(documents, "ServiceMonitor").values():
        (endpoint,) = monitor["spec"]["endpoints"]
        found = [s for s in services if chosen(monitor["spec"]["selector"], s["metadata"]["labels"])]
        assert len(found) == 1
        assert endpoint["port"] in {port["name"] for port in found[0]["spec"]["ports"]}
        assert endpoint["authorization"]["credentials"]["name"] == f"{RELEASE}-metrics"
        assert endpoint["scheme"] == "https"


def test_settings_restart_nodes_and_the_number_of_pods_does_not() -> None:
    def of_pods(values: Document) -> Any:
        return templates(render(values))[f"{RELEASE}-node-s0"]

    assert of_pods(merged("defaults", nodes={"instances": 3})) == of_pods({})
    assert of_pods(merged("defaults", settings={"engine": {"max_running": 8}})) != of_pods({})
    scaled = of_kind(render(merged("defaults", nodes={"instances": 3})), "StatefulSet")
    assert scaled[f"{RELEASE}-node-s1"]["spec"]["replicas"] == 3


# ---- people sign in with a provider

OIDC: Document = {
    "issuer": "https://login.example.com/realms/main",
    "clientId": "kevlarflow",
    "redirectUrls": ["https://kf.example.com/oidc/callback", "https://localhost:8100/oidc/callback"],
    "provider": "corp",
    "clientSecret": {"name": "kf-login", "key": "secret"},
    "ca": {"name": "corp-ca", "key": "root.pem"},
    "rolesClaim": "realm_access.roles",
    "roles": {"operator": ['R&D "core" \\ <ops>', "Betrieb \u00fc"], "viewer": ["all"]},
    "sessionSeconds": 900,
}
EGRESS = {"egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}]}]}


def projected(template: Document, folder: Path, documents: list[Document], secrets: Document) -> Path:
    """What the kubelet would put into the volume `oidc`; the folder."""
    (volume,) = (volume for volume in template["spec"]["volumes"] if volume["name"] == "oidc")
    folder.mkdir()
    for source in volume["projected"]["sources"]:
        if "configMap" in source:
            files = of_kind(documents, "ConfigMap")[source["configMap"]["name"]]["data"]
        else:
            (item,) = source["secret"]["items"]
            files = {item["path"]: secrets[source["secret"]["name"]][item["key"]]}
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(volume["projected"]["defaultMode"])
    return folder


def test_controllers_alone_have_the_settings_of_the_login_provider(tmp_path: Path) -> None:
    documents = render({"oidc": OIDC, "networkPolicy": EGRESS})
    for doc in documents:
        kubernetes_validate.validate(doc, VERSIONS[-1], strict=True)
    made = templates(documents)
    having = {
        owner for owner, one in made.items() if any(v["name"] == "oidc" for v in one["spec"]["volumes"])
    }
    assert having == {f"{RELEASE}-controller"}
    controller = made[f"{RELEASE}-controller"]
    (mount,) = (one for one in controller["spec"]["containers"][0]["volumeMounts"] if one["name"] == "oidc")
    assert mount == {"name": "oidc", "mountPath": str(OIDC_FILE.parent), "readOnly": True}
    secrets = {"kf-login": {"secret": "hush"}, "corp-ca": {"root.pem": "PEM"}}
    folder = projected(controller, tmp_path / "oidc", documents, secrets)
    oidc = load_oidc(folder / OIDC_FILE.name, required=True)
    assert oidc is not None
    assert (oidc.client_secret, oidc.ca_file) == ("hush", folder / "ca.crt")
    assert "hush" not in json.dumps(documents)
    config = oidc.config
    assert (config.issuer, config.client_id, config.provider) == (
        "https://login.example.com/realms/main",
        "kevlarflow",
        "corp",
    )
    assert config.redirect_url("localhost:8100") == "https://localhost:8100/oidc/callback"
    assert config.roles == OidcRoles(viewer=("all",), operator=('R&D "core" \\ <ops>', "Betrieb \u00fc"))
    assert (config.roles_claim, config.session_s) == ("realm_access.roles", 900)


def test_a_public_client_needs_no_secret(tmp_path: Path) -> None:
    few = {key: OIDC[key] for key in ("issuer", "clientId", "redirectUrls")}
    documents = render({"oidc": few, "networkPolicy": EGRESS})
    folder = projected(templates(documents)[f"{RELEASE}-controller"], tmp_path / "oidc", documents, {})
    oidc = load_oidc(folder / OIDC_FILE.name, required=True)
    assert oidc is not None
    assert (oidc.client_secret, oidc.ca_file, oidc.config.roles) == ("", None, OidcRoles())


def test_a_change_of_the_login_restarts_controllers_alone() -> None:
    before, after = (
        templates(render({"oidc": {**OIDC, "sessionSeconds": seconds}, "networkPolicy": EGRESS}))
        for seconds in (900, 600)
    )
    assert {owner for owner in before if before[owner] != after[owner]} == {f"{RELEASE}-controller"}


def test_without_a_provider_there_is_nothing_of_it() -> None:
    assert f"{RELEASE}-oidc" not in of_kind(RENDERED["defaults"], "ConfigMap")
    assert "oidc" not in json.dumps(RENDERED["defaults"])


# ---- values that cannot be


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"etcd": {"replicas": 2}}, "replicas"),
        ({"nodes": {"gpus": 17}}, "gpus"),
        ({"nodes": {"drainSecond": 5}}, "drainSecond"),
        ({"settings": {"host": "0.0.0.0"}}, "host"),
        ({"settings": {"stages": 0}}, "stages"),
        ({"settings": {"node_ports": "7100-7200"}}, "node_ports"),  # a pod's process has one
        ({"image": {"digest": "latest"}}, "digest"),
        (
            {
                "controllers": {
                    "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": None}}
                }
            },
            "cpu",
        ),
        ({"networkPolicy": {"apiServer": {"ports": [70000]}}}, "ports"),
        ({"nodes": {"gpus": 1}}, "has to be cuda"),
        ({"settings": {"engine": {"device": "cuda"}}}, "nodes.gpus"),
        ({"certificates": {"mode": "certManager"}}, "issuer"),
        ({"settings": {"model": "/models/m"}}, "model.volume"),
        ({"autoscaling": {"min": 5, "max": 4}}, "autoscaling.min"),
        ({"oidc": {**OIDC, "sessionSeconds": 59}, "networkPolicy": EGRESS}, "sessionSeconds"),
        ({"oidc": {**OIDC, "redirectUrls": ["https://kf.example.com/"]}}, "redirectUrls"),
        ({"oidc": {**OIDC, "scopes": ["profile"]}}, "scopes"),
        ({"oidc": {**OIDC, "roles": {"admin": ["x"]}}}, "admin"),
        ({"oidc": {**OIDC, "clientId": ""}, "networkPolicy": EGRESS}, "oidc.clientId"),
        ({"oidc": {**OIDC, "redirectUrls": []}, "networkPolicy": EGRESS}, "oidc.redirectUrls"),
        ({"oidc": OIDC}, "networkPolicy.egress"),
    ],
)
def test_values_that_cannot_be_are_refused(values: Document, said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(said)):
        render(values)


def test_a_release_without_certificates_says_so() -> None:
    with helm_python.Chart.load(str(CHART)) as chart:
        notes = [
            text
            for name, text in chart.render(
                {"certificates": {"mode": "none"}}, name=RELEASE, namespace=NAMESPACE
            ).items()
            if name.endswith("NOTES.txt")
        ]
    assert notes[0].startswith("WARNING")
    plan = json.loads(
        of_kind(render({"certificates": {"mode": "none"}}), "ConfigMap")[f"{RELEASE}-plan"]["data"][
            "plan.json"
        ]
    )
    assert plan["insecure"] is True
    assert plan["tls"] == {}


def test_examples_are_all_there() -> None:
    assert {"one-machine", "three-zones", "gpu"} == {path.stem for path in EXAMPLES}
    assert example("gpu")["nodes"]["gpus"] == 1
