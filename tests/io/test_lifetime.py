"""How our processes begin and end: real ones, with threads and loops that hang."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from controlplane.contract import lifetime

PRELUDE = """
import asyncio, ctypes, resource, threading, time
from controlplane.contract import lifetime
from controlplane.contract.errors import ConfigError, KevlarFlowError
lifetime.HUNG_EXIT_S, lifetime.AWAKE_EVERY_S = {hung_s}, 0.2
lifetime.begin()
async def serve():
    {body}
lifetime.run_to_exit("kf-test", serve)
"""


def run(body: str, limit_s: float = 20.0, hung_s: float = 1.5) -> tuple[int, float, str]:
    """Exit code, seconds and what it wrote."""
    code = PRELUDE.format(body=body.replace("\n", "\n    "), hung_s=hung_s)
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s, check=False
    )
    return done.returncode, time.monotonic() - before, done.stdout + done.stderr


@pytest.mark.parametrize(
    "hangs",
    [
        "asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)",
        "threading.Thread(target=time.sleep, args=(1000,)).start()",
        "from concurrent.futures import ThreadPoolExecutor; ThreadPoolExecutor(1).submit(time.sleep, 1000)",
    ],
)
def test_a_thread_that_never_ends_does_not_keep_a_process(hangs: str) -> None:
    assert run(f"{hangs}\nprint('served')")[::2] == (0, "served\n")


@pytest.mark.parametrize(
    ("hangs", "where"),
    [
        ("time.sleep(1000)", "run_to_exit"),
        ("ctypes.PyDLL(None).sleep(1000)", "run_to_exit"),  # with the lock of the interpreter
        ("while True: pass", "run_to_exit"),
    ],
)
def test_a_loop_that_hangs_ends_its_process_and_says_where(hangs: str, where: str) -> None:
    code, took_s, said = run(f"await asyncio.sleep(0.5)\n{hangs}")
    assert code == 1
    assert took_s < 15.0
    assert "Timeout" in said
    assert where in said


def test_a_loop_that_only_has_pauses_lives() -> None:
    """Shorter than what is taken for a hang by far, on a busy machine as well, and longer all together."""
    pauses = "for _ in range(6):\n  time.sleep(0.8)\n  await asyncio.sleep(0.25)\nprint('served')"
    assert run(pauses, hung_s=4.0)[::2] == (0, "served\n")


def test_errors_have_their_codes() -> None:
    assert run("raise ConfigError('port 1 is taken')")[::2] == (2, "kf-test: port 1 is taken\n")
    assert run("raise KevlarFlowError('it is gone')")[::2] == (1, "kf-test: it is gone\n")
    code, _, said = run("raise ValueError('a defect')")
    assert code == 1
    assert "Traceback" in said


@pytest.mark.parametrize(("nr_open", "granted"), [("1048576", [1048576]), ("512", []), ("", []), (None, [])])
def test_a_hard_limit_that_the_kernel_does_not_set_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nr_open: str | None, granted: list[int]
) -> None:
    """It was inherited from before fs.nr_open fell: no process of ours started."""
    found = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if limits[1] > 1048576:
            raise PermissionError(1, "Operation not permitted")
        found.append(limits[0])

    if nr_open is not None:
        (tmp_path / "nr_open").write_text(nr_open)
    monkeypatch.setattr(lifetime, "NR_OPEN", tmp_path / "nr_open", raising=False)
    for hard in (1073741816, resource.RLIM_INFINITY):
        found.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (1024, hard))
        monkeypatch.setattr(
            resource,
            "setrlimit",
            lambda _, limits: setrlimit(_, tuple(n if n >= 0 else 1 << 62 for n in limits)),
        )
        lifetime.raise_descriptor_limit()
        assert found == granted


def test_as_many_descriptors_as_there_may_be() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}));"
        "from controlplane.contract import lifetime; lifetime.begin();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert int(done.stdout) == hard
