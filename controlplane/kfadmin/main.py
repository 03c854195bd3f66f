"""kfadmin: the operators' command. Each verb group is a module; this one only puts them together."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from controlplane.contract.errors import KevlarFlowError
from controlplane.kfadmin import check, demo, group, operate, show, up
from controlplane.kfadmin.exits import Exit, exit_of
from controlplane.kfadmin.output import progress


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
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Operate a KevlarFlow cluster. Exit codes: 0 done, 1 failed, 2 usage, 3 refused and nothing changed, "
    "4 still running, 5 control plane unreachable, 6 not allowed.",
)
for verb in (
    up.up, up.down,
    show.status, show.nodes, show.topology, show.events,
    operate.drain, operate.undrain, operate.cordon, operate.replace, operate.cancel,
    group.pause, group.resume, group.transfer_leader, group.restart,
    demo.demo,
):  # fmt: skip
    app.command()(verb)
app.command("uncordon", help="The same as undrain.")(operate.undrain)
app.add_typer(check.app, name="check")


def main() -> None:
    """Entry point of `kfadmin`."""
    app()


if __name__ == "__main__":
    main()
