"""From a fleet file to a host: what the file may say, bundles, joining, and units that systemd takes."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from controlplane.certs.folder import CertFolder
from controlplane.contract.api_keys import read_keys
from controlplane.contract.config import ClusterConfig, load_config
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Files, ProcessName, ProcessRole
from controlplane.contract.version import settings_digest
from controlplane.kfadmin.fleet import plan, read_fleet, warnings
from controlplane.kfadmin.join import BUNDLE_BYTES_MAX, PLAN, join, pack, read_bundle, read_plan
from controlplane.kfadmin.main import app
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.units import TARGET, quote, render, verify

FLEET = """
[settings]
cluster = "shop"
instances = 2
stages = 1
engine = { threads = 2 }

[hosts.a]
address = "127.0.0.1"
labels = { zone = "north", rack = "r1" }
etcd = true
controller = true
gateway = true
nodes = ["n0"]

[hosts.b]
address = "127.0.0.2"
labels = { zone = "north", rack = "r2" }
nodes = ["n1"]
"""
MONTH = timedelta(days=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An operator's, with a fleet file and an authority."""
    (tmp_path / "fleet.toml").write_text(FLEET)
    done = CliRunner().invoke(app, ["certs", "init", "--cluster", "shop", "--dir", str(tmp_path / "certs")])
    assert done.exit_code == 0, done.output
    return tmp_path


