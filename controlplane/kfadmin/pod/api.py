"""The two things that are asked of Kubernetes' API: a node's labels, and a StatefulSet's number of pods."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
import msgspec

from controlplane.contract.address import join
from controlplane.contract.errors import ConfigError, PeerError, Unavailable
from controlplane.unreadable import UNREADABLE

T = TypeVar("T")

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER_S = 10.0


class _Metadata(msgspec.Struct, frozen=True):
    labels: dict[str, str] = {}


class _Node(msgspec.Struct, frozen=True):
    metadata: _Metadata


class _ScaleSpec(msgspec.Struct, frozen=True):
    replicas: int = 0


class _Scale(msgspec.Struct, frozen=True):
    spec: _ScaleSpec


class KubernetesApi:
    """With the pod's service account. Every method raises Unavailable, ConfigError (it may not) or PeerError."""

    def __init__(self, env: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> None:
        """Raises ConfigError if the pod has no service account."""
        host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
        try:
            token = (account / "token").read_text().strip()
            context = ssl.create_default_context(cafile=account / "ca.crt")
            self.namespace = (account / "namespace").read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"the pod has no service account ({account}: {error.strerror or error}): the chart mounts one where"
                " it is needed"
            ) from error
        if not host:
            raise ConfigError("KUBERNETES_SERVICE_HOST is not set: this is no pod of Kubernetes")
        self._http = httpx.Client(
            base_url=f"https://{join(host, int(port))}",
            headers={"authorization": f"Bearer {token}"},
            verify=context,
            timeout=ANSWER_S,
            trust_env=False,
        )

    def __enter__(self) -> KubernetesApi:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._http.close()

    def node_labels(self, node: str) -> dict[str, str]:
        return self._ask("GET", f"/api/v1/nodes/{node}", _Node).metadata.labels

    def pods_of(self, stateful_set: str) -> int:
        """How many it is to have."""
        return self._ask("GET", self._scale_of(stateful_set), _Scale).spec.replicas

    def set_pods_of(self, stateful_set: str, count: int) -> None:
        self._ask("PATCH", self._scale_of(stateful_set), _Scale, {"spec": {"replicas": count}})

    def _scale_of(self, stateful_set: str) -> str:
        return f"/apis/apps/v1/namespaces/{self.namespace}/statefulsets/{stateful_set}/scale"

    def _ask(self, method: str, path: str, kind: type[T], body: dict[str, Any] | None = None) -> T:
        content = None if body is None else msgspec.json.encode(body)
        try:
            answer = self._http.request(
                method, path, content=content, headers={"content-type": "application/merge-patch+json"}
            )
        except httpx.TransportError as error:
            raise Unavailable(f"Kubernetes' API does not answer: {error or type(error).__name__}") from error
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"Kubernetes does not let this pod {method} {path}: the chart makes the role for it (rbac.create)"
            )
        if answer.status_code >= 500:
            raise Unavailable(f"Kubernetes' API: {method} {path}: HTTP {answer.status_code}")
        if answer.status_code != 200:
            raise PeerError(
                f"Kubernetes' API: {method} {path}: HTTP {answer.status_code} {answer.text[:200]}"
            )
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except UNREADABLE as error:
            raise PeerError(
                f"Kubernetes' API: {method} {path}: the answer is not understood: {error}"
            ) from error
