"""Which trace a request belongs to (pure): its client's, else one that its id decides.

So a stream that goes on at another gateway stays in its trace, and everybody who knows the request knows it.
https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
SAMPLED = 1  # of the flags


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace: str  # 32 hexadecimal digits
    parent: str  # 16 of the client's span; "": it named none
    sampled: bool  # whether anybody keeps its spans

    def below(self, span: str) -> str:
        """The `traceparent` of what is done below a span of ours."""
        return f"00-{self.trace}-{span}-{int(self.sampled):02x}"


def context_of(request: str, traceparent: str) -> TraceContext:
    """`traceparent`: the client's, "" if it sent none; what is no such thing is the same as none."""
    return parsed(traceparent) or TraceContext(hashlib.sha256(request.encode()).hexdigest()[:32], "", True)


def parsed(traceparent: str) -> TraceContext | None:
    """Of a `traceparent`; None: it is none."""
    found = PARENT.fullmatch(traceparent)
    return None if found is None else TraceContext(found[1], found[2], bool(int(found[3], 16) & SAMPLED))


def root_span(request: str, gateway: str, began_unix_s: float) -> str:
    """The span of one connection: known from its beginning, though it is made at its end."""
    named = f"{request} {gateway} {began_unix_s!r}"
    return hashlib.sha256(named.encode()).hexdigest()[:16]
