"""The pictures of the README, from a real cluster: `python -m tests.web.pictures [FOLDER]` (default: docs/pictures).

Starts the demo cluster, puts streams on it, and kills a node with SIGKILL while a browser looks on. The pictures, light
and dark, are taken as soon as the incident is over; then every token is checked against an undisturbed run.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright, expect

from controlplane.kfadmin.loadgen import Stream, sample_prompts
from tests.e2e.cluster import Cluster, until, while_streaming
from tests.web.dashboards import CHROMIUM

WIDTH, HEIGHT = 1080, 960
BYTES_MAX = 150_000
STREAMS, TOKENS = 8, 384
VICTIM = "n5"
WARM_ROWS = 8  # of figures, before anything happens
PATIENCE_MS = 120_000


async def open_page(browser: Browser, cluster: Cluster, scheme: str) -> Page:
    context = await browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = await context.new_page()
    await page.goto(f"{cluster.local.endpoints.admin[0]}/#token={cluster.local.admin_token}")
    await expect(page.get_by_role("heading", level=1)).to_be_visible()
    return page


async def load(cluster: Cluster, stop: asyncio.Event) -> None:
    """Requests one after the other, so that charts have something to show."""
    prompts = sample_prompts(STREAMS, 96, words=48)  # so long that prefixes are cached
    while not stop.is_set():
        await cluster.generator.streams(prompts)


async def make(folder: Path) -> None:
    with Cluster(controllers=2, progress=print) as cluster:
        await cluster.wait_all_home()
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            pages = {scheme: await open_page(browser, cluster, scheme) for scheme in ("light", "dark")}
            await charts(cluster, pages["light"])
            await failure(cluster, pages, folder)
            await browser.close()


async def charts(cluster: Cluster, page: Page) -> None:
    """Load until there are figures to show."""
    stop = asyncio.Event()
    loading = asyncio.create_task(load(cluster, stop))
    rows = "async () => (await (await fetch('/admin/v1/figures')).json()).rows.length"
    try:
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while await page.evaluate(rows) < WARM_ROWS:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
    finally:
        stop.set()
        await loading


async def failure(cluster: Cluster, pages: dict[str, Page], folder: Path) -> None:
    """Kill a node under streams; take a picture as soon as every page shows the incident as over."""
    prompts = sample_prompts(STREAMS, TOKENS)
    await cluster.references(prompts)

    async def act(streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) > 16 for stream in streams), "all streams are under way")
        # Its launcher would have a fresh process there before the picture is taken.
        cluster.local.hold(VICTIM)
        cluster.kill(VICTIM)
        for page in pages.values():
            shown = page.locator(".incident", has_text=f"{VICTIM} failed")
            await expect(shown).to_contain_text("serves again after", timeout=PATIENCE_MS)
            await expect(page.locator(".stage.borrowed")).to_be_visible(timeout=PATIENCE_MS)
        for scheme, page in pages.items():
            path = folder / f"failover-{scheme}.png"
            size = len(await page.screenshot(path=path))
            print(f"{path}: {size} bytes")
            assert size <= BYTES_MAX, f"larger than {BYTES_MAX} bytes"

    await cluster.expect_equal(await while_streaming(cluster, prompts, act))
    print(f"{STREAMS} streams: every token as without the failure")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(make(folder))


if __name__ == "__main__":
    main()
