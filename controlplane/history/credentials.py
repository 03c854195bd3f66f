"""Lines of the audit about API keys and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.audit import Action
from controlplane.contract.auth import Caller
from controlplane.contract.credentials import Change, CredentialChange
from controlplane.contract.revocations import Revocation
from controlplane.history.store import Audit


@dataclass(frozen=True, slots=True)
class CredentialAudit(Audit):
    """`about` has its id and what is told of it."""

    kind: str = ""

    def row(self) -> dict[str, object]:
        return Audit.row(self) | {"kind": self.kind}


def line_of(change: CredentialChange, caller: Caller, unix_s: float, epoch: int) -> CredentialAudit:
    """The token that was shown says who it was; the user and host that kfadmin names stand as the reason."""
    action = Action.REVOKED if change.change is Change.KEY_REVOKED else Action.DONE
    told = f"{change.name}, {change.more}" if change.more else change.name
    about = Revocation(change.id, told, 0, caller.name)
    reason = f"kfadmin of {change.by}" if change.by else ""
    return CredentialAudit(action, about, unix_s, epoch, caller, reason, kind=change.change.value)
