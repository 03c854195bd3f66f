"""The cluster's own authority: what it issues, renewal, and the change from one authority to the next."""

from __future__ import annotations

import json
import ssl
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controlplane.certs.authority import Authority, alternatives, issued_by, load_chain
from controlplane.certs.folder import CertFolder
from controlplane.contract.config import ClusterConfig, TlsConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import Files, Identity, ProcessName, ProcessRole
from controlplane.kfadmin.local import LocalCluster
from controlplane.kfadmin.main import app
from dataplane.transport.sealing import LinkIdentity
from tests.certificates import CLUSTER, folder, settings

NODE, GATEWAY = (ProcessRole.NODE, "n0"), (ProcessRole.GATEWAY, "g1")
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def handshake(server: tuple[Path, Path], client: tuple[Path, Path], name: str) -> None:
    """Mutual TLS in memory; each is (certificate file, authorities). Raises ssl.SSLError."""
    contexts = []
    for protocol, (cert, ca) in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        context = ssl.SSLContext(protocol)
        context.load_verify_locations(ca)
        context.load_cert_chain(cert)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[0].wrap_bio(there, back, server_side=True),
        contexts[1].wrap_bio(back, there, server_hostname=name),
    ]
    left = {0, 1}
    for _ in range(10):
        for index in sorted(left, reverse=True):
            try:
                ends[index].do_handshake()
                left.discard(index)
            except ssl.SSLWantReadError:
                pass
    assert not left


def test_certificates_name_roles_and_serve_both_ways(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE, GATEWAY, hosts=("127.0.0.1", "node.example.org"))
    path = made.path / "node-n0.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((made.path / "authority.pem").stat().st_mode) == 0o600
    names = alternatives(load_chain(path.read_bytes())[0])
    assert names == (["n0.node.test.internal", "node.example.org"], ["127.0.0.1"])
    gateway = made.path / "gateway-g1.pem"
    handshake((path, made.ca), (gateway, made.ca), "n0.node.test.internal")
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake((path, made.ca), (gateway, made.ca), "n1.node.test.internal")
    stranger = folder(tmp_path / "other", GATEWAY)
    with pytest.raises(ssl.SSLError, match="verify failed"):
        handshake((path, made.ca), (stranger.path / "gateway-g1.pem", made.ca), "n0.node.test.internal")


def test_an_authority_is_replaced_while_some_trust_only_the_old_one(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE, GATEWAY)
    node, gateway = made.path / "node-n0.pem", made.path / "gateway-g1.pem"
    late_ca, late_gateway = tmp_path / "late-ca.pem", tmp_path / "late-gateway.pem"
    late_ca.write_bytes(made.ca.read_bytes())
    late_gateway.write_bytes(gateway.read_bytes())
    now = datetime.now(UTC)
    assert made.change_authority(now) == ["gateway-g1", "node-n0"]
    assert len(made.trusted()) == 2
    name = "n0.node.test.internal"
    handshake((node, made.ca), (gateway, made.ca), name)
    handshake((node, made.ca), (late_gateway, late_ca), name)  # who has not heard of it, either way
    handshake((node, late_ca), (gateway, made.ca), name)
    with pytest.raises(ConfigError, match="finish"):
        made.change_authority(now)
    assert made.finish(now) == []
    assert len(made.trusted()) == 1
    handshake((node, made.ca), (gateway, made.ca), name)
    with pytest.raises(ssl.SSLError, match="verify failed"):
        handshake((node, made.ca), (late_gateway, made.ca), name)
    made.change_authority(now)  # and again


def test_finish_renews_what_the_old_authority_issued(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE, GATEWAY)
    old = (made.path / "node-n0.pem").read_bytes()
    made.change_authority(datetime.now(UTC))
    (made.path / "node-n0.pem").write_bytes(old)  # as if it had been interrupted
    assert made.finish(datetime.now(UTC)) == ["node-n0"]
    certificate = load_chain((made.path / "node-n0.pem").read_bytes())[0]
    assert issued_by(certificate, made.authority().certificate)


def test_certificates_are_renewed_in_time_and_keep_what_they_say(tmp_path: Path) -> None:
    made = CertFolder(tmp_path)
    made.create(CLUSTER, NOW)
    made.issue([ProcessName(*NODE)], ["10.0.0.1"], NOW, timedelta(days=4))
    before = made.leaves()[0]
    assert made.renew(NOW + timedelta(days=1, hours=23), only_due=True) == []
    later = NOW + timedelta(days=2, hours=1)
    assert made.renew(later, only_due=True) == ["node-n0"]
    after = made.leaves()[0]
    assert (after.names, after.hosts) == (before.names, before.hosts)
    assert after.ends == later + timedelta(days=4)
    assert after.lifetime == before.lifetime


def test_an_authority_outlives_what_it_issues() -> None:
    authority = Authority.create(CLUSTER, NOW, days=10)
    pem = authority.issue(["a.node.test.internal"], [], NOW, timedelta(days=100))
    assert load_chain(pem)[0].not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_what_cannot_be_an_authority_is_refused(tmp_path: Path) -> None:
    made = CertFolder(tmp_path)
    with pytest.raises(ConfigError, match="certs init"):
        made.authority()
    made.create(CLUSTER, NOW)
    with pytest.raises(ConfigError, match="there already"):
        made.create(CLUSTER, NOW)
    with pytest.raises(ConfigError, match="cannot be certified"):
        made.issue([ProcessName(ProcessRole.NODE, "../n0")], [], NOW)
    (tmp_path / "authority.pem").write_text("junk")
    with pytest.raises(ConfigError, match="not an authority"):
        made.authority()


