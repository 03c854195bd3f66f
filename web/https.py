"""HTTPS: the context of a server whose certificate is replaced while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import structlog

from controlplane.contract.config import ClusterConfig, TlsConfig
from controlplane.contract.identity import Files, ProcessName

log = structlog.get_logger()

ContextFactory = Callable[[Any, Callable[[], ssl.SSLContext]], ssl.SSLContext]


def https_of(config: ClusterConfig, me: ProcessName) -> ContextFactory | None:
    """What uvicorn makes its context with; None: plain HTTP. Raises ConfigError."""
    paths = config.https
    if paths is None:
        return None
    cert, key = paths
    server = HttpsServer(Files(TlsConfig(ca="", cert=cert, key=key), me))
    return lambda _config, _default: server.context


class HttpsServer:
    """`context` answers each handshake with the certificate that is there now."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._of = files.current()
        self._newest = self._made()
        self.context = self._newest
        self.context.sni_callback = self._choose  # called in every handshake, with a name or without

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._files.cert, self._files.key)
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        now = self._files.current()
        if now is not self._of:
            try:
                self._newest, self._of = self._made(), now
            except (
                OSError,
                ssl.SSLError,
            ) as error:  # replaced again at this moment: the next handshake looks anew
                log.warning("a certificate cannot be read: the one from before is used", error=str(error))
        connection.context = self._newest
