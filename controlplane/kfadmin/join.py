"""A host's bundle: one file that the operator makes of the fleet file, and a host becomes part of the cluster by.

host.json         what runs there (`fleet.HostPlan`)
secret, api-keys  the cluster's; keys.json as well, where there are keys with limits
certs/            ca.pem, and key and certificate of each process of that host

It opens the cluster to whoever has it, as far as that host's processes may go: mode 0600, and it is of no use once its
host has joined. The operator's folder has, beside the fleet file: certs/ with the authority, secret and api-keys.
"""

from __future__ import annotations

import contextlib
import grp
import io
import os
import pwd
import stat
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from controlplane.contract.address import bound
from controlplane.contract.api_keys import changing, merged, parse_keys
from controlplane.contract.auth import create_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.files import is_blank, opened_folder, replace_file
from controlplane.contract.identity import Identity, ProcessRole
from controlplane.kfadmin.certs import FOLDER
from controlplane.kfadmin.fleet import Fleet, HostPlan, plan
from controlplane.kfadmin.rundir import Endpoints, RunDir, create_api_key, usable
from controlplane.kfadmin.up import demo_model, packaged_model
from controlplane.unreadable import UNREADABLE

PLAN = "host.json"
SECRETS = ("secret", "api-keys")
KEYS = "keys.json"
BUNDLE_BYTES_MAX = 8 << 20


def pack(folder: Path, fleet: Fleet, name: str, target: Path, lifetime: timedelta) -> Path:
    """Write `target`, the bundle of one host; certificates that it lacks, or that are due, are issued.

    `folder`: the operator's. Raises ConfigError, OSError.
    """
    from controlplane.certs.folder import CertFolder  # not before it is needed: it imports cryptography

    host, certs = plan(fleet, name), CertFolder(folder / FOLDER)
    if (cluster := certs.authority().cluster) != host.cluster:
        raise ConfigError(
            f"the authority in {certs.path} is that of {cluster}, and the file's cluster {host.cluster}"
        )
    create_secret(folder / "secret")
    create_api_key(folder / "api-keys")
    files = {PLAN: msgspec.json.format(msgspec.json.encode(host), indent=2) + b"\n"}
    for file in (*SECRETS, *((KEYS,) if (folder / KEYS).exists() else ())):
        files[file] = (folder / file).read_bytes()
    files[f"{FOLDER}/ca.pem"] = certs.ca.read_bytes()
    now, address = datetime.now(UTC), fleet.hosts[name].address
    for process in host.processes():
        # Nobody connects to a relay from another host, and all hosts' have one name.
        hosts = [] if process.role is ProcessRole.RELAY else [address]
        files[f"{FOLDER}/{process}.pem"] = certs.keep(process, hosts, now, lifetime).read_bytes()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file, content in files.items():
            entry = tarfile.TarInfo(file)
            entry.size, entry.mode = len(content), 0o600
            tar.addfile(entry, io.BytesIO(content))
    replace_file(target, packed.getvalue())
    return target


def read_bundle(path: Path) -> tuple[HostPlan, dict[str, bytes]]:
    """What a host is to be, and its files by their path in the run directory. Raises ConfigError."""
    try:
        if path.stat().st_size > BUNDLE_BYTES_MAX:
            raise ConfigError(f"{path} is larger than any bundle of a host")
        with tarfile.open(path, mode="r:") as tar:
            files = {entry.name: _content(tar, entry) for entry in tar}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise ConfigError(f"{path} is no bundle of a host: {error}") from error
    try:
        host = msgspec.json.decode(files.pop(PLAN), type=HostPlan)
    except (KeyError, *UNREADABLE) as error:
        raise ConfigError(
            f"{path} is no bundle of a host ({error}): `kfadmin host pack` makes one"
        ) from error
    wanted = {*SECRETS, f"{FOLDER}/ca.pem", *(f"{FOLDER}/{process}.pem" for process in host.processes())}
    if missing := sorted(wanted - files.keys()):
        raise ConfigError(f"{path} has no {missing[0]}: make it anew with `kfadmin host pack`")
    if odd := sorted(files.keys() - wanted - {KEYS}):
        raise ConfigError(f"{path} has {odd[0]}, which is no part of a bundle")
    return host, files


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    reader = tar.extractfile(entry) if entry.isreg() else None
    if reader is None:
        raise ConfigError(f"{entry.name} in the bundle is no plain file")
    return reader.read(BUNDLE_BYTES_MAX)