def packed(folder: Path, name: str) -> Path:
    return pack(folder, read_fleet(folder / "fleet.toml"), name, folder / f"{name}.bundle", MONTH)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('nodes = ["n1"]', "", "no host has n1"),
        ('nodes = ["n1"]', 'nodes = ["n1", "n0"]', "n0 runs on 2 hosts"),
        ('nodes = ["n1"]', 'nodes = ["n1", "n7"]', "n7 is no node of this cluster"),
        ("etcd = true", "", "no host has `etcd = true`"),
        ("instances = 2", "instances = 0", "instances = 0"),
        ("instances = 2", 'host = "0.0.0.0"', "settings.host is a host's own"),
        ("stages = 1", "stagse = 1", "stagse"),
        ('{ zone = "north", rack = "r2" }', '{ rack = "r2", zone = "north" }', "all hosts have the same"),
        ('{ zone = "north", rack = "r2" }', '{ zone = "north", rack = "r 2" }', "'r 2'"),
        ("[hosts.b]", '[hosts."b.c"]', "no dots"),
        ('address = "127.0.0.2"', 'adress = "127.0.0.2"', "adress"),
        ('address = "127.0.0.2"', 'address = "no such host"', "a host name or an IP address"),
        ("stages = 1", "stages = 1\ngateway_port = 0", "cannot be 0"),
        ("[settings]", "[settings", "fleet.toml"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FLEET
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_fleet(path)


def test_what_does_not_survive_its_host_is_said(folder: Path) -> None:
    found = "\n".join(warnings(read_fleet(folder / "fleet.toml")))
    assert "etcd has one member" in found
    assert "one controller" in found
    assert "every node of stage" not in found
    (folder / "fleet.toml").write_text(
        FLEET.replace("instances = 2", "instances = 1").replace("stages = 1", "stages = 2")
    )
    found = "\n".join(warnings(read_fleet(folder / "fleet.toml")))
    assert "every node of stage 1 is in rack r2" in found
    assert "zone" not in found  # there is only one


def test_hosts_differ_in_where_they_are_and_in_nothing_else(folder: Path) -> None:
    fleet = read_fleet(folder / "fleet.toml")
    one, other = (plan(fleet, name).config(Path("/r", name), Path("/c"), Path("/m")) for name in ("a", "b"))
    assert (one.host, other.host, one.etcd, other.etcd) == (
        "127.0.0.1",
        "127.0.0.2",
        *[("127.0.0.1:2379",)] * 2,
    )
    assert settings_digest(one) == settings_digest(other)
    assert list(other.fault_domain("uname", "n1").items()) == [
        ("zone", "north"), ("rack", "r2"), ("host", "b"), ("node", "n1"),
    ]  # fmt: skip
    plain = ClusterConfig(run_dir="-", model="-", etcd=())
    assert plain.fault_domain("uname", "n1") == {"host": "uname", "node": "n1"}
    assert one.engine.threads == 2


def test_a_bundle_has_what_its_host_may_know(folder: Path, tmp_path: Path) -> None:
    bundle = packed(folder, "b")
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    host, files = read_bundle(bundle)
    assert sorted(files) == [
        "api-keys", "certs/admin-b.pem", "certs/ca.pem", "certs/node-n1.pem", "certs/relay-host.pem", "secret",
    ]  # fmt: skip
    run_dir = RunDir(tmp_path / "b")
    config = join(run_dir, host, files)
    assert load_config(run_dir.config_file) == config
    assert stat.S_IMODE((run_dir.path / "secret").stat().st_mode) == 0o600
    assert run_dir.endpoints().admin == ("https://127.0.0.1:8100",)
    Files(config.tls, ProcessName(ProcessRole.NODE, "n1"))  # they fit together
    with pytest.raises(ConfigError, match="node-n0"):
        Files(config.tls, ProcessName(ProcessRole.NODE, "n0"))


def test_packing_again_issues_what_is_due_and_leaves_the_rest(folder: Path) -> None:
    packed(folder, "a")
    certs = CertFolder(folder / "certs")
    before = (certs.path / "node-n0.pem").read_bytes(), (folder / "secret").read_bytes()
    packed(folder, "a")
    assert ((certs.path / "node-n0.pem").read_bytes(), (folder / "secret").read_bytes()) == before
    moved = FLEET.replace("127.0.0.1", "127.0.0.9")
    (folder / "fleet.toml").write_text(moved)
    packed(folder, "a")
    assert "127.0.0.9" in next(leaf for leaf in certs.leaves() if leaf.process == "etcd-a").hosts


@pytest.mark.parametrize("address", ["a.shop.example", "A.Shop.example", "FD00:0::2", "[fd00::2]"])
def test_packing_again_leaves_certificates_of_any_address_as_they_are(folder: Path, address: str) -> None:
    (folder / "fleet.toml").write_text(FLEET.replace("127.0.0.1", address))
    packed(folder, "a")
    before = {path.name: path.read_bytes() for path in (folder / "certs").glob("*-*.pem")}
    assert len(before) == 6  # etcd, controller, gateway, node, relay, admin
    packed(folder, "a")
    assert {path.name: path.read_bytes() for path in (folder / "certs").glob("*-*.pem")} == before
    (folder / "fleet.toml").write_text(FLEET.replace("127.0.0.1", "b.shop.example"))
    packed(folder, "a")
    assert all(
        leaf.covers(["b.shop.example"])
        for leaf in CertFolder(folder / "certs").leaves()
        if leaf.process[:5] != "relay"
    )


def test_joining_again_renews_and_another_hosts_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    join(run_dir, *read_bundle(packed(folder, "a")))
    old = (run_dir.path / "certs/node-n0.pem").read_bytes()
    assert CliRunner().invoke(app, ["certs", "rotate", "--dir", str(folder / "certs")]).exit_code == 0
    join(run_dir, *read_bundle(packed(folder, "a")))
    assert (run_dir.path / "certs/node-n0.pem").read_bytes() != old
    with pytest.raises(ConfigError, match="is that of a in shop"):
        join(run_dir, *read_bundle(packed(folder, "b")))


def kfadmin_keys(*words: str) -> None:
    done = CliRunner().invoke(app, ["keys", *words])
    assert done.exit_code == 0, done.output


def test_a_newer_bundle_brings_no_revoked_key_back_and_takes_none_away(folder: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    fleets, hosts = str(folder / "keys.json"), str(run_dir.path / "keys.json")
    for name in ("alice", "bob", "carol"):
        kfadmin_keys("create", name, "--file", fleets)
    join(run_dir, *read_bundle(packed(folder, "a")))
    kfadmin_keys("revoke", "alice", "--file", hosts)
    kfadmin_keys("create", "dave", "--file", hosts)
    kfadmin_keys("revoke", "bob", "--file", fleets)
    kfadmin_keys("create", "erin", "--file", fleets)
    join(run_dir, *read_bundle(packed(folder, "a")))
    states = {key.name: key.state(0) for key in read_keys(run_dir.path / "keys.json").keys}
    assert states == dict(alice="revoked", bob="revoked", carol="active", dave="active", erin="active")
    assert stat.S_IMODE((run_dir.path / "keys.json").stat().st_mode) == 0o600


def test_keys_of_one_name_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    join(run_dir, *read_bundle(packed(folder, "a")))
    kfadmin_keys("create", "alice", "--file", str(run_dir.path / "keys.json"))
    kfadmin_keys("create", "alice", "--file", str(folder / "keys.json"))
    (folder / "secret").write_text("another" * 8)
    before = {path: path.read_bytes() for path in run_dir.path.rglob("*") if path.is_file()}
    bundle = packed(folder, "a")
    with pytest.raises(ConfigError, match="two API keys alice"):
        join(run_dir, *read_bundle(bundle))
    assert {path: path.read_bytes() for path in run_dir.path.rglob("*") if path.is_file()} == before
    kfadmin_keys("revoke", "alice", "--file", str(run_dir.path / "keys.json"))
    join(run_dir, *read_bundle(bundle))
    assert sorted(key.state(0) for key in read_keys(run_dir.path / "keys.json").keys) == ["active", "revoked"]


@pytest.mark.parametrize("left", [b"", bytes(40)])
def test_keys_that_a_power_failure_has_emptied_are_the_bundles(
    folder: Path, tmp_path: Path, left: bytes
) -> None:
    run_dir = RunDir(tmp_path / "run")
    kfadmin_keys("create", "alice", "--file", str(folder / "keys.json"))
    join(run_dir, *read_bundle(packed(folder, "a")))
    (run_dir.path / "keys.json").write_bytes(left)
    join(run_dir, *read_bundle(packed(folder, "a")))
    assert [key.name for key in read_keys(run_dir.path / "keys.json").keys] == ["alice"]


def test_joining_heals_what_was_cut_short(folder: Path, tmp_path: Path) -> None:
    run_dir, bundle = RunDir(tmp_path / "run"), packed(folder, "a")
    join(run_dir, *read_bundle(bundle))
    # Of a full disk, of a power failure, and before the plan was written.
    for left in (b"", bytes(100), None):
        if left is None:
            (run_dir.path / PLAN).unlink()
        else:
            (run_dir.path / PLAN).write_bytes(left)
        join(run_dir, *read_bundle(bundle))
        assert read_plan(run_dir).name == "a"


def test_neither_another_cluster_nor_a_stranger_loses_its_directory(folder: Path, tmp_path: Path) -> None:
    bundle, up = packed(folder, "a"), RunDir(tmp_path / "up")
    with up.owned():
        up.prepare()
        up.write("cluster.json", ClusterConfig(str(up.path), "model", ("127.0.0.1:1",)))
    with pytest.raises(ConfigError, match="is that of another cluster"):
        join(up, *read_bundle(bundle))
    strange = tmp_path / "strange"
    (strange / "etcd" / "member").mkdir(parents=True)
    strange.chmod(0o755)
    done = CliRunner().invoke(app, ["host", "join", str(bundle), "--run-dir", str(strange)])
    assert done.exit_code == 2
    assert "is no run directory" in " ".join(done.output.split())
    assert [path.name for path in strange.iterdir()] == ["etcd"]
    assert strange.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('address = "127.0.0.1"', 'address = "192.0.2.1"', "no address of this machine"),
        ("stages = 1", 'stages = 1\nmodel = "/nowhere/model"', "there is no /nowhere/model"),
    ],
)
def test_a_host_that_cannot_be_is_told_why(folder: Path, old: str, new: str, said: str) -> None:
    (folder / "fleet.toml").write_text(FLEET.replace(old, new, 1))
    bundle = packed(folder, "a")
    done = CliRunner().invoke(app, ["host", "join", str(bundle), "--run-dir", str(folder / "run")])
    assert done.exit_code == 1
    assert said in done.output
    assert not (folder / "run").exists()


