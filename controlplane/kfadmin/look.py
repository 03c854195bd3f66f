"""Verbs that look share their options: which cluster, how to print, `--watch`, `--timeout`. Each is a function from a
client to a `View`; what is around it is here."""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from controlplane.kfadmin.client import AdminClient, Unreachable
from controlplane.kfadmin.formats import Output, OutputOption, View, show, shown
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect

WATCH_S = 1.0
CLEAR = "\x1b[H\x1b[2J"

Watch = Annotated[
    bool,
    typer.Option("--watch", "-w", help="Print again whenever it changes, until Ctrl-C or --timeout."),
]
Patience = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.0, help="Give up (exit code 5), or stop watching, after so many seconds."
    ),
]


def with_options(
    make: Callable[..., Any], run: Callable[..., None], own: int, **shared: Any
) -> Callable[..., None]:
    """`run`, as a verb with the options of `make` after its first `own` parameters, and then `shared` ones: name ->
    (annotation, default)."""
    hints = get_type_hints(make, include_extras=True)
    mine = list(inspect.signature(make).parameters.values())[own:]
    parameters = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in mine]
    for name, (annotation, default) in shared.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @functools.wraps(make)
    def verb(**options: Any) -> None:
        run(**options)

    del verb.__wrapped__  # its signature is not the verb's
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


CLUSTER: dict[str, Any] = {
    "run_dir": (RunDirOption, None),
    "admin": (AdminOption, None),
    "token_file": (TokenFileOption, None),
}


def look(make: Callable[..., View]) -> Callable[..., None]:
    """The verb of `make(client, its own options) -> View`."""

    def run(
        run_dir: Any, admin: Any, token_file: Any, output: Output, watch: bool, timeout: float, **own: Any
    ) -> None:
        with connect(run_dir, admin, token_file, timeout if not watch else 0.0) as client:
            if watch:
                _watch(lambda: make(client, **own), output, timeout)
            else:
                show(make(client, **own), output)

    shared = CLUSTER | {
        "output": (OutputOption, Output.TABLE),
        "watch": (Watch, False),
        "timeout": (Patience, 0.0),
    }
    return with_options(make, run, 1, **shared)


def _watch(make: Callable[[], View], output: Output, timeout_s: float) -> None:
    """Print whenever there is something new; on a terminal a table takes the place of the one before."""
    until = time.monotonic() + timeout_s if timeout_s else float("inf")
    in_place = output.for_people and sys.stdout.isatty()
    last, said = "", ""
    try:
        while True:
            try:
                view = make()
            except Unreachable as error:
                if (waiting := f"waiting for a controller: {error}") != said:
                    progress(waiting)
                said = waiting
            else:
                said = ""
                if in_place:
                    print(CLEAR, end="")
                    show(view, output)
                elif (text := shown(view, output)) != last:
                    print(text, end="", flush=True)
                    last = text
            if time.monotonic() + WATCH_S > until:
                return
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return


Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on printing what comes, until Ctrl-C or --timeout.")
]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest ones.")]
After = Annotated[int, typer.Option(min=0, help="Only those with a higher id.")]


def tail(make: Callable[..., View]) -> Callable[..., None]:
    """The verb of `make(client, limit, after, its own options) -> View`, of rows with ids."""

    def run(
        run_dir: Any, admin: Any, token_file: Any, output: Output, limit: int, after: int, follow: bool,
        timeout: float, **own: Any,
    ) -> None:  # fmt: skip
        with connect(run_dir, admin, token_file, timeout if not follow else 0.0) as client:
            view = make(client, limit, after, **own)
            show(view, output)
            if follow:
                _follow(client, make, view, after, output, timeout, own)

    shared = CLUSTER | {
        "output": (OutputOption, Output.TABLE),
        "limit": (Limit, 40),
        "after": (After, 0),
        "follow": (Follow, False),
        "timeout": (Patience, 0.0),
    }
    return with_options(make, run, 3, **shared)


def _follow(
    client: AdminClient, make: Callable[..., View], first: View, after: int, output: Output, timeout_s: float,
    own: dict[str, Any],
) -> None:  # fmt: skip
    until = time.monotonic() + timeout_s if timeout_s else float("inf")
    last, said = max((row.id for row in first.items or ()), default=after), ""
    try:
        while time.monotonic() + WATCH_S <= until:
            time.sleep(WATCH_S)
            try:
                view = make(client, 1000, last, **own)
            except Unreachable as error:
                if (waiting := f"waiting for a controller: {error}") != said:
                    progress(waiting)
                said = waiting
                continue
            said = ""
            if view.items:
                show(view, output)
                last = max(row.id for row in view.items)
    except KeyboardInterrupt:
        return
