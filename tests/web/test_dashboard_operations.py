"""Operations by button: pre-flight first, the same as a line of kfadmin, and none for those who may only look."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from controlplane.contract.auth import Role, mint
from controlplane.contract.records import OperationState
from controlplane.contract.status import OperationRequest
from tests.web.admin_service import TOKEN, MemoryService, healthy, serving
from tests.web.dashboards import NEEDS_CHROMIUM, assert_accessible, assert_fits, shoot
from tests.web.histories import replace

pytestmark = NEEDS_CHROMIUM


def minted(role: Role) -> str:
    return mint(TOKEN, "alice", role, int(time.time()) + 600)


def test_a_drain_by_button(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    with serving(service) as url:
        page.goto(f"{url}/#token={minted(Role.OPERATOR)}")
        page.get_by_role("gridcell", name="p0 stage 2: n2").click()
        node = page.get_by_role("region", name="Node n2")
        expect(node).to_contain_text("410 of requests, 390 of copies, 1248 free of 2048")
        node.get_by_role("button", name="Drain n2").click()
        dialog = page.get_by_role("dialog", name="Drain n2")
        expect(dialog.locator(".checks")).to_contain_text("capacity: fine")
        expect(dialog.locator(".plan")).to_contain_text("cordon n2")
        expect(dialog.locator(".command")).to_have_text("kfadmin drain n2 --if-epoch 12")
        dialog.get_by_label("Reason, for the audit").fill("its fan is loud, 'again'")
        command = "kfadmin drain n2 --if-epoch 12 --reason 'its fan is loud, '\\''again'\\'''"
        expect(dialog.locator(".command")).to_have_text(command)
        assert_accessible(page)
        shoot(page, tmp_path, "drain")
        # Until now it was only asked whether it would be safe.
        assert [request.dry_run for request in service.requests] == [True]
        assert service.known == {}
        dialog.get_by_role("button", name="Drain n2").click()
        expect(dialog).to_have_count(0)
        (known,) = service.known.values()
        asked = service.requests[-1]
        wanted = OperationRequest(known.id, "drain", "n2", if_epoch=12, reason="its fan is loud, 'again'")
        assert asked == wanted
        assert (service.callers[-1].name, service.callers[-1].role) == ("alice", Role.OPERATOR)
        expect(page.locator(".operations")).to_contain_text("drain n2")
        expect(page.locator("main > [role=status]")).to_have_text(f"Drain n2: it has begun, as {known.id}.")
        # And called off again.
        page.get_by_role("button", name="Cancel drain n2").click()
        dialog = page.get_by_role("dialog", name="Cancel drain n2")
        expect(dialog.locator(".command")).to_have_text(f"kfadmin cancel {known.id}")
        dialog.get_by_role("button", name="Leave it running").click()
        expect(dialog).to_have_count(0)
        assert service.known[known.id].open
        page.get_by_role("button", name="Cancel drain n2").click()
        dialog.get_by_role("button", name="Cancel drain n2").click()
        expect(page.locator(".operations .tag.cancelled")).to_have_count(1)
        assert service.known[known.id].state is OperationState.CANCELLED


def test_what_is_refused_cannot_be_sent(page: Page) -> None:
    service = MemoryService()
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        page.get_by_role("gridcell", name="p0 stage 0: n0").click()
        page.get_by_role("button", name="Replace n0").click()
        dialog = page.get_by_role("dialog", name="Replace n0")
        expect(dialog).to_contain_text("capacity: n0 has no peer")
        expect(dialog).to_contain_text("Refused; nothing was changed.")
        expect(dialog.get_by_role("button", name="Replace n0")).to_be_disabled()
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        # The topology changes between the pre-flight and the click: the cluster refuses, and the dialog says so.
        page.get_by_role("gridcell", name="p0 stage 3: n3").click()
        page.get_by_role("button", name="Cordon n3").click()
        dialog = page.get_by_role("dialog", name="Cordon n3")
        expect(dialog.locator(".checks .ok")).to_have_count(1)
        service.cluster = replace(healthy(), counter=13)
        dialog.get_by_role("button", name="Cordon n3").click()
        expect(dialog).to_contain_text("another epoch")
        assert service.known == {}


def test_the_whole_clusters_operations(page: Page) -> None:
    service = MemoryService()
    service.cluster = replace(healthy(), paused=True)
    with serving(service) as url:
        page.goto(f"{url}/#token={TOKEN}")
        expect(page.get_by_role("button", name="Pause automation")).to_have_count(0)
        for name, kind, node in (
            ("Resume automation", "resume", ""),
            ("Transfer leadership", "transfer-leader", ""),
            ("Restart nodes", "restart", "nodes"),
            ("Restart gateways", "restart", "gateways"),
        ):
            page.get_by_role("button", name=name).click()
            dialog = page.get_by_role("dialog", name=name)
            expect(dialog.locator(".command")).to_have_text(
                f"kfadmin {kind} {node}".strip() + " --if-epoch 12"
            )
            dialog.get_by_role("button", name=name).click()
            expect(dialog).to_have_count(0)
            assert (service.requests[-1].kind, service.requests[-1].node) == (kind, node)


def test_another_number_of_instances(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    with serving(service) as url:
        page.goto(f"{url}/#token={minted(Role.OPERATOR)}")
        page.get_by_role("button", name="Scale instances").click()
        dialog = page.get_by_role("dialog", name="Scale instances")
        wanted, begin = (
            dialog.get_by_label("Instances (there are 2)"),
            dialog.get_by_role("button", name="Scale"),
        )
        expect(wanted).to_have_value("2")
        for typed in ("", "0", "many", "5000", "2"):  # what cannot be, or is so already, is not even asked
            wanted.fill(typed)
            expect(dialog).to_contain_text("Choose another number, 1 to 4096.")
            expect(begin).to_be_disabled()
        assert service.requests == []
        wanted.fill("3")
        expect(dialog.locator(".checks")).to_contain_text("capacity: fine")
        expect(dialog.locator(".command")).to_have_text("kfadmin scale 3 --if-epoch 12")
        dialog.get_by_label("Reason, for the audit").fill("evening")
        wanted.fill("4")
        expect(dialog.locator(".command")).to_have_text("kfadmin scale 4 --if-epoch 12 --reason evening")
        expect(begin).to_be_enabled()
        assert_accessible(page)
        shoot(page, tmp_path, "scale")
        assert [(request.instances, request.dry_run) for request in service.requests] == [
            (3, True),
            (4, True),
        ]
        begin.click()
        expect(dialog).to_have_count(0)
        (known,) = service.known.values()
        assert service.requests[-1] == OperationRequest(
            known.id, "scale", instances=4, if_epoch=12, reason="evening"
        )
        expect(page.locator(".operations")).to_contain_text("scale 4")


def test_a_viewer_sees_all_and_no_button_that_acts(page: Page, tmp_path: Path) -> None:
    service = MemoryService()
    nodes = healthy().nodes
    service.cluster = replace(healthy(), nodes=(replace(nodes[0], cordoned=True), *nodes[1:]))
    with serving(service) as url:
        page.goto(f"{url}/#token={minted(Role.VIEWER)}")
        expect(page.locator(".facts")).to_contain_text("alice, viewer")
        page.get_by_role("gridcell", name="p0 stage 0: n0").click()
        expect(page.get_by_role("region", name="Node n0")).to_contain_text("cordoned")
        names = page.get_by_role("button").evaluate_all(
            "all => all.map((one) => one.ariaLabel ?? one.textContent)"
        )
        assert names == ["Sign out", "Close n0"]
        assert_accessible(page)
        # Nor would the cluster heed one.
        sent = """fetch("/admin/v1/operations", {method: "POST", body: '{"id": "x", "kind": "pause"}'})
                  .then((answer) => answer.status)"""
        assert page.evaluate(sent) == 403
        assert service.known == {}


@pytest.mark.parametrize("width", [1280, 390])
def test_with_the_keyboard_alone(page: Page, width: int) -> None:
    """From the sign-in to a drain, without a pointer; the focus goes back to where it was."""
    service = MemoryService()
    page.set_viewport_size({"width": width, "height": 900})

    def focused() -> str:
        name = "one.ariaLabel ?? one.textContent"
        return str(
            page.evaluate(f"[document.activeElement].map((one) => one === document.body ? '' : {name})[0]")
        )

    def tab_to(what: str) -> None:
        for _ in range(40):
            if what in focused():
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{what} cannot be reached")

    with serving(service) as url:
        page.goto(url)
        expect(page.get_by_label("Admin token")).to_be_focused()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        expect(page.locator(".facts")).to_contain_text("admin, admin")
        tab_to("p0 stage 0: n0")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        expect(page.locator(":focus")).to_have_accessible_name("p1 stage 3: n7, replica n3, up to date")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("PageUp")
        expect(page.locator(":focus")).to_have_accessible_name("p0 stage 2: n2, replica n6, up to date")
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="Node n2")).to_be_visible()
        tab_to("Drain n2")
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="Drain n2")
        expect(dialog.locator(".checks .ok")).to_have_count(1)
        # The dialog keeps the focus.
        for _ in range(6):
            page.keyboard.press("Tab")
            inside = "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
            assert page.evaluate(inside)
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(page.locator(":focus")).to_have_text("Drain n2")
        page.keyboard.press("Enter")
        expect(dialog.locator(".checks .ok")).to_have_count(1)
        dialog.get_by_label("Reason, for the audit").focus()
        page.keyboard.press("Enter")  # a form's own way to be sent
        expect(page.locator(".operations")).to_contain_text("drain n2")
        page.get_by_role("button", name="Close n2").focus()
        page.keyboard.press("Escape")
        expect(page.get_by_role("region", name="Node n2")).to_have_count(0)
        expect(page.locator(":focus")).to_have_accessible_name("p0 stage 2: n2, replica n6, up to date")
        assert_fits(page)
