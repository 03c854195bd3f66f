"""Signing in with a provider, as people do it: in a real browser, by way of another site."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.web.admin_service import TOKEN, MemoryService, serving
from tests.web.dashboards import NEEDS_CHROMIUM, assert_accessible, assert_fits, shoot
from tests.web.oidc_provider import provider
from tests.web.test_oidc import signing_in

pytestmark = NEEDS_CHROMIUM


def test_in_by_the_provider_and_out_again(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    # Another site than the dashboard's 127.0.0.1: cookies of SameSite=Strict do not come along from it.
    with provider("localhost") as corp, serving(service, provider=signing_in(corp)) as url:
        page.goto(url)
        page.get_by_role("link", name="Sign in with corp").focus()
        assert_accessible(page)
        assert_fits(page)
        shoot(page, tmp_path, "sign-in")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Continue as alice").click()
        expect(page.locator(".facts")).to_contain_text("corp:alice, operator")
        assert page.url == f"{url}/"
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("gridcell", name="p0 stage 2: n2").click()
        page.get_by_role("button", name="Drain n2").click()
        page.get_by_role("dialog", name="Drain n2").get_by_role("button", name="Drain n2").click()
        expect(page.locator(".operations")).to_contain_text("drain n2")
        assert service.callers[-1].name == "corp:alice"
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("link", name="Sign in with corp")).to_be_visible()
        assert page.evaluate("fetch('/admin/v1/status').then((answer) => answer.status)") == 401

        corp.claims = {"groups": ["everybody"]}
        page.get_by_role("link", name="Sign in with corp").click()
        page.get_by_role("link", name="Continue as alice").click()
        expect(page.get_by_role("alert")).to_contain_text(
            "none of your groups or roles there gives you access"
        )
        assert_accessible(page)
        shoot(page, tmp_path, "not-signed-in")
        page.get_by_role("link", name="Back to the dashboard").click()
        page.get_by_label("Admin token").fill(TOKEN)
        page.get_by_role("button", name="Open the dashboard").click()
        expect(page.locator(".facts")).to_contain_text("admin, admin")
