"""The life of a request, searched on the dashboard: for operators."""

from __future__ import annotations

import time
from pathlib import Path

from playwright.sync_api import Page, expect

from controlplane.contract.auth import Role, mint
from controlplane.contract.lives import Life, Pause, Place
from tests.web.admin_service import TOKEN, MemoryService, serving
from tests.web.dashboards import NEEDS_CHROMIUM, assert_accessible, assert_fits, shoot

pytestmark = NEEDS_CHROMIUM
CAUSE = "failure of p0, epoch 12 -> 13: stage 1: n1 -> n5"
LIFE = Life(
    "abc", "g1", "chat", "alice", "m", True, False, 1, 7, 1.7e9, 0.002, 0.05, 3.0, 64, 200, "length",
    (Place(0.002, 0, "p0", "n0", 12),), (Pause(1.5, 0.4, 0, "continued", "p0", 13, CAUSE),), 0, 0.4,
)  # fmt: skip


def test_the_life_of_a_request(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    service.lived = [LIFE]
    with serving(service) as url:
        page.goto(f"{url}/#token={mint(TOKEN, 'alice', Role.OPERATOR, int(time.time()) + 600)}")
        found = page.get_by_role("region", name="One request")
        found.get_by_label("Id, as in its answer").fill("chatcmpl-abc")
        page.keyboard.press("Enter")
        rows = found.locator(".events li")
        expect(rows).to_have_count(5)
        for row, words in enumerate(
            ("admitted", "the scheduler on n0, epoch 12", "first token", CAUSE, "HTTP 200")
        ):
            expect(rows.nth(row)).to_contain_text(words)
        expect(found).to_contain_text("No answer from g2")
        assert_accessible(page)
        shoot(page, tmp_path, "life")
        page.set_viewport_size({"width": 380, "height": 800})
        assert_fits(page)
        found.get_by_label("Id, as in its answer").fill("nobody")
        found.get_by_role("button", name="Find").click()
        expect(found).to_contain_text("No gateway remembers a request nobody")


def test_viewers_are_not_asked(page: Page) -> None:
    service = MemoryService()
    with serving(service) as url:
        page.goto(f"{url}/#token={mint(TOKEN, 'bob', Role.VIEWER, int(time.time()) + 600)}")
        expect(page.get_by_role("gridcell", name="p0 stage 0: n0")).to_have_count(1)
        expect(page.get_by_role("region", name="One request")).to_have_count(0)
