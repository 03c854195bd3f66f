"""The dashboard on a real cluster: a kill is seen live as an incident, and a drain by button moves real streams."""

from __future__ import annotations

import asyncio

from playwright.async_api import Page, async_playwright, expect

from controlplane.contract.status import ClusterStatus
from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.web.dashboards import CHROMIUM, NEEDS_CHROMIUM

pytestmark = NEEDS_CHROMIUM

LIMIT_MS = 60_000
STREAMS, TOKENS = 4, 160


def test_a_kill_and_a_drain_as_an_operator_sees_them(home: Cluster) -> None:
    async def body() -> None:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = await browser.new_page()
            said: list[str] = []
            page.on("pageerror", lambda error: said.append(str(error)))
            expect.set_options(timeout=LIMIT_MS)
            await page.goto(f"{home.local.endpoints.admin[0]}/#token={home.local.admin_token}")
            await expect(page.locator(".stage")).to_have_count(8)
            await kill(home, page)
            await home.wait_all_home()
            await drain(home, page)
            await expect(page.locator(".chart canvas")).to_have_count(6)
            assert said == []
            await browser.close()

    asyncio.run(body())


async def kill(cluster: Cluster, page: Page) -> None:
    """Every token is right, and the page tells of the failure: phases, what was chosen, streams."""

    async def act(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) > 16 for stream in streams), "all streams are under way")
        already = await page.locator(".incident", has_text="n5 failed").count()
        cluster.kill("n5")
        incidents = page.locator(".incident", has_text="n5 failed")
        await expect(incidents).to_have_count(already + 1)
        incident = incidents.first  # the newest one
        await expect(incident).to_contain_text("serves again after")
        await expect(incident).to_contain_text("n5 -> n1")
        phases = await incident.get_by_role("img").get_attribute("aria-label")
        assert phases is not None
        assert [part.split()[0] for part in phases.split(", ")][:4] == [
            "detect",
            "plan",
            "connect",
            "restore",
        ]

    prompts = sample_prompts(STREAMS, TOKENS)
    await cluster.expect_equal(await while_streaming(cluster, prompts, act))


async def drain(cluster: Cluster, page: Page) -> None:
    def emptied(status: ClusterStatus) -> bool:
        node = next(node for node in status.nodes if node.node == "n2")
        return node.cordoned and not node.serving

    async def act(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) > 16 for stream in streams), "all streams are under way")
        await page.get_by_role("gridcell", name="p0 stage 2: n2").click()
        for verb, button in (("drain", "Drain n2"), ("undrain", "Undrain n2")):
            await page.get_by_role("button", name=button, exact=True).click()
            dialog = page.get_by_role("dialog", name=button)
            await expect(dialog.locator(".checks .ok").first).to_be_visible()
            await dialog.get_by_role("button", name=button).click()
            await expect(dialog).to_have_count(0)
            done = page.locator(".operations li", has_text=f"{verb} n2").first
            await expect(done.locator(".tag.done")).to_be_visible()
            if verb == "drain":
                await cluster.wait_for(emptied, "n2 serves nothing")
                page_says = page.locator(".findings")
                await expect(page_says).to_contain_text("n2 is cordoned.")

    prompts = sample_prompts(STREAMS, TOKENS * 3, first_seed=40)
    await cluster.expect_equal(await while_streaming(cluster, prompts, act))
