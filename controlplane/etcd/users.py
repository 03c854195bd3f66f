"""Users and roles of etcd: who may read and write which keys. A user's name is the common name of its certificate.

While they are not enabled, every certificate that etcd takes opens all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlplane.etcd import wire
from controlplane.etcd.endpoints import Endpoints, Method
from controlplane.etcd.proto import rpc_pb2

ROOT = "root"  # etcd's own role that may do everything, and the user that has to be there


@dataclass(frozen=True, slots=True)
class Permission:
    """On one key, or on all that begin with it. Who may write may read, too."""

    key: str
    prefix: bool = True
    write: bool = False


class Users:
    """Made by `EtcdClient.users`. Methods raise EtcdError; all of them may be repeated."""

    def __init__(self, endpoints: Endpoints, timeout_s: float) -> None:
        self._endpoints = endpoints
        self._timeout_s = timeout_s

    async def users(self) -> set[str]:
        reply = await self._ask("users", lambda at: at.auth.UserList, rpc_pb2.AuthUserListRequest())
        return set(reply.users)

    async def roles(self) -> set[str]:
        reply = await self._ask("roles", lambda at: at.auth.RoleList, rpc_pb2.AuthRoleListRequest())
        return set(reply.roles)

    async def add_role(self, role: str) -> None:
        await self._ask(f"role {role}", lambda at: at.auth.RoleAdd, rpc_pb2.AuthRoleAddRequest(name=role))

    async def grant(self, role: str, permissions: Sequence[Permission]) -> None:
        """Let a role do these as well."""
        for permission in permissions:
            asked = wire.range_request(permission.key, prefix=permission.prefix)
            kind = rpc_pb2.Permission.READWRITE if permission.write else rpc_pb2.Permission.READ
            given = rpc_pb2.Permission(permType=kind, key=asked.key, range_end=asked.range_end)
            request = rpc_pb2.AuthRoleGrantPermissionRequest(name=role, perm=given)
            await self._ask(f"grant {role}", lambda at: at.auth.RoleGrantPermission, request)

    async def add_user(self, user: str, role: str) -> None:
        """Without a password: only a certificate proves who somebody is."""
        options = rpc_pb2.UserAddOptions(no_password=True)
        add = rpc_pb2.AuthUserAddRequest(name=user, options=options)
        await self._ask(f"user {user}", lambda at: at.auth.UserAdd, add)
        await self.give(user, role)

    async def give(self, user: str, role: str) -> None:
        given = rpc_pb2.AuthUserGrantRoleRequest(user=user, role=role)
        await self._ask(f"user {user}", lambda at: at.auth.UserGrantRole, given)

    async def enable(self) -> None:
        """From now on nobody may do anything but what a role of theirs says."""
        await self._ask("enable roles", lambda at: at.auth.AuthEnable, rpc_pb2.AuthEnableRequest())

    async def disable(self) -> None:
        await self._ask("disable roles", lambda at: at.auth.AuthDisable, rpc_pb2.AuthDisableRequest())

    async def _ask(self, what: str, method: Method, request: Any) -> Any:
        return await self._endpoints.call(what, method, request, timeout_s=self._timeout_s, repeatable=False)