def test_files_are_read_again_when_they_change_and_fit_together(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE)
    files = Files(settings(made), ProcessName(*NODE))
    first = files.current()
    made.renew(datetime.now(UTC))
    second = files.current()
    assert second.cert != first.cert
    whole = (made.path / "node-n0.pem").read_bytes()
    (made.path / "node-n0.pem").write_text("half of it")
    assert files.current() is second
    (made.path / "node-n0.pem").write_bytes(whole)
    assert files.current().cert == second.cert


def test_what_is_late_is_told_in_the_same_words(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE)  # for a day
    files = Files(settings(made), ProcessName(*NODE))
    now = time.time()
    assert files.troubles(now) == files.troubles(now + 12 * 3600) == ()
    (late,) = files.troubles(now + 20 * 3600)
    assert late == files.troubles(now + 30 * 3600)[0]
    assert "node-n0.pem" in late
    assert "kfadmin certs rotate" in late
    whole = (made.path / "node-n0.pem").read_bytes()
    (made.path / "node-n0.pem").write_text("half")
    (broken,) = files.troubles(now)
    assert broken.startswith("new certificates are not used: ")
    (made.path / "node-n0.pem").write_bytes(whole)
    assert files.troubles(now) == ()


def test_a_cluster_on_this_machine_renews_its_certificates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = ClusterConfig(str(tmp_path / "run"), str(tmp_path), (), cluster=CLUSTER)
    said: list[str] = []
    up = LocalCluster(config, progress=said.append, secure=True)
    made = CertFolder(tmp_path / "run" / "certs")
    now = datetime.now(UTC)
    made.create(CLUSTER, now)
    made.issue([ProcessName(*NODE)], (), now - timedelta(days=4))
    made.issue([ProcessName(*GATEWAY)], (), now)
    up.renew_certificates()
    assert said == ["renewed the certificates of node-n0"]
    assert not any(leaf.due(now) for leaf in made.leaves())
    (made.path / "authority.pem").write_text("junk")
    up.renew_certificates()
    assert "WARNING: certificates cannot be renewed" in said[-1]


def test_a_key_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE)
    key, marker, cert = (made.path / "node-n0.pem").read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
    (tmp_path / "tls.crt").write_bytes(marker + cert)
    (tmp_path / "tls.key").touch(mode=0o600)
    (tmp_path / "tls.key").write_bytes(key)
    tls = TlsConfig(ca=str(made.ca), cert=str(tmp_path / "tls.crt"), key=str(tmp_path / "tls.key"))
    identity = Identity(tls, CLUSTER, ProcessName(*NODE))
    assert identity.files.current().key == key
    assert LinkIdentity(identity).chain()


def test_wrong_files_are_told_apart(tmp_path: Path) -> None:
    made = folder(tmp_path / "certs", NODE)
    me = ProcessName(*NODE)
    good = settings(made)
    with pytest.raises(ConfigError, match=r"tls\.ca: cannot read authorities from .*none.pem: No such file"):
        Files(TlsConfig(ca=str(tmp_path / "none.pem"), cert=good.cert), me)
    with pytest.raises(ConfigError, match=r"gateway-g9\.pem"):
        Files(good, ProcessName(ProcessRole.GATEWAY, "g9"))
    other = folder(tmp_path / "other", NODE)
    with pytest.raises(ConfigError, match="key values mismatch"):
        Files(TlsConfig(ca=good.ca, cert=good.cert, key=str(other.path / "node-n0.pem")), me)
    (made.path / "node-n0.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Files(good, me)


def test_settings_name_all_files_or_none() -> None:
    for tls in (TlsConfig(ca="ca.pem"), TlsConfig(cert="c.pem"), TlsConfig(key="k.pem")):
        with pytest.raises(ConfigError, match="go together"):
            ClusterConfig(run_dir="r", model="m", etcd=(), tls=tls)
    config = ClusterConfig(run_dir="r", model="m", etcd=())
    assert not Identity.of(config, ProcessRole.NODE, "n0").secure


def test_kfadmin_certs(tmp_path: Path) -> None:
    at = ["--dir", str(tmp_path)]
    run = CliRunner().invoke
    assert run(app, ["certs", "init", *at, "--cluster", CLUSTER]).exit_code == 0
    assert run(app, ["certs", "init", *at]).exit_code != 0
    issued = run(app, ["certs", "issue", "node", "n0", "n1", "--host", "10.0.0.1", "--for", "2d", *at])
    assert issued.exit_code == 0, issued.output
    before = (tmp_path / "node-n1.pem").read_bytes()
    assert run(app, ["certs", "rotate", *at]).exit_code == 0
    assert (tmp_path / "node-n1.pem").read_bytes() != before
    assert run(app, ["certs", "rotate", "--authority", *at]).exit_code == 0
    status = json.loads(run(app, ["certs", "status", "-o", "json", *at]).stdout)
    assert len(status["trusted"]) == 2
    assert [leaf["process"] for leaf in status["certificates"]] == ["node-n0", "node-n1"]
    assert not any(leaf["due"] for leaf in status["certificates"])
    assert run(app, ["certs", "rotate", "--finish", *at]).exit_code == 0
    table = run(app, ["certs", "status", *at])
    assert table.exit_code == 0
    assert "node-n0" in table.stdout
    assert run(app, ["certs", "rotate", "--finish", "--authority", *at]).exit_code == 2
