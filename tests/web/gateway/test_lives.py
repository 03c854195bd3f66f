"""The life of a request through real HTTP and gRPC, and its line in the access log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from controlplane.contract.errors import ConfigError
from controlplane.contract.lives import Life
from tests.web.gateway.stack import MODEL, Events, Stack, running, stream
from web.gateway.access_log import AccessLog, line

PROMPT = [400, 401, 402]


def body(max_tokens: int = 60, **more: object) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": PROMPT,
        "seed": 1,
        "max_tokens": max_tokens,
        "return_token_ids": True,
        **more,
    }


def lived(stack: Stack, request: str) -> Life:
    (life,) = stack.dispatcher.lives.find(request)
    return life


def test_a_stream_that_moves_has_a_pause_with_its_cause() -> None:
    async def run() -> None:
        async with running(3) as stack, stack.http() as client, asyncio.timeout(20):
            events = Events()
            reading = asyncio.create_task(stream(client, body(request_id="abc"), into=events))
            await stack.until(lambda: len(events.ids()) > 5)
            was = lived(stack, "abc")
            assert (was.lasted_s, was.stream, was.prompt_tokens, was.key) == (None, True, 3, "key1")
            stack.place(p0=2, p1=2)
            await reading
            await stack.until(lambda: lived(stack, "abc").lasted_s is not None)
            life = lived(stack, "abc")
            assert (life.status, life.end, life.tokens) == (200, "length", 60)
            assert events.chunks[0]["id"] == "cmpl-abc"
            first, second = life.places
            assert (first.pipeline, second.node) == (second.pipeline, "n2")
            assert second.epoch > first.epoch
            pause = next(pause for pause in life.pauses if pause.how == "resubmitted")
            assert (pause.epoch, pause.pipeline) == (second.epoch, first.pipeline)
            assert pause.cause.startswith(
                f"failure of {first.pipeline}, epoch {first.epoch} -> {second.epoch}"
            )
            assert 0 < (life.sent_s or -1) < (life.first_token_s or 0) < pause.at_s < (life.lasted_s or 0)

    asyncio.run(run())


def test_each_end_is_told_and_logged(tmp_path: Path) -> None:
    async def run() -> list[dict[str, Any]]:
        log = AccessLog(tmp_path / "logs", "g1")
        async with running(2) as stack, stack.http() as client, asyncio.timeout(20):
            stack.dispatcher.lives.listeners.append(log.put)
            whole = await client.post("/v1/completions", json=body(5, n=2, request_id="whole"))
            assert whole.status_code == 200
            headers = {"x-request-id": "wrong"}
            wrong = await client.post("/v1/completions", json=body(max_tokens=-1), headers=headers)
            assert wrong.status_code == 400
            async with client.stream(
                "POST", "/v1/completions", json=body(500, request_id="left", stream=True)
            ) as left:
                async for _ in left.aiter_lines():
                    break
            await stack.until(lambda: lived(stack, "left").lasted_s is not None)
            assert lived(stack, "left").end == "its client left"
        log.close()
        assert (log.written, log.dropped) == (3, 0)
        return [json.loads(text) for text in log.path.read_text().splitlines()]

    whole, wrong, left = asyncio.run(run())
    told = ("request", "status", "end", "key", "choices", "tokens", "prompt_tokens")
    assert [whole[name] for name in told] == ["whole", 200, "length", "key1", 2, 10, 3]
    assert whole["first_token_s"] <= whole["lasted_s"]
    assert set(whole["pipelines"]) <= {"p0", "p1"}
    assert whole["epochs"]
    assert (wrong["request"], wrong["status"], wrong["end"]) == ("wrong", 400, "refused")
    assert (left["request"], left["status"]) == ("left", 499)
    # No prompt, no token.
    assert set(whole) == {*msgspec.to_builtins(LIFE), "pipelines", "epochs"} - {"places"}


LIFE = Life("r", "g1", "chat", "alice", "m", True, False, 1, 7, 1.7e9, lasted_s=1.0, status=200, end="stop")


def test_the_log_is_rotated_and_only_so_many_are_kept(tmp_path: Path) -> None:
    size = len(line(LIFE))
    log = AccessLog(tmp_path, "g1", bytes_max=3 * size, files_max=3)
    for _ in range(20):
        log.put(LIFE)
    log.close()
    assert log.written == 20
    sizes = {path.name: path.stat().st_size // size for path in tmp_path.iterdir()}
    assert sizes == {"g1.access.log": 2, "g1.access.log.1": 3, "g1.access.log.2": 3}
    assert (tmp_path / "g1.access.log").stat().st_mode & 0o777 == 0o600
    again = AccessLog(tmp_path, "g1", bytes_max=3 * size)
    again.put(LIFE)
    again.close()
    assert len((tmp_path / "g1.access.log").read_text().splitlines()) == 3


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "g1.access.log").symlink_to("/dev/full")
    log = AccessLog(tmp_path, "g1")
    for _ in range(3):
        log.put(LIFE)
    log.close()
    assert (log.written, log.dropped) == (0, 3)


def test_a_folder_that_cannot_be_used_is_the_operators_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="access_log_dir"):
        AccessLog(tmp_path / "file", "g1")
