"""The dashboard in a real browser: what an operator sees, and that it says so when it sees nothing."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from controlplane.contract.events import Event, EventKind
from controlplane.contract.ids import Member
from controlplane.contract.records import Operation, OperationKind, ProcessKind, Target
from controlplane.contract.status import NodeState, PipelineState
from tests.web.admin_service import TOKEN, MemoryService, healthy, serving
from tests.web.dashboards import NEEDS_CHROMIUM, assert_accessible, assert_fits, shoot
from tests.web.histories import broken, events, figures, replace

pytestmark = NEEDS_CHROMIUM


def test_all_is_well(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    service.history = events()[:2]
    service.measured = figures()
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        # No secret in the address bar, nor where scripts could read it.
        assert page.url == f"{url}/"
        assert page.evaluate("document.cookie") == ""
        expect(page.locator(".stage")).to_have_count(8)
        expect(page.get_by_role("gridcell").first).to_have_accessible_name(
            "p0 stage 0: n0, replica n4, up to date"
        )
        expect(page.locator(".banner")).to_contain_text("2 of 2 pipelines serve")
        expect(page.locator(".facts")).to_contain_text("c1★ c2")
        expect(page.locator(".facts")).to_contain_text("3 of 3 etcd members are healthy")
        expect(page.locator(".facts")).to_contain_text("admin, admin")
        expect(page.get_by_role("region", name="Incidents")).to_contain_text("No failure in the history.")
        expect(page.locator(".chart canvas")).to_have_count(6)
        expect(page.locator(".findings")).to_have_count(0)
        assert_fits(page)
        assert_accessible(page)
        shoot(page, tmp_path, "well")
        # It is live: what changes is on the page without a reload.
        service.cluster = broken()
        service.history = events()
        expect(page.get_by_role("heading", level=1)).to_have_text("Serving, reduced")
        page.get_by_text("All events").click()
        expect(page.locator(".events li")).to_have_count(5)
        expect(page.locator(".events li").first).to_contain_text("first token 290 ms")
        # The cookie carries a reload.
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Serving, reduced")


def test_a_failure_is_one_row_with_its_phases_as_it_happens(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    told = events(ago_s=0.0)
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_text("No failure in the history.")).to_be_visible()
        service.history = told[:3]
        incident = page.locator(".incident")
        expect(incident).to_have_count(1)
        expect(incident).to_contain_text("n1 failed")
        service.history = told[:4]
        expect(incident).to_contain_text("recovering p0")
        expect(incident).to_contain_text("stage 1: n1 -> n5")
        bar = incident.get_by_role("img")
        expect(bar).to_have_attribute("aria-label", "detect 21 ms, plan 12 ms")
        service.history = told
        expect(incident).to_contain_text("serves again after")
        expect(incident).to_contain_text("8 streams touched")
        expect(incident).to_contain_text("57 tokens computed again")
        words = "detect 21 ms, plan 12 ms, connect 34 ms, restore 120 ms, first token 290 ms; in all 477 ms"
        expect(bar).to_have_attribute("aria-label", words)
        # The bar is to scale: the first token took more than twice as long as the restore.
        widths = incident.locator(".phases i").evaluate_all("all => all.map((one) => one.clientWidth)")
        assert len(widths) == 5
        assert 2.0 < widths[4] / widths[3] < 2.8
        assert_accessible(page)
        shoot(page, tmp_path, "incident")
        # The history outlives the cluster: another page on an empty cluster shows it as well.
        service.cluster = replace(healthy(), nodes=(), pipelines=(), available=False)
        page.reload()
        expect(page.locator(".incident")).to_contain_text("n1 failed")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_trouble_at_a_glance(page: Page, tmp_path: Path, scheme: str, width: int) -> None:
    service = MemoryService()
    service.cluster = broken()
    service.history = events()
    service.measured = figures()
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
        expect(page.locator(".stage.borrowed")).to_contain_text("no copy")
        expect(page.locator(".stage.borrowed")).to_contain_text("home is n1")
        expect(page.locator(".stage.down .who")).to_have_text("down")
        expect(page.locator(".row.moving")).to_contain_text("n10 −48")
        expect(page.get_by_role("button", name="n1 dead")).to_be_visible()
        expect(page.locator(".operations")).to_contain_text("drain n7")
        expect(page).to_have_title("Serving, reduced - KevlarFlow")
        page.get_by_role("button", name="n1 dead").click()
        expect(page.get_by_role("region", name="Node n1")).to_contain_text("its report stream broke")
        assert_fits(page)
        assert_accessible(page)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(16, 19, 24)") == (scheme == "dark")
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
        expect(page.locator(".stage", has_text="n2").first).to_contain_text("cordoned")
        page.get_by_role("gridcell", name="p1 stage 1: n5").click()
        expect(page.locator(".node .tag.running")).to_have_text("restart")
        expect(page.locator(".operations progress")).to_have_attribute("value", "5")
        expect(page.locator(".operations")).to_contain_text("6 of 8, n5: moving")
        assert_fits(page)
        assert_accessible(page)
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
        expect(page.locator(".facts")).to_contain_text("etcd silent for 42.0 s")
        expect(page.locator(".problem")).to_contain_text("the history database is away")
        service.cluster = replace(healthy(), available=False)
        expect(page.get_by_role("heading", level=1)).to_have_text("Unavailable")


def test_what_is_mixed_is_said(page: Page) -> None:
    service = MemoryService()
    nodes = [replace(node, version="1.0+aaaa", numerics="x") for node in healthy().nodes]
    nodes[5] = replace(nodes[5], version="1.1+bbbb", numerics="y")
    service.cluster = replace(healthy(), nodes=tuple(nodes), troubles=("c1: its clock is off",))
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        findings = page.locator(".findings")
        expect(findings).to_contain_text(
            "Versions are mixed: 1.0+aaaa in n0, n1, n2, n3, n4, n6, n7; 1.1+bbbb in n5."
        )
        expect(findings).to_contain_text("Numerics are mixed in stage 1: x in n1; y in n5.")
        expect(findings).to_contain_text("c1: its clock is off")
        expect(page.get_by_role("heading", level=1)).to_have_text("Serving, degraded")


def test_figures_of_the_last_hour_and_of_the_last_day(page: Page) -> None:
    service = MemoryService()
    service.measured = figures(rows=60)
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        charts = page.locator(".chart")
        expect(charts).to_have_count(6)
        expect(charts.nth(0)).to_contain_text("p50 81 ms")
        expect(charts.nth(0)).to_contain_text("p99 210 ms")
        expect(charts.nth(2)).to_contain_text("830")
        expect(charts.nth(3)).to_contain_text("waiting 2")
        expect(charts.nth(4)).to_contain_text("requests 19 %")
        expect(charts.nth(5)).to_contain_text("31 %")
        drawn = """all => all.map((canvas) => {
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return data.some((value) => value !== 0);
        })"""
        assert page.locator(".chart canvas").evaluate_all(drawn) == [True] * 6
        # A new row is drawn as it comes; what nobody measured is not a zero.
        newest = service.measured[-1]
        row = replace(newest, unix_s=newest.unix_s + 5, tokens_per_s=None, running=99)
        service.measured = [*service.measured, row]
        expect(charts.nth(3)).to_contain_text("running 99")
        expect(charts.nth(2)).to_contain_text("to clients –")
        service.measured = [replace(row, running=3)]
        page.get_by_label("last day").check()
        expect(charts.nth(3)).to_contain_text("running 3")


def test_a_lost_controller_is_said_and_found_again(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serving(service, port) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
    lost = page.locator(".lost")
    expect(lost).to_contain_text("Connection to controller c1 lost.")
    expect(lost.get_by_role("link")).to_have_attribute("href", "//127.0.0.1:8101/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Last known: All is well")
    expect(page).to_have_title("Connection lost - KevlarFlow")
    shoot(page, tmp_path, "lost")
    with serving(service, port):
        expect(lost).to_have_count(0)
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")


def test_what_the_page_says_at_first_goes_also_where_its_first_frame_comes_after_the_status(
    page: Page,
) -> None:
    """As in a tab in the background."""
    page.add_init_script("""
        const frames = [];
        let held = true;
        const request = window.requestAnimationFrame.bind(window);
        window.requestAnimationFrame = (frame) => (held ? frames.push(frame) : request(frame));
        window.EventSource = class extends EventSource {
          constructor(url) {
            super(url);
            this.addEventListener("status", () => setTimeout(() => {
              held = false;
              frames.splice(0).forEach(request);
            }));
          }
        };
    """)
    with serving(MemoryService()) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        expect(page.get_by_role("main")).to_have_count(1)
        expect(page.locator("body")).not_to_contain_text("Connecting")


def test_signing_in_by_hand(page: Page, tmp_path: Path) -> None:
    with serving(MemoryService()) as url:
        page.goto(url)
        page.get_by_label("Admin token").fill("not it")
        assert_accessible(page)
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
        expect(page.locator(".incident")).to_contain_text(evil)
        page.locator(".stage").first.click()
        expect(page.locator(".node .evidence")).to_have_text(evil)
        expect(page.locator(".events")).to_contain_text(evil)
        assert page.locator("img").count() == 0


CHANGES = """() => {
  window.touched = new Set();
  const watch = new MutationObserver((all) => all.forEach((one) => {
    const element = one.target.nodeType === 1 ? one.target : one.target.parentElement;
    const row = element?.closest(".row");
    if (row) touched.add(row.getAttribute("aria-rowindex"));
  }));
  const all = {subtree: true, childList: true, characterData: true, attributes: true};
  watch.observe(document.querySelector(".grid"), all);
}"""
PAINTED = """async () => {
  return [document.querySelectorAll(".stage").length, document.querySelectorAll(".grid *").length];
}"""


def test_a_thousand_nodes_stay_usable(page: Page) -> None:
    """One change among a thousand nodes is on the page, and no other row is touched."""
    service = MemoryService()
    service.cluster = healthy(250, 4)
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.locator(".stage")).to_have_count(1000)
        # The page is bounded: nine elements for a node, its share of the row included, and rows out of sight are not
        # laid out.
        cells, elements = page.evaluate(PAINTED)
        assert elements < 10 * cells
        far = page.locator(".row").nth(200)
        assert far.evaluate("row => getComputedStyle(row).contentVisibility") == "auto"
        # What is in sight is found out with a frame.
        hidden = "cell => !cell.checkVisibility({contentVisibilityAuto: true})"
        deadline = time.monotonic() + 30
        while not far.locator(".who").first.evaluate(hidden):
            assert time.monotonic() < deadline, "a row out of sight is laid out"
        page.evaluate(CHANGES)
        nodes = service.cluster.nodes
        dead = replace(nodes[500], state=NodeState.RED, evidence="its report stream broke")
        service.cluster = replace(service.cluster, nodes=(*nodes[:500], dead, *nodes[501:]))
        expect(page.locator(".stage.down")).to_have_count(1)
        assert page.evaluate("[...touched]") == ["127"]  # the heading is the first row, p0 the second one
        # Nor when the whole comes again, as it does to one that reads slowly: with another list of nodes, say.
        spare = replace(nodes[0], node="n9999", serving=())
        service.cluster = replace(service.cluster, nodes=(*service.cluster.nodes, spare))
        expect(page.get_by_role("button", name="n9999")).to_be_visible()
        assert page.evaluate("[...touched]") == ["127"]
        # Many findings do not push everything else off the page.
        hung = tuple(replace(node, state=NodeState.YELLOW, evidence="silent") for node in nodes[:400])
        service.cluster = replace(service.cluster, nodes=(*hung, *service.cluster.nodes[400:]))
        expect(page.locator(".findings li")).to_have_count(13)
        expect(page.locator(".findings li").first).to_contain_text("n500 is dead")
        expect(page.locator(".findings li").last).to_have_text("and 389 more: see the topology below.")
        service.cluster = replace(service.cluster, nodes=(*nodes[:500], dead, *nodes[501:]))
        expect(page.locator(".findings li")).to_have_count(1)
        # Found among them by what it is, or by its name.
        page.get_by_label("only what is not well").check()
        expect(page.locator(".stage")).to_have_count(4)
        page.get_by_label("only what is not well").uncheck()
        page.get_by_label("Find", exact=True).fill("n998")
        expect(page.locator(".filter")).to_contain_text("2 of 250 instances")
        page.get_by_label("Find", exact=True).fill("")
        service.cluster = replace(service.cluster, nodes=nodes)
        expect(page.locator(".stage.down")).to_have_count(0)
        assert_fits(page)
