"""What a node and a rank of its stage say to each other, over a socket of whole messages."""

from __future__ import annotations

import msgspec

from kernels.ranks.layout import Layout

MESSAGE_MAX = 1 << 17


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Make ready for a layout, whose exchange comes with this message; steps go on meanwhile by the one that is in use.
    What was prepared before for any other layout is not wanted any more."""

    layout_id: int
    layout: Layout
    numbers_max: int


class Use(msgspec.Struct, tag=True, frozen=True):
    """Steps are by this layout from now on, which is prepared: no other one is wanted any more."""

    layout_id: int


class Step(msgspec.Struct, tag=True, frozen=True):
    """Compute what is in the box, by the layout in use. owned: rows whose data-parallel heads are this rank's. answers:
    write the activations, which all ranks have."""

    layout_id: int
    tokens: int
    rows: int
    width: int
    picked: int
    owned: tuple[int, ...]
    answers: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    layout_id: int


class Done(msgspec.Struct, tag=True, frozen=True):
    """The step is computed. suspect: see kernels.base.StageKernels."""

    layout_id: int
    suspect: bool


class Over(msgspec.Struct, tag=True, frozen=True):
    """The ranks of that layout are not in step any more. missing: the rank that was waited for in vain, or -1."""

    layout_id: int
    missing: int


class Unfit(msgspec.Struct, tag=True, frozen=True):
    """The step does not fit the stage, and nothing is wrong with this rank; or the rank cannot prepare the layout."""

    layout_id: int
    error: str
    is_index: bool


Order = Prepare | Use | Step
Answer = Ready | Done | Over | Unfit
