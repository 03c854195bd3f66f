"""Who a process is to the others of its cluster, and how it makes sure who they are: mutual TLS by name.

Each certificate names its process, `NAME.ROLE.CLUSTER.internal`. Whoever connects says which process it means to
reach and goes no further if the certificate there does not name it: an address, of which etcd tells, proves nothing.
Servers take nobody without a certificate of the cluster's authorities, and ask which role it names.

Files are read again when they have changed, at the next handshake, so that certificates and authorities are replaced
while everything runs. Without `tls` in the settings connections are plain, and only the cluster's tokens tell friends
from strangers.
"""

from __future__ import annotations

import errno
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
import structlog

from controlplane.contract.address import bound, join, listen_first
from controlplane.contract.config import ClusterConfig, TlsConfig
from controlplane.contract.errors import ConfigError

log = structlog.get_logger()

DOMAIN = "internal"  # reserved for names that no public authority certifies
SAN = "x509_subject_alternative_name"  # as gRPC calls it

LATE_SHARE = 0.25  # of a certificate's life: what is not renewed by then is a trouble
RELAY_NAME = "host"  # of every host's relay

# Of a server: who connects and proves nothing does not keep the connection for longer.
HANDSHAKE_LIMIT = ("grpc.server_handshake_timeout_ms", 10_000)

Options = Sequence[tuple[str, Any]]


class ProcessRole(StrEnum):
    CONTROLLER = "controller"
    NODE = "node"
    GATEWAY = "gateway"
    RELAY = "relay"
    ETCD = "etcd"
    ADMIN = "admin"  # kfadmin


@dataclass(frozen=True, slots=True)
class ProcessName:
    role: ProcessRole
    name: str

    def __str__(self) -> str:
        """As file names have it."""
        return f"{self.role.value}-{self.name}"

    def dns(self, cluster: str) -> str:
        return f"{self.name}.{self.role.value}.{cluster}.{DOMAIN}"


def etcd_name(cluster: str) -> str:
    """What every member of the cluster's own etcd is certified as, besides its own name."""
    return f"{ProcessRole.ETCD.value}.{cluster}.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class Material:
    """PEM: authorities, certificate chain, private key."""

    ca: bytes
    cert: bytes
    key: bytes
    begins_unix_s: float  # of the certificate
    ends_unix_s: float


class Identity:
    """Made once for each process. Methods may be called from any thread."""

    def __init__(self, tls: TlsConfig, cluster: str, me: ProcessName) -> None:
        """Raises ConfigError if there is something wrong with the files."""
        self.me = me
        self.cluster = cluster
        self._files = Files(tls, me) if tls.enabled else None

    @classmethod
    def of(cls, config: ClusterConfig, role: ProcessRole, name: str) -> Identity:
        """Raises ConfigError."""
        return cls(config.tls, config.cluster, ProcessName(role, name))

    @property
    def secure(self) -> bool:
        return self._files is not None

    @property
    def files(self) -> Files:
        if self._files is None:
            raise ConfigError("the settings have no tls.ca, tls.cert and tls.key")
        return self._files

    def channel(self, address: str, peer: ProcessName, options: Options = ()) -> Any:
        """A channel (grpc.aio) to `peer`, on which nothing is said before it has proved its name. A Unix socket in the
        run directory is as good as a proof: nobody else can make one there."""
        if self._files is None or address.startswith("unix:"):
            return grpc.aio.insecure_channel(address, options=options)
        now = self._files.current()
        credentials = grpc.ssl_channel_credentials(now.ca, now.key, now.cert)
        named = [*options, ("grpc.ssl_target_name_override", peer.dns(self.cluster))]
        return grpc.aio.secure_channel(address, credentials, options=named)

    def add_port(self, server: Any, address: str) -> int:
        """Let a server (grpc.aio) listen at "host:port"; the port. Raises RuntimeError if it cannot."""
        if self._files is None:
            return int(server.add_insecure_port(address))
        files, given = self._files, self._files.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """At each handshake; None: what was used before."""
            nonlocal given
            now = files.current()
            if now == given:
                return None
            given = now
            return _server_certificate(now)

        credentials = grpc.dynamic_ssl_server_credentials(
            _server_certificate(given), fetch, require_client_authentication=True
        )
        return int(server.add_secure_port(address, credentials))

    def listen(self, server: Any, what: str, host: str, ports: Sequence[int]) -> int:
        """Let a server (grpc.aio) listen on the first of these ports that is not taken; the port.

        Raises ConfigError."""

        def listen(port: int) -> int:
            if port:
                bound(host, port).close()  # gRPC does not say what kept it from listening
            try:
                return self.add_port(server, join(host, port))
            except RuntimeError as error:  # somebody was faster
                raise OSError(errno.EADDRINUSE, str(error)) from error

        return listen_first(what, host, ports, listen)

    def callers(self, context: Any, role: ProcessRole) -> frozenset[str] | None:
        """Names that a caller has in `role`, by its certificate; empty: it has no such role. None without TLS: the
        token is all that is known of it."""
        if self._files is None:
            return None
        suffix = f".{role.value}.{self.cluster}.{DOMAIN}".lower()
        names = [name.decode(errors="replace") for name in context.auth_context().get(SAN, ())]
        return frozenset(name[: -len(suffix)] for name in names if name.lower().endswith(suffix))

    def troubles(self) -> tuple[str, ...]:
        """What is wrong with our certificate, or soon will be, for people; the same words each time."""
        return self._files.troubles(time.time()) if self._files is not None else ()

    def admits(self, context: Any, role: ProcessRole) -> bool:
        """Whether a caller may act in `role`."""
        names = self.callers(context, role)
        return names is None or bool(names)