def test_a_bundle_that_is_none_changes_nothing(folder: Path) -> None:
    bundle = packed(folder, "a")
    with pytest.raises(ConfigError, match="no bundle"):
        read_bundle(folder / "fleet.toml")
    with tarfile.open(bundle, "a:") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd"), io.BytesIO())
    with pytest.raises(ConfigError, match="no part of a bundle"):
        read_bundle(bundle)
    large = folder / "large"
    with large.open("wb") as file:
        file.truncate(BUNDLE_BYTES_MAX + 1)
    with pytest.raises(ConfigError, match="larger"):
        read_bundle(large)
    with pytest.raises(ConfigError, match="cannot read"):
        read_bundle(folder / "missing")


def test_packing_without_an_authority_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET)
    done = CliRunner().invoke(app, ["host", "pack", str(tmp_path / "fleet.toml")])
    assert done.exit_code == 1
    assert "kfadmin certs init" in done.output


def test_systemd_takes_the_units(folder: Path, tmp_path: Path) -> None:
    units, run_dir = tmp_path / "units", tmp_path / "run dir"
    units.mkdir()
    bundle = packed(folder, "a")
    command = ["host", "join", str(bundle), "--install", "--run-dir", str(run_dir), "--units", str(units)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in units.iterdir())
    parts = ("controller", "etcd", "gateway", "nodes")
    assert names == [*(f"kevlarflow-{part}.service" for part in parts), TARGET]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: what systemd says of the units was not asked")
    assert verify(sorted(units.iterdir())) == ""
    unit = units / "kevlarflow-nodes.service"
    unit.write_text(unit.read_text().replace("Type=exec", "Type=exce").replace("ExecStart=", "ExecStart=no"))
    assert "kevlarflow-nodes" in verify([unit])


