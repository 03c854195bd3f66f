"""The kinds of operations: a closed union, one module a kind. A new one is added here, and as a word in the contract.

`of(op)` is the operation as its kind understands it; what a kind can be asked is in `kind.py`.
"""

from __future__ import annotations

from typing import Final

from controlplane.contract.records import Operation, OperationKind
from controlplane.core.kinds.cordon import Cordon
from controlplane.core.kinds.drain import Drain
from controlplane.core.kinds.pause import Pause
from controlplane.core.kinds.replace import Replace
from controlplane.core.kinds.restart import Restart
from controlplane.core.kinds.resume import Resume
from controlplane.core.kinds.scale import Scale
from controlplane.core.kinds.transfer import Transfer
from controlplane.core.kinds.undrain import Undrain

AnyKind = Drain | Cordon | Undrain | Replace | Transfer | Pause | Resume | Restart | Scale

_EVERY: tuple[type[AnyKind], ...] = (Drain, Cordon, Undrain, Replace, Transfer, Pause, Resume, Restart, Scale)
KINDS: Final[dict[OperationKind, type[AnyKind]]] = {kind.kind: kind for kind in _EVERY}


def of(op: Operation) -> AnyKind:
    return KINDS[op.kind](op)
