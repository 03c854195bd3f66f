"""What tests of the dashboard share: a browser, and looking at a page."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)
AXE = Path(__file__).parent / "vendor" / "axe.min.js"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        expect.set_options(timeout=30_000)  # how fast a page is, is not what is tested
        # The sandbox of chromium needs privileges that a container often lacks; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser) -> Iterator[Page]:
    """A page that fails its test when anything is said on the console (a violation of its policy, too)."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    said: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            said.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    assert not said, "\n".join(said)


def shoot(page: Page, tmp_path: Path, name: str) -> None:
    """Keep a picture; where KF_SHOTS says, when somebody wants to look at it."""
    folder = Path(os.environ.get("KF_SHOTS", str(tmp_path)))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert (folder / f"{name}.png").stat().st_size > 10_000


def assert_fits(page: Page) -> None:
    """Nothing sticks out to the right."""
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


def assert_accessible(page: Page) -> None:
    """axe-core finds no violation, best practices included."""
    if not page.evaluate("typeof window.axe !== 'undefined'"):
        page.evaluate(AXE.read_text())  # through the debugger: the page's policy lets no script in
    found: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    told = [
        f"{v['id']}: {v['help']}: "
        + "; ".join(f"{n['html'][:120]} ({n['failureSummary']})" for n in v["nodes"][:4])
        for v in found["violations"]
    ]
    assert not told, "\n".join(told)
