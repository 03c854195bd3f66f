"""Verbs about a whole release: its Secrets, and how many instances and pods it has."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from controlplane.contract.errors import Unavailable
from controlplane.contract.identity import ProcessRole
from controlplane.contract.records import OperationKind
from controlplane.contract.status import OperationRequest
from controlplane.kfadmin.client import Refused
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.pod.api import KubernetesApi
from controlplane.kfadmin.pod.autoscale import DEADLINE_S, Rules, decide, pods_of
from controlplane.kfadmin.pod.secret_files import Release, secrets_of
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect
from controlplane.kfadmin.tokens import seconds_of


def secrets_verb(
    name: Annotated[str, typer.Argument(help="The release: what `helm install` calls it.")],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Where it is installed.")] = "default",
    folder: Annotated[
        Path, typer.Option("--dir", help="The operator's: certs/ (`kfadmin certs init`), secret, api-keys.")
    ] = Path(),
    nodes: Annotated[
        int, typer.Option(min=1, help="Nodes that are certified: as many as there may ever be.")
    ] = 16,
    controllers: Annotated[int, typer.Option(min=1)] = 3,
    gateways: Annotated[int, typer.Option(min=1, help="As many as there may ever be.")] = 8,
    etcd: Annotated[
        int, typer.Option(min=0, help="Members of the release's own etcd; 0: an external one.")
    ] = 3,
    host: Annotated[
        list[str] | None, typer.Option(help="DNS names that clients know the gateways by.")
    ] = None,
    certificates: Annotated[
        bool, typer.Option(help="Without: tokens and keys alone, where cert-manager makes certificates.")
    ] = True,
    lasts: Annotated[
        str, typer.Option("--for", help="How long new certificates are valid: 12h, 30d.")
    ] = "30d",
) -> None:
    """The Secrets of a release, to stdout: `kfadmin pod secrets shop -n llm | kubectl apply -f -`.

    Again for newer certificates, keys or more nodes: processes take them up by themselves. It prints secrets: send it
    nowhere but to kubectl.
    """
    counts = {
        ProcessRole.CONTROLLER: controllers,
        ProcessRole.GATEWAY: gateways,
        ProcessRole.NODE: nodes,
        ProcessRole.ETCD: etcd,
    }
    release = Release(name, namespace, counts, tuple(host or ()))
    items = secrets_of(folder, release, timedelta(seconds=seconds_of(lasts)), certificates)
    print(
        msgspec.json.format(
            msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items})
        ).decode()
    )


def autoscale(
    stateful_sets: Annotated[list[str], typer.Argument(help="The StatefulSets of the nodes: one a stage.")],
    least: Annotated[int, typer.Option("--min", min=1, help="Instances at least.")],
    most: Annotated[int, typer.Option("--max", min=1, help="Instances at most.")],
    waiting: Annotated[
        float, typer.Option(help="Queued requests an instance: one more from there on.")
    ] = 4.0,
    kv_high: Annotated[float, typer.Option(help="Share of KV blocks in use: one more above it.")] = 0.8,
    kv_low: Annotated[float, typer.Option(help="Share of KV blocks in use: one less below it.")] = 0.3,
    calm: Annotated[float, typer.Option(help="Seconds from the last change until one goes.")] = 600.0,
    deadline: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a change may take; then it has failed.")
    ] = DEADLINE_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """One look at the group's load: `kfadmin scale` where it should have another number of instances, and as many pods
    as its nodes need. For a CronJob in the cluster; pods that are superfluous go when nothing names their nodes any
    more."""
    rules = Rules(least, most, waiting, kv_high, kv_low, calm)
    with connect(run_dir, admin, token_file) as client, KubernetesApi() as api:
        status = client.current()
        if status.answered_by != status.leader:
            raise Unavailable("no leader answers: the next look will tell")
        decision = decide(status, rules, time.time())
        progress(f"{decision.now} instances, {decision.instances} wanted: {decision.why}")
        needed = pods_of(status, decision.instances, int(client.settings().get("spares", 0)))
        for name in stateful_sets:
            before = api.pods_of(name)
            if needed == before or (decision.scaling and needed < before):
                continue  # nodes that are to go still move what they serve
            progress(f"{name}: {before} pods, {needed} needed")
            if not dry_run:
                api.set_pods_of(name, needed)
        if decision.changes and not dry_run:
            name = f"autoscale-{decision.instances}-{secrets.token_hex(4)}"
            answer = client.submit(
                OperationRequest(
                    name,
                    OperationKind.SCALE.value,
                    deadline_s=deadline,  # without one, what cannot be finished keeps all others waiting
                    instances=decision.instances,
                    reason=decision.why,
                )
            )
            if not answer.accepted:
                raise Refused("; ".join(check.message for check in answer.checks if check.level == "fail"))