PLAIN = Identity(TlsConfig(), "", ProcessName(ProcessRole.ADMIN, "plain"))
"""Of a process without certificates: nobody proves anything."""


def no_role(role: ProcessRole) -> str:
    return f"the caller's certificate names no {role.value} of this cluster: `kfadmin certs issue {role.value} NAME`"


class Files:
    """The files of the settings, as they are now."""

    def __init__(self, tls: TlsConfig, me: ProcessName) -> None:
        """Raises ConfigError."""
        ca, cert, key = tls.paths(str(me))
        self.ca = Path(ca) if ca else None  # of a server that asks nobody for a certificate
        self.cert, self.key = Path(cert), Path(key)
        self.problem = ""  # why files that have changed are not used
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._material = self._read()

    def current(self) -> Material:
        """Read anew if they have changed; while they do not fit together, as they were before."""
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                try:
                    material = self._read()
                except ConfigError as error:
                    log.warning("certificates cannot be read: those from before are used", error=str(error))
                    self._seen, self.problem = stamp, str(error)  # until they change again
                else:
                    if self._stamp() == stamp:  # else they are being replaced: next time
                        self._seen, self._material, self.problem = stamp, material, ""
            return self._material

    def troubles(self, now_unix_s: float) -> tuple[str, ...]:
        """What an operator has to mend, or nothing."""
        now = self.current()
        if self.problem:
            return (f"new certificates are not used: {self.problem}",)
        if now_unix_s < now.ends_unix_s - LATE_SHARE * (now.ends_unix_s - now.begins_unix_s):
            return ()
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now.ends_unix_s))
        return (f"the certificate {self.cert} is valid until {until}: `kfadmin certs rotate`",)

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stamp(path) for path in (self.ca, self.cert, self.key) if path is not None)

    def _read(self) -> Material:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls.ca: cannot read authorities from {self.ca}: {_why(error)}") from error
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"tls.cert, tls.key: cannot use {self.cert} with {self.key}: {_why(error)}; "
                "`kfadmin certs issue` makes both"
            ) from error
        if self.key.stat().st_mode & 0o037:  # a group may read: Kubernetes gives a pod its secrets by a group
            raise ConfigError(f"the key {self.key} is readable by others: chmod 600 {self.key}")
        ca = self.ca.read_bytes() if self.ca is not None else b""
        cert = self.cert.read_bytes()
        return Material(ca, cert, self.key.read_bytes(), *_validity(cert))


def _validity(cert: bytes) -> tuple[float, float]:
    # Not before there are certificates: it takes as long to import as all that a process does with it here.
    from cryptography import x509

    leaf = x509.load_pem_x509_certificates(cert)[0]
    return leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a password")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error) or "not PEM").replace("_", " ").lower()
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_mtime_ns, found.st_ino, found.st_size


def _server_certificate(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)
