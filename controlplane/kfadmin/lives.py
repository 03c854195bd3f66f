"""The life of a request as lines of a table, in the order in which things happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.text import Text

from controlplane.contract.lives import Life
from controlplane.kfadmin.output import BAD, GOOD, WARN, clock, console, table


def print_life(life: Life, incidents: Mapping[tuple[str, int], int]) -> None:
    """`incidents`: by pipeline and the epoch that they led to."""
    out = console()
    what = f"{life.choices} choices" if life.choices > 1 else "one choice"
    way = "a stream" if life.stream else "an answer in one piece"
    went_on = ", resumed from another connection" if life.resumed else ""
    out.print(
        f"{life.kind} {life.request} at {life.gateway}: {way} of {what}{went_on}; key {life.key or '-'}, "
        f"model {life.model}, {life.prompt_tokens} tokens of prompt, {life.tokens} given"
    )
    rows = table("AFTER", "WHAT", "CHOICE", "PIPELINE", "EPOCH", "TOOK", "WHY")
    for at_s, cells in sorted(lines(life, incidents), key=lambda line: line[0]):
        rows.add_row(f"{at_s:.3f} s", *cells)
    out.print(rows)
    if life.left_out:
        out.print(f"{life.left_out} more places and pauses were not kept")
    out.print()


def lines(
    life: Life, incidents: Mapping[tuple[str, int], int]
) -> Iterator[tuple[float, tuple[str | Text, ...]]]:
    """What happened, with seconds after the beginning; of equal ones the earlier comes first."""
    yield 0.0, ("admitted", "", "", "", "", clock(life.began_unix_s))
    for place in life.places:
        waited = "" if place.at_s != life.sent_s else f"{place.at_s:.3f} s"
        on = f"to the scheduler on {place.node}"
        yield place.at_s, ("sent", str(place.choice), place.pipeline, str(place.epoch), waited, on)
    if life.first_token_s is not None:
        since = life.first_token_s - (life.sent_s or 0.0)
        yield (
            life.first_token_s,
            ("first token", "", "", "", f"{since:.3f} s", "queued there, and prefilled"),
        )
    for pause in life.pauses:
        incident = incidents.get((pause.pipeline, pause.epoch))
        why = pause.cause + (f" (incident {incident})" if incident is not None else "")
        yield (
            pause.at_s,
            (
                Text(f"pause, {pause.how}", WARN), str(pause.choice), pause.pipeline, str(pause.epoch),
                f"{pause.lasted_s:.3f} s", why,
            ),
        )  # fmt: skip
    if life.lasted_s is None:
        yield float("inf"), (Text("it runs", GOOD), "", "", "", "", "")
    else:
        style = GOOD if life.status == 200 else BAD
        yield life.lasted_s, (Text(f"end, HTTP {life.status}", style), "", "", "", "", life.end)
