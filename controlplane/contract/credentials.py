"""What kfadmin has done to API keys and tokens: on a host, where no controller sees it, so that it tells one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

Shown = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]


class Change(StrEnum):
    """As the audit calls it."""

    KEY_CREATED = "create-key"
    KEY_REVOKED = "revoke-key"
    TOKEN_CREATED = "create-token"


class CredentialChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /admin/v1/credentials. Nothing in it lets anybody in."""

    change: Change
    id: Annotated[str, Meta(pattern=r"^[a-z0-9]{1,64}$")]  # of the key's record, or `token_id`
    name: Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
    by: Shown = ""  # who ran kfadmin, and where, as it says: USER@HOST
    more: Shown = ""  # a role, an owner
