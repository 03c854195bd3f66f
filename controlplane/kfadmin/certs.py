"""`kfadmin certs`: the cluster's own authority, and the certificates that its processes know each other by."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.kfadmin.formats import Output, OutputOption, View, show
from controlplane.kfadmin.output import clock, console, progress, table
from controlplane.kfadmin.target import RunDirOption, find_run_dir
from controlplane.kfadmin.tokens import seconds_of

if TYPE_CHECKING:
    from controlplane.certs.folder import CertFolder

FOLDER = "certs"  # in the run directory

app = typer.Typer(
    no_args_is_help=True, help="Certificates that processes know each other by, and their authority."
)
DirOption = Annotated[Path | None, typer.Option("--dir", help="Folder (default: RUN_DIR/certs).")]


def _open(run_dir: Path | None, folder: Path | None) -> CertFolder:
    # Not before it is needed: every verb of kfadmin starts here, and cryptography takes as long as all the rest.
    from controlplane.certs.folder import CertFolder

    return CertFolder(folder or find_run_dir(run_dir).path / FOLDER)


@app.command()
def init(
    run_dir: RunDirOption = None,
    folder: DirOption = None,
    cluster: Annotated[
        str, typer.Option(help="Name of the cluster, as in its settings (default: of the run directory).")
    ] = "",
) -> None:
    """Make an authority. Whoever has its key (authority.pem) can make processes of the cluster: keep it apart."""
    made = _open(run_dir, folder)
    made.create(cluster or _cluster_of(run_dir), datetime.now(UTC))
    print(made.path)


def _cluster_of(run_dir: Path | None) -> str:
    try:
        return find_run_dir(run_dir).config().cluster
    except ConfigError:  # nothing was started there yet
        return ClusterConfig(run_dir="-", model="-", etcd=()).cluster


@app.command()
def issue(
    role: Annotated[ProcessRole, typer.Argument(help="What the processes are.")],
    names: Annotated[list[str], typer.Argument(help="Their names: n0 n1, c1, g1; host of a relay.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Address or DNS name they are reached at, for HTTPS and etcd.")
    ] = None,
    lasts: Annotated[str, typer.Option("--for", help="How long they are valid: 12h, 7d.")] = "7d",
    run_dir: RunDirOption = None,
    folder: DirOption = None,
) -> None:
    """A key and a certificate for each process, in one file ROLE-NAME.pem. The settings of a host name it:

    tls.ca = "DIR/ca.pem", tls.cert = "DIR/{process}.pem"
    """
    processes = [ProcessName(role, name) for name in names]
    lifetime = timedelta(seconds=seconds_of(lasts))
    for path in _open(run_dir, folder).issue(processes, host or (), datetime.now(UTC), lifetime):
        print(path)


@app.command()
def rotate(
    authority: Annotated[
        bool, typer.Option("--authority", help="Also a new authority; both are trusted from now on.")
    ] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Trust the old authority no longer.")] = False,
    run_dir: RunDirOption = None,
    folder: DirOption = None,
) -> None:
    """New keys and certificates in place of all in the folder. Running processes take them up by themselves, and no
    connection ends. Other hosts need their files, and ca.pem after --authority before --finish."""
    if authority and finish:
        raise typer.BadParameter("one after the other: other hosts need the new ca.pem in between")
    made, now = _open(run_dir, folder), datetime.now(UTC)
    if authority:
        renewed = made.change_authority(now)
        progress(
            "two authorities are trusted; when every host has the new files: kfadmin certs rotate --finish"
        )
    elif finish:
        renewed = made.finish(now)
        progress("etcd trusts the old authority until it is restarted (kfadmin restart etcd)")
    else:
        renewed = made.renew(now)
    for process in renewed:
        print(process)


@app.command()
def status(
    run_dir: RunDirOption = None, folder: DirOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Who is trusted, and until when each certificate is valid."""
    made, now = _open(run_dir, folder), datetime.now(UTC)
    signer = made.authority().certificate.subject.rfc4514_string() if made.exists else ""
    trusted: list[dict[str, Any]] = [
        {
            "authority": one.subject.rfc4514_string(),
            "signs": one.subject.rfc4514_string() == signer,
            "ends": one.not_valid_after_utc,
        }
        for one in made.trusted()
    ]
    leaves: list[dict[str, Any]] = [
        {
            "process": leaf.process,
            "names": [*leaf.names, *leaf.hosts],
            "authority": leaf.authority,
            "ends": leaf.ends,
            "due": leaf.due(now),
            "expired": leaf.ends <= now,
        }
        for leaf in made.leaves()
    ]

    def draw(wide: bool) -> None:
        rows = table("AUTHORITY", "SIGNS", "VALID UNTIL")
        for one in trusted:
            rows.add_row(one["authority"], "yes" if one["signs"] else "", clock(one["ends"].timestamp()))
        console().print(rows)
        rows = table("PROCESS", "VALID UNTIL", "", *(["NAMES"] if wide else []))
        for leaf in leaves:
            state = "EXPIRED" if leaf["expired"] else "to be renewed" if leaf["due"] else ""
            names = [" ".join(leaf["names"])] if wide else []
            rows.add_row(leaf["process"], clock(leaf["ends"].timestamp()), state, *names)
        console().print(rows)

    value = {"folder": str(made.path), "trusted": trusted, "certificates": leaves}
    show(View(value, draw, leaves, [leaf["process"] for leaf in leaves]), output)