def test_words_of_a_unit_mean_what_they_are() -> None:
    assert quote("plain-word") == "plain-word"
    assert quote("a b") == '"a b"'
    assert quote('50%"$x') == '"50%%\\"$$x"'
    assert quote("$x", expands=False) == "$x"
    with pytest.raises(ConfigError, match="cannot stand"):
        quote("two\nlines")
    (text,) = (
        t for n, t in render(("nodes",), Path("/r"), ["/bin/x"], "kf", {"A": "1 2"}).items() if n != TARGET
    )
    assert 'Environment="A=1 2"' in text
    assert "User=kf" in text


def test_parts_run_in_the_foreground(folder: Path, tmp_path: Path) -> None:
    """As units do: the process becomes the part, with the host's settings."""
    run_dir = tmp_path / "run"
    join(RunDir(run_dir), *read_bundle(packed(folder, "a")))
    fake = tmp_path / "etcd"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "etcd Version: 3.5.21" || printf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    command = [sys.executable, "-m", "controlplane.kfadmin.main", "host", "run"]
    env = {**os.environ, "KF_ETCD_BIN": str(fake), "KF_RUN_DIR": str(run_dir)}
    done = subprocess.run(
        [*command, "etcd"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout.split()
    assert "--listen-client-urls=https://127.0.0.1:2379" in said, done
    assert "--initial-cluster=a=https://127.0.0.1:2380" in said
    assert "--client-cert-auth" in said
    done = CliRunner().invoke(app, ["host", "run", "router", "--run-dir", str(run_dir)])
    assert done.exit_code == 2
    assert "it has etcd, controller, nodes, gateway" in done.output


def test_a_plan_is_read_as_it_was_written(folder: Path) -> None:
    host = plan(read_fleet(folder / "fleet.toml"), "a")
    assert msgspec.json.decode(msgspec.json.encode(host), type=type(host)) == host
