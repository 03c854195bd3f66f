"""The union of operation kinds is closed, and nothing else in the core knows one kind from another."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

import controlplane.core
from controlplane.contract.events import EventKind
from controlplane.contract.records import Operation, OperationKind
from controlplane.core import kinds

CORE = Path(controlplane.core.__file__).parent
NAMES_A_KIND = re.compile(r"\bOperationKind\.[A-Z]+|\bkinds\.(?!of\b|KINDS\b)[a-z]+")


def test_every_kind_of_the_contract_has_its_module() -> None:
    assert set(kinds.KINDS) == set(OperationKind)
    assert set(typing.get_args(kinds.AnyKind)) == set(kinds.KINDS.values())
    for kind in OperationKind:
        assert kinds.of(Operation("op", kind, "n1")).kind is kind
    modules = [cls.__module__ for cls in kinds.KINDS.values()]
    assert len(set(modules)) == len(modules)


def test_nothing_else_in_the_core_names_a_kind() -> None:
    told = {
        path.name: NAMES_A_KIND.findall(path.read_text())
        for path in CORE.glob("*.py")
        if NAMES_A_KIND.search(path.read_text())
    }
    assert told == {}
    assert NAMES_A_KIND.search((CORE / "kinds" / "drain.py").read_text())  # the search can find something


@pytest.mark.parametrize("kind", list(OperationKind))
def test_the_last_words_of_a_kind(kind: OperationKind) -> None:
    cls = kinds.KINDS[kind]
    words = kinds.of(Operation("op", kind, "n1", instances=3)).last_words()
    assert "{" not in words
    events = {OperationKind.DRAIN: EventKind.DRAINED, OperationKind.REPLACE: EventKind.REPLACED}
    assert cls.done_event is events.get(kind, EventKind.OPERATION)
