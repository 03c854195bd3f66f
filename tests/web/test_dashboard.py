"""The dashboard in a real browser: what an operator sees, and that it says so when it sees nothing."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, ProcessKind, Target
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.contract.topology import Move, MovePhase
from tests.web.admin_service import TOKEN, MemoryService, healthy, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)

replace = msgspec.structs.replace


def broken() -> ClusterStatus:
    """One node dead and its stage borrowed, one pipeline without a node for a stage, one move under way."""
    status = healthy(instances=3)
    p0, p1, p2 = status.pipelines
    borrowed = replace(
        p0.stages[1], serving=(Member("n5", "aaaa"),), borrowed=True, replicas=(), lag_tokens=-1
    )
    p0 = replace(p0, state=PipelineState.DEGRADED, epoch=14, stages=(p0.stages[0], borrowed, *p0.stages[2:]))
    move = Move(stage=3, to=Member("n3", "bbbb"), phase=MovePhase.COPY, reason="op-7")
    lagging = replace(p1.stages[2], lag_tokens=48)
    p1 = replace(p1, state=PipelineState.MOVING, move=move, stages=(*p1.stages[:2], lagging, p1.stages[3]))
    nobody = replace(p2.stages[0], serving=(), replicas=(), lag_tokens=-1)
    p2 = replace(p2, state=PipelineState.DOWN, running=0, waiting=3, stages=(nobody, *p2.stages[1:]))
    nodes = list(status.nodes)
    nodes[1] = replace(
        nodes[1], state=NodeState.RED, evidence="its report stream broke, n2's link to it broke", serving=()
    )
    nodes[5] = replace(nodes[5], serving=("p1/1", "p0/1"), blocks_used=900, blocks_replica=800)
    nodes[6] = replace(nodes[6], state=NodeState.YELLOW, evidence="silent for 0.8 s", silent_s=0.8)
    nodes[7] = replace(nodes[7], cordoned=True)
    nodes[8] = replace(nodes[8], state=NodeState.ABSENT, evidence="never registered", serving=(), pid=0)
    return replace(status, counter=14, nodes=tuple(nodes), pipelines=(p0, p1, p2))


def events() -> list[Event]:
    now = time.time()
    return [
        Event(EventKind.LEADER, "c1", "c1 leads", now - 90),
        Event(EventKind.JOINED, "n1", "n1 is ready for stage 1", now - 80),
        Event(EventKind.DIED, "n1", "n1 is dead", now - 9, 13, {"silent_s": 0.021, "evidence": "link"}),
        Event(EventKind.EPOCH, "p0", "n5 serves stage 1 for n1", now - 8.9, 14, {"plan_s": 0.012}),
        Event(
            EventKind.RECOVERED,
            "p0",
            "p0 serves again",
            now - 8.6,
            14,
            {"detect_s": 0.021, "connect_s": 0.034, "restore_s": 0.12, "first_token_s": 0.29, "requests": 8},
        ),
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox of chromium needs privileges that a container often lacks; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test when anything is said on the console (a CSP violation too)."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            said.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    assert said == []


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


def test_all_is_well(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    service.history = events()[:2]
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        # No secret in the address bar, nor where scripts could read it.
        assert page.url == f"{url}/"
        assert page.evaluate("document.cookie") == ""
        expect(page.locator(".stage")).to_have_count(8)
        expect(page.locator(".stage").first).to_contain_text("n0")
        expect(page.locator(".stage").first).to_contain_text("replica n4, up to date")
        expect(page.locator(".banner")).to_contain_text("2 of 2 pipelines serve")
        expect(page.locator(".facts")).to_contain_text("c1★ c2")
        expect(page.locator(".events li")).to_have_count(2)
        expect(page.locator(".findings")).to_have_count(0)
        assert_fits(page)
        shoot(page, tmp_path, "well")
        # It is live: what changes is on the page without a reload.
        service.cluster = broken()
        service.history = events()
        expect(page.get_by_role("heading", level=1)).to_have_text("Serving, reduced")
        expect(page.locator(".events li")).to_have_count(5)
        expect(page.locator(".events li").first).to_contain_text("first token 290 ms")
        # The cookie carries a reload.
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Serving, reduced")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_trouble_at_a_glance(page: Page, tmp_path: Path, scheme: str, width: int) -> None:
    service = MemoryService()
    service.cluster = broken()
    service.history = events()
    operation = Operation("op-7", OperationKind.DRAIN, "n7", message="copies p1", created_unix_s=time.time())
    service.known = {operation.id: operation}
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900})
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        findings = page.locator(".findings li")
        expect(findings.first).to_have_text("p2 is down: nobody serves stage 0.")
        text = page.locator(".findings").inner_text()
        assert "n1 is dead: its report stream broke" in text
        assert "p0 stage 1 is served by borrowed n5." in text
        assert "p1 moves stage 3 to n3 (copy; op-7)." in text
        assert "n7 is cordoned." in text
        expect(page.locator(".stage.borrowed")).to_have_count(1)
        expect(page.locator(".stage.borrowed")).to_contain_text("unprotected")
        expect(page.locator(".stage.down .who")).to_have_text("down")
        expect(page.locator(".pipeline.moving")).to_contain_text("48 tokens behind")
        expect(page.locator(".node.red")).to_contain_text("dead")
        expect(page.locator(".operations")).to_contain_text("drain n7")
        expect(page).to_have_title("Serving, reduced - KevlarFlow")
        assert_fits(page)
        shoot(page, tmp_path, f"trouble-{scheme}-{width}")


def test_a_pause_a_cordon_and_how_far_a_restart_is(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    nodes = healthy().nodes
    dead = replace(nodes[1], state=NodeState.RED, evidence="its report stream broke")
    p0, p1 = healthy().pipelines
    service.cluster = replace(
        healthy(),
        paused=True,
        nodes=(nodes[0], dead, replace(nodes[2], cordoned=True), *nodes[3:]),
        pipelines=(replace(p0, state=PipelineState.DOWN), p1),
    )
    targets = tuple(Target(ProcessKind.NODE, Member(f"n{k}", "aaaa")) for k in range(8))
    restart = Operation(
        "op-9", OperationKind.RESTART, "nodes", targets=targets, turn=5, message="6 of 8, n5: moving"
    )
    service.known = {restart.id: replace(restart, created_unix_s=time.time())}
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        findings = page.locator(".findings")
        expect(findings).to_contain_text(
            "Automation is paused: nothing is repaired or moved until it is resumed."
        )
        # The topology still names the dead node, since nobody may change it; it serves nothing.
        expect(findings).to_contain_text("p0 is down: nobody serves stage 1.")
        expect(page.locator(".stage.down")).to_contain_text("home is n1")
        expect(page.locator(".facts")).to_contain_text("paused")
        expect(page.locator(".node", has_text="n2").first).to_contain_text("cordoned")
        expect(page.locator(".node", has_text="n5").locator(".tag.running")).to_have_text("restart")
        expect(page.locator(".node .tag.running")).to_have_count(1)
        expect(page.locator(".operations progress")).to_have_attribute("value", "5")
        expect(page.locator(".operations")).to_contain_text("6 of 8, n5: moving")
        assert_fits(page)
        shoot(page, tmp_path, "paused")
        service.known = {}
        service.cluster = healthy()
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")


def test_no_leader_and_a_silent_etcd(page: Page) -> None:
    service = MemoryService()
    service.cluster = replace(healthy(), leader="", etcd_age_s=42.0)
    service.history_away = True
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.locator(".findings")).to_contain_text("No controller leads: streams go on")
        expect(page.locator(".findings")).to_contain_text("etcd has been silent for 42.0 s")
        expect(page.locator(".problem")).to_contain_text("the history database is away")
        service.cluster = replace(healthy(), available=False)
        expect(page.get_by_role("heading", level=1)).to_have_text("Unavailable")


def test_a_lost_controller_is_said_and_found_again(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serving(service, port) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
    lost = page.locator(".lost")
    expect(lost).to_contain_text("Connection to controller c1 lost.")
    expect(lost.get_by_role("link")).to_have_attribute("href", "http://127.0.0.1:8101/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Last known: All is well")
    expect(page).to_have_title("Connection lost - KevlarFlow")
    shoot(page, tmp_path, "lost")
    with serving(service, port):
        expect(lost).to_have_count(0)
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")


def test_signing_in_by_hand(page: Page, tmp_path: Path) -> None:
    with serving(MemoryService()) as url:
        page.goto(url)
        page.get_by_label("Admin token").fill("not it")
        shoot(page, tmp_path, "signin")
        page.get_by_role("button").click()
        expect(page.get_by_role("alert")).to_have_text("This token is not the cluster's.")
        page.get_by_label("Admin token").fill(TOKEN)
        page.get_by_role("button").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        assert TOKEN not in page.url


def test_what_nodes_say_is_text_and_never_markup(page: Page) -> None:
    service = MemoryService()
    evil = "<img src=x onerror=document.title=1>"
    service.history = [Event(EventKind.DIED, evil, evil, time.time(), 1, {evil: evil})]
    nodes = healthy().nodes
    service.cluster = replace(healthy(), nodes=(replace(nodes[0], evidence=evil), *nodes[1:]))
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.locator(".events")).to_contain_text(evil)
        assert page.locator("img").count() == 0


KEYED = """async ([dead]) => {
  const { Page } = await import("/ui/view.js");
  const status = await (await fetch("/admin/v1/status")).json();
  const keyed = (nodes) => {
    const found = new Map();
    const walk = (view) => {
      if (Array.isArray(view)) return view.forEach(walk);
      if (!view?.props) return;
      if (view.key) found.set(view.key, view);
      walk(view.props.children);
    };
    walk(Page({ status: { ...status, nodes }, events: [], link: { state: "up" } }));
    return found;
  };
  const kill = (node) => (node.node === dead ? { ...node, state: "red" } : node);
  const [before, same, after] = [status.nodes, status.nodes, status.nodes.map(kill)].map(keyed);
  const differ = (a, b) => [...a.keys()].filter((key) => a.get(key) !== b.get(key) && b.has(key)).sort();
  return [before.size, differ(before, same), differ(before, after)];
}"""


def test_what_has_not_changed_is_not_drawn_again(page: Page) -> None:
    with serving(MemoryService()) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        # Two pipelines and eight nodes; of p0 a node is shown as dead.
        assert page.evaluate(KEYED, ["n1"]) == [10, [], ["n1", "p0"]]


def test_a_thousand_nodes_stay_usable(page: Page) -> None:
    """One change among a thousand nodes is on the page, and the others are not sent or drawn again."""
    service = MemoryService()
    service.cluster = healthy(250, 4)
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.locator(".node")).to_have_count(1000)
        expect(page.locator(".node.red")).to_have_count(0)
        nodes = service.cluster.nodes
        dead = replace(nodes[500], state=NodeState.RED, evidence="its report stream broke")
        service.cluster = replace(service.cluster, nodes=(*nodes[:500], dead, *nodes[501:]))
        expect(page.locator(".node.red")).to_have_count(1)
        expect(page.locator(".node.red")).to_contain_text(dead.node)
        service.cluster = replace(service.cluster, nodes=nodes)
        expect(page.locator(".node.red")).to_have_count(0)
