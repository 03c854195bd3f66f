"""etcd as its operator sees it: who leads, its alarm and its passwords (the JSON gateway of its API)."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import httpx

from tests.matrix.hosts import ETCD_PORT

CALL_LIMIT_S = 5.0
LEADER_LIMIT_S = 20.0
POLL_S = 0.05
ROOT = {"name": "root", "password": "matrix"}
GRANTED = ("user/add", "role/add", "user/grant")  # what root needs before a password may be asked for


class EtcdOperator:
    """`addresses`: of each member. Whatever is refused raises httpx.HTTPStatusError."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._urls = {name: f"http://{address}:{ETCD_PORT}/v3" for name, address in addresses.items()}
        self._root_exists = False

    def leader(self) -> str:
        """Raises AssertionError if no member says that it leads."""
        deadline = time.monotonic() + LEADER_LIMIT_S
        while time.monotonic() < deadline:
            for name in self._urls:
                with contextlib.suppress(httpx.TransportError):  # another one may answer
                    said = self._call("maintenance/status", {}, member=name)
                    if said.get("leader") == said["header"]["member_id"]:
                        return name
            time.sleep(POLL_S)
        raise AssertionError("no etcd member leads")

    def alarm(self, on: bool) -> None:
        """What a member does whose database is full; and what its operator does once it has room."""
        member = self._call("maintenance/status", {})["header"]["member_id"]
        action = "ACTIVATE" if on else "DEACTIVATE"
        self._call("maintenance/alarm", {"action": action, "memberID": member, "alarm": "NOSPACE"})

    def password(self, on: bool) -> None:
        """From now on whoever has no password may do nothing."""
        if on:
            for step in () if self._root_exists else GRANTED:
                self._call(
                    f"auth/{step}", {**ROOT, "user": "root", "role": "root"} if step == "user/grant" else ROOT
                )
            self._root_exists = True
            self._call("auth/enable", {})
        else:
            token = self._call("auth/authenticate", ROOT)["token"]
            self._call("auth/disable", {}, token=token)

    def writes(self) -> bool:
        """Whether it takes a write from whoever has no password."""
        key = base64.b64encode(b"/kf-matrix").decode()
        try:
            self._call("kv/put", {"key": key, "value": key})
        except httpx.HTTPStatusError:
            return False
        return True

    def _call(
        self, path: str, body: Mapping[str, Any], *, member: str = "", token: str = ""
    ) -> dict[str, Any]:
        url = self._urls[member or next(iter(self._urls))]
        headers = {"Authorization": token} if token else {}
        answer = httpx.post(
            f"{url}/{path}", json=body, headers=headers, timeout=CALL_LIMIT_S, trust_env=False
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found
