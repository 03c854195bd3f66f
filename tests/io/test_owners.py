"""Whose files are that root changes in the directory of a service's user, and what that user may make of it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controlplane.certs.folder import CertFolder
from controlplane.contract.api_keys import changing
from controlplane.contract.files import replace_file
from controlplane.kfadmin.join import _own, give
from controlplane.kfadmin.rundir import RunDir

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
SERVICE = 65534  # "nobody", whose group may have another name: hence by number
NOW = datetime.now(UTC)


def owners(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_uid for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The service user's, and a file of root outside it."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    os.chown(folder, SERVICE, SERVICE)
    (tmp_path / "outside").write_text("root's")
    return folder


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> str:
    """A user with a group of its name."""
    entry = type("Entry", (), {"pw_uid": SERVICE, "gr_gid": SERVICE})
    monkeypatch.setattr("pwd.getpwnam", lambda _name: entry)
    monkeypatch.setattr("grp.getgrnam", lambda _name: entry)
    monkeypatch.setattr("shutil._get_uid", lambda _name: SERVICE)
    monkeypatch.setattr("shutil._get_gid", lambda _name: SERVICE)
    return "service"


# ---- a service goes on reading what root has changed


def test_keys_stay_the_services(folder: Path) -> None:
    for _ in range(2):  # new ones, and others in their place
        with changing(folder / "keys.json"):
            pass
        assert owners(folder) == {"keys.json": SERVICE, "keys.json.lock": SERVICE}
    os.chown(folder / "keys.json.lock", 0, 0)  # as an earlier release left it
    with changing(folder / "keys.json"):
        pass
    assert owners(folder)["keys.json.lock"] == SERVICE


def test_keys_that_are_the_services_in_a_folder_of_root_stay_so(tmp_path: Path) -> None:
    with changing(tmp_path / "keys.json"):
        pass
    assert set(owners(tmp_path).values()) == {0}
    os.chown(tmp_path / "keys.json", SERVICE, SERVICE)
    with changing(tmp_path / "keys.json"):
        pass
    assert owners(tmp_path) == {"keys.json": SERVICE, "keys.json.lock": SERVICE}


def test_certificates_stay_the_services(folder: Path) -> None:
    certs = CertFolder(folder / "certs")
    certs.create("shop", NOW)
    certs.change_authority(NOW)
    certs.finish(NOW)
    assert set(owners(folder).values()) == {SERVICE}


def test_small_files_of_a_run_directory_stay_its_owners(folder: Path) -> None:
    run_dir = RunDir(folder)
    run_dir.prepare()
    for file in ("secret", "api-keys"):
        assert owners(folder)[file] == SERVICE


def test_where_everybody_may_write_nobody_lays_a_file_for_a_secret(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "bundle").touch()
    os.chown(tmp_path / "bundle", SERVICE, SERVICE)
    replace_file(tmp_path / "bundle", b"secret")
    assert owners(tmp_path) == {"bundle": 0}


# ---- what a service's user lays in root's way


def test_a_link_is_given_and_not_what_it_points_to(folder: Path, service: str) -> None:
    outside = folder.parent / "outside"
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(folder.parent, target_is_directory=True)
    (folder / "name").hardlink_to(outside)
    (folder / "made").mkdir()
    (folder / "made" / "file").touch()
    for path in folder.iterdir():
        _own(path, folder.stat())
    give(RunDir(folder), service)
    assert outside.stat().st_uid == folder.parent.stat().st_uid == 0
    assert owners(folder) == {
        "link": SERVICE, "folder": SERVICE, "name": 0, "made": SERVICE, "made/file": SERVICE
    }  # fmt: skip


def test_a_run_directory_of_roots_own_link_is_given(folder: Path, service: str) -> None:
    (folder / "file").touch()
    (folder.parent / "link").symlink_to(folder)
    give(RunDir(folder.parent / "link"), service)
    replace_file(folder.parent / "link" / "more", b"x")
    assert owners(folder) == {"file": SERVICE, "more": SERVICE}


def test_nothing_is_written_through_a_link(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / f".secret.{os.getpid()}.new").symlink_to(outside)
    (folder / "secret").symlink_to(outside)
    (folder / "keys.json.lock").symlink_to(outside)
    replace_file(folder / "secret", b"new", owner=folder.stat())
    with pytest.raises(OSError, match=r"keys\.json\.lock"), changing(folder / "keys.json"):
        pass
    assert (folder / "secret").read_bytes() == b"new"
    assert (outside.read_text(), outside.stat().st_uid) == ("root's", 0)


def link_of_the_service(path: Path) -> Path:
    """To a folder of root with one file; the folder."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    path.symlink_to(elsewhere)
    os.chown(path, SERVICE, SERVICE, follow_symlinks=False)
    return elsewhere


def test_nothing_is_written_where_somebodys_link_leads(folder: Path) -> None:
    elsewhere = link_of_the_service(folder / "certs")
    with pytest.raises(PermissionError, match="a link that is not root's"):
        replace_file(folder / "certs" / "ca.pem", b"new")
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_nothing_is_removed_where_somebodys_link_leads(folder: Path) -> None:
    run_dir = RunDir(folder)
    run_dir.make_folders()
    (folder / "hold").rmdir()
    elsewhere = link_of_the_service(folder / "hold")
    with pytest.raises(PermissionError, match="a link that is not root's"):
        run_dir.make_folders()
    assert [path.name for path in elsewhere.iterdir()] == ["file"]
