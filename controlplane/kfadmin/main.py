"""kfadmin: the operators' command. Each verb group is a module; this one only puts them together."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer._completion_classes import completion_init
from typer.core import TyperGroup

from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin import (
    about,
    bundle,
    certs,
    check,
    contexts,
    demo,
    describe,
    etcd_care,
    etcd_roles,
    group,
    hosts,
    keys,
    operate,
    operations,
    show,
    tokens,
    up,
)  # fmt: skip
from controlplane.kfadmin.about import COMPLETE
from controlplane.kfadmin.chaos import verbs as chaos
from controlplane.kfadmin.contexts import CHOSEN
from controlplane.kfadmin.exits import WORDS, Exit, exit_of
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.pod import verbs as pod


class Verbs(TyperGroup):
    """Turns our errors into a line on stderr and an exit code, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KevlarFlowError as error:
            progress(f"kfadmin: {error}")
            ctx.exit(exit_of(error))
        except OSError as error:  # a file or the network of this machine; nothing of ours is broken
            if isinstance(error, BrokenPipeError):
                raise
            progress(f"kfadmin: {error}")
            ctx.exit(Exit.FAILED)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,  # `kfadmin completion` prints it, and changes no file
    pretty_exceptions_enable=False,
    help="Operate a KevlarFlow cluster. Exit codes: "
    + "; ".join(f"{code.value} {WORDS[code]}" for code in Exit)
    + ".",
)


@app.callback()
def options(
    context: Annotated[
        str, typer.Option(envvar="KF_CONTEXT", help="Which cluster, by name: see `kfadmin context`.")
    ] = "",
) -> None:
    CHOSEN.set(context)


for verb in (
    up.up, up.down,
    show.status, show.nodes, show.topology, show.events, show.incidents, show.protection, show.top, show.audit,
    operate.drain, operate.undrain, operate.cordon, operate.replace, operations.cancel,
    group.pause, group.resume, group.transfer_leader, group.scale, group.restart,
    about.version, about.completion, bundle.support_bundle,
    demo.demo,
):  # fmt: skip
    app.command()(verb)
app.command("uncordon", help="The same as undrain.")(operate.undrain)
config = typer.Typer(no_args_is_help=True, help="The cluster's settings.")
config.command("show")(show.config_show)
app.add_typer(check.app, name="check")
app.add_typer(describe.app, name="describe")
app.add_typer(operations.app, name="operations")
app.add_typer(chaos.app, name="chaos")
app.add_typer(config, name="config")
app.add_typer(certs.app, name="certs")
app.add_typer(hosts.app, name="host")
app.add_typer(pod.app, name="pod")
etcd_care.app.command()(etcd_roles.roles)
app.add_typer(etcd_care.app, name="etcd")
app.add_typer(keys.app, name="keys")
app.add_typer(tokens.app, name="token")
app.add_typer(contexts.app, name="context")


def main() -> None:
    """Entry point of `kfadmin`."""
    if COMPLETE in os.environ:  # a shell asks what may follow
        completion_init()
    app(prog_name="kfadmin")


if __name__ == "__main__":
    main()
