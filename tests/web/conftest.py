"""One browser for all tests of the dashboard, an admin API with a service in memory; only who has one imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx
    from playwright.sync_api import Browser, Page

    from tests.web.admin_service import MemoryService


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.web.dashboards import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    from tests.web.dashboards import opened

    with opened(browser) as page:
        yield page


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, MemoryService]]:
    from tests.web.admin_service import MemoryService, serving

    service = MemoryService()
    with serving(service) as url:
        yield url, service


@pytest.fixture
def service(server: tuple[str, MemoryService]) -> MemoryService:
    server[1].reset()
    return server[1]


@pytest.fixture
def client(server: tuple[str, MemoryService], service: MemoryService) -> Iterator[httpx.Client]:
    import httpx

    with httpx.Client(base_url=server[0], timeout=5, verify=False) as client:
        yield client
