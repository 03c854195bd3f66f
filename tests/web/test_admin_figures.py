"""What the admin API tells for charts and incidents, and to whom it says who they are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from controlplane.contract.auth import Role, mint
from controlplane.contract.figures import Figures
from tests.web.admin_service import TOKEN, MemoryService, serving
from tests.web.histories import events, figures

BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def service() -> MemoryService:
    return MemoryService()


@pytest.fixture
def client(service: MemoryService) -> Iterator[httpx.Client]:
    with (
        serving(service) as url,
        httpx.Client(base_url=url, timeout=30, headers=BEARER, verify=False) as client,
    ):
        yield client


def stream(client: httpx.Client) -> Iterator[tuple[str, Any]]:
    with client.stream("GET", "/admin/v1/stream") as answer:
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_figures_as_columns_and_rows(client: httpx.Client, service: MemoryService) -> None:
    service.measured = figures(rows=100, every_s=10.0)
    told = client.get("/admin/v1/figures").json()
    assert told["columns"] == list(Figures.__struct_fields__)
    assert len(told["rows"]) == 100
    assert dict(zip(told["columns"], told["rows"][0], strict=True))["first_token_p99_s"] == 0.21
    assert len(client.get("/admin/v1/figures?seconds=605").json()["rows"]) in {59, 60}
    for query in ("seconds=59", "seconds=86401", "rows=0", "rows=2001", "seconds=x"):
        answer = client.get(f"/admin/v1/figures?{query}")
        assert answer.status_code == 400
        assert query.partition("=")[0] in answer.json()["error"]["message"]


def test_the_stream_brings_figures_once_and_incidents_when_they_change(
    client: httpx.Client, service: MemoryService
) -> None:
    service.measured = figures(rows=3)
    service.history = events()[:3]
    rows: list[list[Any]] = []
    incidents: list[list[Any]] = []
    for name, data in stream(client):
        if name == "figures":
            rows += data["rows"]
            if len(rows) == 3:
                service.measured = [*service.measured, Figures(service.measured[-1].unix_s + 5)]
        if name == "incidents":
            incidents.append(data)
            service.history = events()
        if len(rows) == 4 and len(incidents) == 2:
            break
    assert [row[0] for row in rows] == [one.unix_s for one in service.measured]
    assert [(one[0]["node"], len(one[0]["affected"])) for one in incidents] == [("n1", 0), ("n1", 1)]
    assert incidents[1][0]["affected"][0]["streams"] == 8


def test_who_asks(client: httpx.Client) -> None:
    assert client.get("/session").json() == {"name": "admin", "role": "admin", "expiry_unix_s": 0}
    until = int(time.time()) + 60
    headers = {"authorization": f"Bearer {mint(TOKEN, 'vera', Role.VIEWER, until)}"}
    told = client.get("/session", headers=headers).json()
    assert told == {"name": "vera", "role": "viewer", "expiry_unix_s": until}
