"""Clients as they come from their package indexes, against a gateway whose model says what each of them has to hear.

They are large, and some pin what we pin otherwise, so they live apart: `make clients` installs them. What is not there
is skipped. The openai package for Python is with the other tests (tests/web/gateway).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from controlplane.contract.requests import Submit
from tests.web.gateway.scripted import QWEN, scripted_model
from tests.web.gateway.stack import KEY, Stack, running
from web.gateway.model import Model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv-clients/bin"
MODULES = ROOT / ".venv-clients/js"
LIMIT_S = 150.0
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
EVENT = '<tool_call>\n{"name": "Event", "arguments": {"name": "ball", "day": 3}}\n</tool_call>'
OBJECT = '{"name": "ball", "day": 3}'


def actor(model: Model) -> Callable[[Submit, int], int]:
    """A model that calls the tool that it is told of, tells what came of it, and makes an event where one is wanted."""
    scripts: dict[int, list[int]] = {}

    def script(submit: Submit) -> str:
        prompt = model.decode(list(submit.prompt))
        if "<tool_response>" in prompt:
            return OBJECT if submit.sampling.grammar else "It rains in Köln."
        if "# Tools" in prompt:
            return EVENT if '"Event"' in prompt else CALL
        return OBJECT if submit.sampling.grammar else "One moment."

    def speak(submit: Submit, position: int) -> int:
        if submit.rid not in scripts:
            scripts[submit.rid] = model.tokenizer.encode(script(submit), add_special_tokens=False).ids
        ids = scripts[submit.rid]
        return ids[position] if position < len(ids) else model.eos_token_ids[0]

    return speak


def against_gateway(folder: Path, body: Callable[[Stack], Awaitable[None]]) -> None:
    async def run() -> None:
        model = scripted_model(folder, QWEN)
        async with running(model=model, speak=actor(model)) as stack:
            await body(stack)

    asyncio.run(run())


async def run_quietly(*command: str, **env: str) -> str:
    """What it prints. It must end well, and within LIMIT_S, with no network but the server's."""
    quiet = {
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    given = {**os.environ, **quiet, **env}
    given.pop("PYTHONPATH", None)  # they have their own packages
    # A file and no pipe: what a client leaves running would keep that open. A session of its own, to end all of it.
    with tempfile.TemporaryFile() as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=given,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
            out.seek(0)
            said = out.read().decode(errors="replace")
    assert process.returncode == 0, said[-4000:]
    return said


async def run_client(stack: Stack, *command: str, **env: str) -> str:
    return await run_quietly(*command, URL=stack.url, KEY=KEY, OPENAI_API_KEY=KEY, **env)


def needs(path: Path, what: str) -> None:
    if not path.exists():
        pytest.skip(f"{what} is not installed: make clients, or clients-load")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["litellm", "langchain_openai", "agents", "instructor", "pydantic_ai"])
def test_python_clients(tmp_path: Path, name: str) -> None:
    needs(next(PYTHON.parent.glob(f"lib/python*/site-packages/{name}"), PYTHON / name), name)

    async def body(stack: Stack) -> None:
        script = {"langchain_openai": "langchain"}.get(name, name)
        out = await run_client(stack, str(PYTHON / "python"), str(HERE / f"{script}_client.py"))
        assert out.splitlines()[-1] == "ok"

    against_gateway(tmp_path, body)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["openai", "ai"])
def test_javascript_clients(tmp_path: Path, name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    needs(MODULES / "node_modules" / name, f"the {name} package for JavaScript")

    async def body(stack: Stack) -> None:
        shutil.copyfile(HERE / f"{name}.mjs", tmp_path / f"{name}.mjs")
        (tmp_path / "node_modules").symlink_to(MODULES / "node_modules")  # node looks beside the file
        out = await run_client(stack, node, str(tmp_path / f"{name}.mjs"))
        assert out.splitlines()[-1] == "ok"

    against_gateway(tmp_path / "", body)
