"""A folder of certificates: an authority, whom to trust, and one file for each process.

ca.pem            authorities that are trusted, the one that signs first
authority.pem     the one that signs, with its key (0600): keep it where certificates are made, nowhere else
ROLE-NAME.pem     key and certificate of a process in one file (0600), so that both change at once

A new authority is signed by the old one as well, and certificates carry that signature with them: they are accepted by
those who trust either of the two. So processes and hosts take up the new files in any order, and etcd, which reads
ca.pem only when it starts, goes on as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from controlplane.certs.authority import (
    SKEW,
    Authority,
    alternatives,
    as_certified,
    bundle,
    issued_by,
    load_chain,
)
from controlplane.contract.errors import ConfigError
from controlplane.contract.files import make_folder, replace_file
from controlplane.contract.identity import ProcessName, ProcessRole, etcd_name

LIFETIME_DAYS = 7
RENEW_SHARE = 0.5  # of a certificate's life after which a new one is made
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One certificate of a process."""

    process: str  # role and name
    names: list[str]  # DNS names: of the process, and of hosts that have one
    hosts: list[str]  # IP addresses
    begins: datetime
    ends: datetime
    authority: str  # who signed it, in words

    @property
    def lifetime(self) -> timedelta:
        return self.ends - self.begins - SKEW

    def due(self, now: datetime) -> bool:
        """Whether it is time for a new one."""
        return now >= self.ends - self.lifetime * (1 - RENEW_SHARE)

    def covers(self, hosts: Iterable[str]) -> bool:
        """Whether it names all of these addresses and DNS names."""
        return {as_certified(host) for host in hosts} <= {name.lower() for name in (*self.names, *self.hosts)}


class CertFolder:
    """Raises ConfigError for what is missing or is not what it should be, OSError for what the disk says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    @property
    def _authority_file(self) -> Path:
        return self.path / "authority.pem"

    @property
    def exists(self) -> bool:
        return self._authority_file.exists()

    def create(self, cluster: str, now: datetime) -> None:
        """A new authority; never in place of another one."""
        if self.exists:
            raise ConfigError(
                f"{self._authority_file} is there already: `kfadmin certs rotate --authority` replaces it"
            )
        make_folder(self.path)
        authority = Authority.create(cluster, now)
        replace_file(self.ca, bundle([authority.certificate]), 0o644)
        replace_file(self._authority_file, authority.pem())  # last: from now on the folder counts

    def authority(self) -> Authority:
        try:
            return Authority.load(self._authority_file.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no authority in {self.path}: `kfadmin certs init` makes one"
            ) from error

    def trusted(self) -> list[x509.Certificate]:
        try:
            return load_chain(self.ca.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(f"there is no {self.ca}: `kfadmin certs init` makes it") from error

    # ---- certificates of processes

    def issue(
        self,
        processes: Sequence[ProcessName],
        hosts: Sequence[str],
        now: datetime,
        lifetime: timedelta = timedelta(days=LIFETIME_DAYS),
    ) -> list[Path]:
        """A new key and certificate for each, in place of those before; the files."""
        for process in processes:
            if not NAME.fullmatch(process.name):
                raise ConfigError(
                    f"{process.name!r} cannot be certified: up to 63 letters, digits, '-' and '_',"
                    " a letter or digit first and last"
                )
        authority, chain = self.authority(), self._chain(now)
        cluster = authority.cluster
        written = []
        for process in processes:
            names = [process.dns(cluster)]
            if process.role is ProcessRole.ETCD:
                names.append(etcd_name(cluster))
            pem = authority.issue(names, hosts, now, lifetime, chain)
            written.append(self.path / f"{process}.pem")
            replace_file(written[-1], pem)
        return written

    def keep(self, process: ProcessName, hosts: Sequence[str], now: datetime, lifetime: timedelta) -> Path:
        """The file of a process; issued if there is none, if it is due, or if it does not name all of `hosts`."""
        path = self.path / f"{process}.pem"
        leaf = _leaf(path) if path.exists() else None
        if leaf is None or leaf.due(now) or not leaf.covers(hosts):
            self.issue([process], hosts, now, lifetime)
        return path

    def leaves(self) -> list[Leaf]:
        """Every certificate of a process in the folder, by name of its file."""
        return [_leaf(path) for path in sorted(self.path.glob("*-*.pem"))]

    def renew(self, now: datetime, *, only_due: bool = False) -> list[str]:
        """New certificates for the same names, hosts and times as before; whose. `only_due`: those whose time it is."""
        authority, chain = self.authority(), self._chain(now)
        renewed = []
        for leaf in self.leaves():
            if only_due and not leaf.due(now):
                continue
            pem = authority.issue(leaf.names, leaf.hosts, now, leaf.lifetime, chain)
            replace_file(self.path / f"{leaf.process}.pem", pem)
            renewed.append(leaf.process)
        return renewed

    # ---- from one authority to the next

    def change_authority(self, now: datetime) -> list[str]:
        """A new authority signs from now on, and everybody gets a certificate of it; whose. Both are trusted until
        `finish`. What was interrupted goes on with `renew`."""
        old = self.authority()
        if len(self.trusted()) > 1:
            raise ConfigError("two authorities are trusted already: `kfadmin certs rotate --finish` first")
        new = Authority.create(old.cluster, now)
        replace_file(self._cross_file, bundle([new.cross_signed_by(old, now)]), 0o644)
        replace_file(self.ca, bundle([new.certificate, old.certificate]), 0o644)
        replace_file(self._authority_file, new.pem())
        return self.renew(now)

    def finish(self, now: datetime) -> list[str]:
        """Trust only the authority that signs. Certificates of the one before get new ones first; whose."""
        authority = self.authority()
        left = [
            path.stem
            for path in sorted(self.path.glob("*-*.pem"))
            if not issued_by(load_chain(path.read_bytes())[0], authority.certificate)
        ]
        if left:
            self.renew(now)
        replace_file(self.ca, bundle([authority.certificate]), 0o644)
        return left

    @property
    def _cross_file(self) -> Path:
        return self.path / "cross.pem"

    def _chain(self, now: datetime) -> list[x509.Certificate]:
        """What certificates carry along: the authority as its predecessor signed it, as long as that is any use."""
        if not self._cross_file.exists():
            return []
        own = self.authority().certificate
        return [
            link
            for link in load_chain(self._cross_file.read_bytes())
            if link.subject == own.subject and link.not_valid_after_utc > now
        ]


def _leaf(path: Path) -> Leaf:
    certificate = load_chain(path.read_bytes())[0]
    names, hosts = alternatives(certificate)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Leaf(path.stem, names, hosts, begins, ends, certificate.issuer.rfc4514_string())
