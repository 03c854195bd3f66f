"""What was revoked at one controller is refused by all of them, also by those that start later."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from controlplane.contract.auth import Role, derive, mint
from controlplane.contract.keys import decode
from controlplane.contract.revocations import Revocation, token_id
from tests.io.controllers import Cluster, scenario, until
from web.admin.auth import COOKIE

KNOWN_LIMIT_S = 15.0  # etcd tells within milliseconds; of a machine that has much else to do


async def address(cluster: Cluster, controller: str) -> str:
    return f"http://{(await cluster.records())[controller].admin_address}"


async def status_of(cluster: Cluster, controller: str, headers: dict[str, str]) -> int:
    url = f"{await address(cluster, controller)}/admin/v1/status"
    return (await cluster.http.get(url, headers=headers)).status_code


async def sign_in(cluster: Cluster, controller: str, token: str) -> dict[str, str]:
    answer = await cluster.http.post(f"{await address(cluster, controller)}/session", json={"token": token})
    assert answer.status_code == 204
    cookie = answer.cookies[COOKIE]
    cluster.http.cookies.clear()
    return {"cookie": f"{COOKIE}={cookie}"}


@pytest.mark.timeout(180)
def test_what_is_revoked_at_one_controller_is_refused_at_the_others(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        admin = derive(cluster.secret, "admin")
        token = mint(admin, "alice", Role.VIEWER, int(time.time()) + 3600)
        bearer = {"authorization": f"Bearer {token}"}
        left, kept = [await sign_in(cluster, "c1", admin) for _ in range(2)]
        of_token = await sign_in(cluster, "c2", token)
        for headers in (left, kept, of_token, bearer):
            for controller in ("c1", "c2"):
                assert await status_of(cluster, controller, headers) == 200

        first = await address(cluster, "c1")
        page = {"origin": first, "sec-fetch-site": "same-origin"}
        assert (await cluster.http.delete(f"{first}/session", headers=left | page)).status_code == 204
        assert await status_of(cluster, "c1", left) == 401  # at once

        async def refused(headers: dict[str, str]) -> bool:
            return await status_of(cluster, "c2", headers) == 401

        await until(lambda: refused(left), KNOWN_LIMIT_S, "c2 knows who has signed out", cluster)
        answer = await cluster.ask("c1", "POST", "/admin/v1/revocations", json={"token": token})
        assert answer.status_code == 200
        for headers in (bearer, of_token):
            await until(
                lambda headers=headers: refused(headers), KNOWN_LIMIT_S, "c2 knows the token", cluster
            )
        assert await status_of(cluster, "c2", kept) == 200

        # In etcd: leased, without anything that signs a request.
        key = cluster.keys.revoked(token_id(token))
        found = await cluster.client.get(key)
        assert found is not None
        assert found.lease
        assert decode(found.value, Revocation, key).name == "alice"
        assert token.rpartition(".")[2].encode() not in found.value

        # Those that were told end; one that starts afterwards knows it as soon as it answers at all.
        for process in cluster.controllers.values():
            process.kill()
            process.wait(10)
        cluster.controllers.clear()
        cluster.start_controller("c3")
        seen: list[int] = []

        async def answers() -> bool:
            try:
                seen.append(await status_of(cluster, "c3", left))
            except (httpx.HTTPError, KeyError):
                return False
            return seen[-1] == 401

        await until(answers, KNOWN_LIMIT_S + 30, "c3 refuses it", cluster)
        assert set(seen) <= {401, 503}
        assert await status_of(cluster, "c3", of_token) == 401
        assert await status_of(cluster, "c3", kept) == 200

    scenario(tmp_path, body, controllers=2)


@pytest.mark.timeout(120)
def test_nobody_is_told_to_be_signed_out_while_etcd_is_away(tmp_path: Path) -> None:
    async def body(cluster: Cluster) -> None:
        admin = derive(cluster.secret, "admin")
        session = await sign_in(cluster, "c1", admin)
        first = await address(cluster, "c1")
        page = {"origin": first, "sec-fetch-site": "same-origin"}
        cluster.etcd.pause()
        try:
            url = f"{first}/session"
            answer = await cluster.http.delete(url, headers=session | page, timeout=KNOWN_LIMIT_S)
        finally:
            cluster.etcd.resume()
        assert (answer.status_code, "ask again" in answer.text) == (503, True)
        assert "set-cookie" not in answer.headers  # the browser keeps what it has to ask again with

    scenario(tmp_path, body, controllers=1)