def join(run_dir: RunDir, host: HostPlan, files: dict[str, bytes]) -> ClusterConfig:
    """Make `run_dir` that of a host of the cluster, or bring it up to date. What runs takes new certificates up by
    itself, and new settings when it is restarted. Raises ConfigError, OSError."""
    given = host.settings.get("model")
    model = demo_model() if given is None else packaged_model(Path(str(given)))
    config = host.config(run_dir.path, run_dir.path / FOLDER, model)
    if not Path(config.model).exists():
        raise ConfigError(
            f"there is no {config.model} on this host, and the settings say model = {config.model!r}"
        )
    try:
        bound(config.host, 0).close()
    except OSError as error:
        raise ConfigError(
            f"{config.host} is no address of this machine ({error.strerror}): is this the bundle of {host.name}?"
        ) from error
    before = None if is_blank(run_dir.path / PLAN) else read_plan(run_dir)
    if before is not None and (before.cluster, before.name) != (host.cluster, host.name):
        raise ConfigError(
            f"{run_dir.path} is that of {before.name} in {before.cluster}: give another --run-dir, or remove it"
        )
    # What has settings, and neither a plan nor the lock of `kfadmin up`, is a host whose joining was cut short.
    if before is None and run_dir.config_file.exists() and (run_dir.path / "lock").exists():
        raise ConfigError(f"{run_dir.path} is that of another cluster (`kfadmin up`): give another --run-dir")
    with usable(run_dir.path):
        run_dir.claim()
        _place(run_dir.path, files)
        run_dir.prepare()
        run_dir.write(PLAN, host)
        run_dir.write("cluster.json", config)
        run_dir.write("endpoints.json", Endpoints(host.gateways, host.admin, ca=config.tls.ca))
        owner = run_dir.path.stat()
        for path in run_dir.path.iterdir():
            _own(path, owner)
    for process in host.processes():
        # Raises ConfigError where key and certificate do not fit.
        Identity(config.tls, config.cluster, process)
    return config


def _place(target: Path, files: dict[str, bytes]) -> None:
    """Write them, each at once, with the owner of the directory. Keys first: they may be refused."""
    owner = target.stat()
    for folder in {target, *((target / name).parent for name in files)}:
        folder.mkdir(mode=0o700, exist_ok=True)
        _own(folder, owner)
    if KEYS in files:
        _merge_keys(target / KEYS, files[KEYS], owner)
    for name, content in files.items():
        if name != KEYS:
            replace_file(target / name, content, owner=owner)


def _merge_keys(path: Path, content: bytes, owner: os.stat_result) -> None:
    """The bundle's keys beside those of this host, where keys are made and revoked as well."""
    theirs = parse_keys(content, f"{KEYS} of the bundle").keys
    if path.exists() and is_blank(path):
        replace_file(path, content, owner=owner)
    with changing(path) as keys:
        keys[:] = merged(keys, theirs)


def _own(path: Path, owner: os.stat_result) -> None:
    if os.geteuid() == 0:
        with opened_folder(path.parent) as folder:
            _give(path.name, folder, owner.st_uid, owner.st_gid)


def _give(name: str, folder: int, uid: int, gid: int) -> None:
    """One file or folder to this user, who may have put it there: a link is given, not what it points to, and a file
    that has another name somewhere is not."""
    with contextlib.suppress(FileNotFoundError):  # what runs here makes files and removes them
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1:
            os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)


def give(run_dir: RunDir, user: str) -> None:
    """Everything in the run directory to this user. Raises ConfigError, OSError."""
    try:
        uid, gid = pwd.getpwnam(user).pw_uid, grp.getgrnam(user).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"no such user or group: {user!r}: `useradd --system --user-group {user}` makes one"
        ) from error
    os.chown(run_dir.path, uid, gid)
    # The kernel's names of open folders: none can become a link between two of these calls.
    for _, folders, files, folder in os.fwalk(run_dir.path.resolve()):
        for name in (*folders, *files):
            _give(name, folder, uid, gid)


def read_plan(run_dir: RunDir) -> HostPlan:
    """Raises ConfigError if no host joined in this directory."""
    path = run_dir.path / PLAN
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostPlan)
    except (OSError, *UNREADABLE) as error:
        raise ConfigError(
            f"{path}: {error}; `kfadmin host join BUNDLE` makes this a host of a cluster"
        ) from error


def parts_of(host: HostPlan) -> tuple[str, ...]:
    """Parts of the host, in the order that they are started in."""
    has = {
        "etcd": host.etcd,
        "controller": host.controller,
        "nodes": bool(host.nodes),
        "gateway": host.gateway,
    }
    return tuple(part for part, there in has.items() if there)
