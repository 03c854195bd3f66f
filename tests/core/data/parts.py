"""Two nodes, and requests as gateways submit them."""

from __future__ import annotations

from controlplane.contract.ids import Member
from controlplane.contract.requests import Sampling, Submit
from dataplane.core.batching import Limits
from dataplane.core.events import Submitted

LIMITS = Limits(4, 16, 8, 8, 64, 0.5, 1000)
ME = Member("n0", "a")
NEXT = Member("n1", "a")


def submitted(rid: int, prompt: tuple[int, ...] = (1, 2, 3, 4), **fields: object) -> Submitted:
    sampling = fields.pop("sampling", Sampling(8, seed=1))
    return Submitted(Submit(rid, "p0", prompt, sampling, **fields), session=1)  # type: ignore[arg-type]
