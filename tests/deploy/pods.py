"""Pods without Kubernetes: each has namespaces of its own, and the files that the chart would mount.

What is not there is Kubernetes itself: names are in /etc/hosts, and the test does what a kubelet does.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from controlplane.certs.folder import CertFolder
from controlplane.contract.identity import ProcessRole
from controlplane.kfadmin.pod.place import LETTERS
from controlplane.kfadmin.pod.secret_files import Release, secrets_of
from tests.deploy.chart import NAMESPACE, RELEASE, Document, of_kind, render, templates
from tests.matrix.namespaces import Network

ETC = "/etc/kevlarflow"
BEGIN_LIMIT_S, END_LIMIT_S = 240.0, 60.0


class Pods:
    """Pods of one release. Use as a context manager: what still runs ends with it."""

    def __init__(self, values: Document, names: Sequence[str], folder: Path) -> None:
        """`names`: of processes, such as c0, n3."""
        self.documents = render(values)
        self.network = Network(names)
        self.folder = folder
        self.stages = int(values["settings"]["stages"])
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._env: dict[str, dict[str, str]] = {}
        counts = {role: sum(name[0] == letter for name in names) for role, letter in LETTERS.items()}
        # By the test, which has no /etc/hosts.
        reached = tuple(self.network.address(name) for name in names if name[0] == "g")
        CertFolder(folder / "certs").create(values["settings"]["cluster"], datetime.now(UTC))
        self._secrets = {
            one["metadata"]["name"]: one["data"]
            for one in secrets_of(folder, Release(RELEASE, NAMESPACE, counts, reached), timedelta(days=1))
        }

    def __enter__(self) -> Pods:
        self.network.__enter__()
        hosts = ["127.0.0.1 localhost"]
        for name in self.network.hosts:
            role, address = self._role(name), self.network.address(name)
            service = f"{RELEASE}-{role.value}"
            hosts.append(
                f"{address} {service}-{name[1:]}.{service}.{NAMESPACE}.svc {service}.{NAMESPACE}.svc"
            )
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._running):
            self.kill(name)
        self.network.__exit__(kind, error, trace)

    @staticmethod
    def _role(name: str) -> ProcessRole:
        return next(role for role, letter in LETTERS.items() if letter == name[0])

    def start(self, name: str, machine: str = "m0") -> None:
        """A fresh pod of this process: nothing is left of one before."""
        role = self._role(name)
        pod, owner = f"{RELEASE}-{role.value}-{name[1:]}", f"{RELEASE}-{role.value}"
        if role is ProcessRole.NODE:
            ordinal, stage = divmod(int(name[1:]), self.stages)
            pod, owner = f"{RELEASE}-node-s{stage}-{ordinal}", f"{RELEASE}-node-s{stage}"
        (container,) = templates(self.documents)[owner]["spec"]["containers"]
        uid = secrets.token_hex(8)
        root = self.folder / f"{name}-{uid}"
        etc = root / "etc"
        etc.mkdir(parents=True)
        for what in ("credentials", "api-keys", f"{role.value}-certs"):
            target = etc / what.replace(f"{role.value}-", "")
            target.mkdir()
            for file, content in self._secrets[f"{RELEASE}-{what}"].items():
                (target / file).write_bytes(base64.b64decode(content))
                (target / file).chmod(0o440)
        plan = of_kind(self.documents, "ConfigMap")[f"{RELEASE}-plan"]["data"]["plan.json"]
        (etc / "plan.json").write_text(plan.replace(ETC, str(etc)))
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("KF_")},
            **{one["name"]: str(one["value"]) for one in container["env"] if "value" in one},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KF_RUN_DIR": str(root / "run"),
            "KF_POD_NAME": pod,
            "KF_POD_UID": uid,
            "KF_POD_IP": self.network.address(name),
            "KF_NODE_NAME": machine,
            "KF_POD_PLAN": str(etc / "plan.json"),
            "KF_CREDENTIALS": str(etc / "credentials"),
            "KF_API_KEYS": str(etc / "api-keys"),
            "HOME": str(root),
            "GRPC_DNS_RESOLVER": "native",  # the other one waits for a name server as well, which is not there
            "NO_PROXY": "*",
        }
        mount = f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts"
        script = f"{mount} && exec {shlex.join(['kfadmin', *container['args']])}"
        command = [
            *self.network.command(name),
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*command, "sh", "-c", script],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._env[name] = env

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def run_dir(self, name: str) -> Path:
        return Path(self._env[name]["KF_RUN_DIR"])

    def process_one(self, name: str) -> int:
        """Its pid on this machine, as soon as `kfadmin pod run` has made its run directory."""
        parent, deadline = self._running[name].pid, time.monotonic() + BEGIN_LIMIT_S
        while not (self.run_dir(name) / "endpoints.json").exists():
            assert self._running[name].poll() is None, f"{name} has ended"
            assert time.monotonic() < deadline, f"{name} does not begin"
            time.sleep(0.02)
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def exec(
        self, name: str, command: Sequence[str], limit_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec`, and as probes and hooks."""
        inside = ["nsenter", "--target", str(self.process_one(name)), "--mount", "--net", "--pid"]
        return subprocess.run(
            [*inside, *command],
            env=self._env[name],
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )

    def hook(self, name: str, *path: str) -> list[str]:
        """The command of a probe or hook of a node's container, such as "lifecycle", "preStop"."""
        stage = int(name[1:]) % self.stages
        found: Any = templates(self.documents)[f"{RELEASE}-node-s{stage}"]["spec"]["containers"][0]
        for key in path:
            found = found[key]
        command: list[str] = found["exec"]["command"]
        return command

    def stop(self, name: str) -> int:
        """As a kubelet ends a pod's container once its hook is through: SIGTERM to process 1; its exit code."""
        os.kill(self.process_one(name), signal.SIGTERM)
        return self._running.pop(name).wait(END_LIMIT_S)

    def kill(self, name: str) -> None:
        """The machine is gone: every process of the pod at once."""
        process = self._running.pop(name)
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):  # it has ended by itself
            parent = process.pid
            os.kill(
                int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]), signal.SIGKILL
            )
        process.kill()
        process.wait(END_LIMIT_S)
