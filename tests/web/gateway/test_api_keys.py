"""API keys with names and limits: who is let in, what they may use, and files that change under a serving gateway."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from controlplane.contract.api_keys import KeyLimits, KeyRecord, changing, make_key, read_keys
from controlplane.contract.errors import ConfigError
from tests.web.gateway.stack import KEY, MODEL, Stack, running, with_stack
from web.gateway.errors import ApiError
from web.gateway.http.api_keys import ApiKeys

NOW = int(time.time())


def made(name: str, expires: int = 0, **limits: object) -> tuple[str, KeyRecord]:
    return make_key(name, "team", NOW, expires, KeyLimits(**limits))  # type: ignore[arg-type]


def allowed(keys: ApiKeys, text: str) -> bool:
    try:
        keys.match(f"Bearer {text}")
    except ApiError as error:
        if error.status != 401:
            raise
        return False
    return True


def test_keys_in_the_clear(tmp_path: Path) -> None:
    path, records = tmp_path / "api-keys", tmp_path / "keys.json"
    with pytest.raises(ConfigError, match="api-keys"):
        ApiKeys.load(path, records)
    path.write_text("# nobody\n\n")
    with pytest.raises(ConfigError, match="has an API key"):
        ApiKeys.load(path, records)
    path.write_text("# two\nkey-one\n  key-two  \n")
    keys = ApiKeys.load(path, records)
    assert keys.match("Bearer key-one").name == "key1"
    assert keys.match("bearer key-two").name == "key2"
    assert keys.match("Bearer\tkey-two").name == "key2"
    headers = (None, "", "key-one", "Basic key-one", "Bearer", "Bearer ", "Bearer # two", "Bearer key-on")
    for header in headers:
        with pytest.raises(ApiError, match="valid API key"):
            keys.match(header)
    assert "key-one" not in repr(vars(keys))


def test_a_key_is_known_by_its_secret_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one, record = made("alice")
    other, _ = made("alice")
    with changing(path) as kept:
        kept.append(record)
    assert path.stat().st_mode & 0o777 == 0o600
    assert one.split("-", 2)[2] not in path.read_text()
    keys = ApiKeys.load(tmp_path / "api-keys", path)
    caller = keys.match(f"Bearer {one}")
    assert (caller.name, caller.limits) == ("alice", KeyLimits())
    assert keys.match(f"bearer  {one} ").owner == caller.owner
    key_id = one.split("-")[1]
    for wrong in (
        other,
        one[:-1],
        one + "a",
        f"kf-{key_id}-",
        f"kf-{key_id}",
        f"kf-{other.split('-')[1]}-{one}",
    ):
        assert not allowed(keys, wrong), wrong


def test_expired_and_revoked_keys_say_so() -> None:
    texts, records = zip(*(made("old", NOW - 1), made("gone"), made("good", NOW + 86400)), strict=True)
    old, gone, good = records
    gone = KeyRecord(gone.id, gone.name, gone.salt, gone.hash, revoked_unix_s=NOW)
    keys = ApiKeys([], (old, gone, good))
    for text, why in zip(texts, ("expired", "revoked", ""), strict=True):
        if not why:
            assert keys.match(f"Bearer {text}").name == "good"
            continue
        with pytest.raises(ApiError, match=f"this API key is {why}"):
            keys.match(f"Bearer {text}")


def test_files_are_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    plain, path = tmp_path / "api-keys", tmp_path / "keys.json"
    plain.write_text(f"{KEY}\n")
    keys = ApiKeys.load(plain, path)
    text, record = made("alice", tokens_per_minute=5)
    assert not allowed(keys, text)
    with changing(path) as kept:
        kept.append(record)
    keys.look()
    caller = keys.match(f"Bearer {text}")
    caller.usage.begin(0.0)
    path.write_text("{")
    keys.look()
    assert "cannot be understood" in keys.trouble
    assert allowed(keys, text)
    path.write_text('{"schema": 2}')
    keys.look()
    assert "cannot be understood" in keys.trouble
    path.unlink()
    keys.look()
    assert not keys.trouble
    assert not allowed(keys, text), "it is gone"
    assert allowed(keys, KEY)
    assert [usage.name for usage in keys.usages()] == ["key1", "alice"], "one of its requests still runs"
    caller.usage.end()
    plain.write_text(f"{KEY}\nanother\n")
    keys.look()
    assert [usage.name for usage in keys.usages()] == ["key1", "key2"]


def test_who_may_read_the_file_and_what_is_in_it_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, record = made("alice")
    with changing(path) as kept:
        kept.append(record)
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="everybody: chmod"):
        read_keys(path)
    path.chmod(0o600)
    whole = path.read_text()
    entry = whole[whole.index("[") + 1 : whole.rindex("]")]
    path.write_text(whole.replace(entry, f"{entry},{entry}"))
    with pytest.raises(ConfigError, match="same id twice"):
        read_keys(path)
    path.write_text(whole.replace('"alice"', '"alice", "admin": true'))
    with pytest.raises(ConfigError, match="cannot be understood"):
        read_keys(path)
    for name in ("", "a b", "x" * 64, "-a", "é"):
        with pytest.raises(ConfigError, match="this key cannot be"):
            made(name)
    with pytest.raises(ConfigError, match="this key cannot be"):
        made("a", tokens_per_minute=-1)


async def ask(http: httpx.AsyncClient, **more: object) -> httpx.Response:
    body = {"model": MODEL, "prompt": [400, 401, 402], "max_tokens": 4, **more}
    return await http.post("/v1/completions", json=body)


async def answers(http: httpx.AsyncClient, wanted: Callable[[int], bool]) -> httpx.Response:
    """The first answer with a status that is wanted."""
    async with asyncio.timeout(15):
        while True:
            answer = await ask(http)
            if wanted(answer.status_code):
                return answer
            await asyncio.sleep(0.02)


def test_a_prompt_counts_once_however_many_choices_are_made_of_it() -> None:
    text, record = made("many", tokens_per_minute=1000)

    async def body(stack: Stack) -> None:
        async with stack.http(text) as http:
            answer = await http.post(
                "/v1/completions", json={"prompt": [[400] * 50, [400] * 50], "n": 3, "max_tokens": 2}
            )
            usage = answer.json()["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 12)
        async with stack.http() as http:
            counted = (await http.get("/metrics")).text
        assert 'kevlarflow_key_prompt_tokens_total{key="many"} 100.0' in counted
        assert 'kevlarflow_key_generation_tokens_total{key="many"} 12.0' in counted

    with_stack(body, keys=ApiKeys([KEY], [record]))


def test_metrics_are_for_operators_and_scrapers_alone() -> None:
    """They name all keys, and count what each has asked."""
    client, record = made("client")
    scraper, scrapers = make_key("scraper", "", NOW, 0, KeyLimits(), metrics=True)

    async def body(stack: Stack) -> None:
        async with stack.http(client) as http:
            for path in ("/metrics", "//metrics", "/metrics/", "/%6Detrics"):
                refused = await http.get(f"{stack.url}{path}")
                assert (refused.status_code, "kevlarflow_" in refused.text) == (403, False), path
            assert (await http.head("/metrics")).status_code == 403
            assert (await ask(http)).status_code == 200
        async with stack.http(scraper) as http:
            assert 'key="client"' in (await http.get("/metrics")).text
            for path in ("/v1/models", "/load", "/openapi.json", "/tokenizer_info", "/v1/streams/x"):
                assert (await http.get(path)).status_code == 403, path
            assert (await ask(http)).status_code == 403
            assert (await http.get("/livez")).status_code == 200
        async with stack.http() as http:
            assert 'key="client"' in (await http.get("/metrics")).text

    with_stack(body, keys=ApiKeys([KEY], [record, scrapers]))


def test_earlier_releases_read_the_keys_that_they_know(tmp_path: Path) -> None:
    """They refuse a file with a field that they do not know."""
    path = tmp_path / "keys.json"
    with changing(path) as keys:
        keys.append(made("client", tokens_per_minute=5)[1])
    assert "metrics" not in path.read_text()
    with changing(path) as keys:
        keys.append(make_key("scraper", "", NOW, 0, KeyLimits(), metrics=True)[1])
    assert [key.metrics for key in read_keys(path).keys] == [False, True]


def test_limits_are_kept_over_http() -> None:
    texts, records = zip(
        *(
            made("elsewhere", models=("another",)),
            made("twice", requests_per_minute=2),
            made("few", tokens_per_minute=7),
            made("polite", priority_floor=3),
            made("small", memory_bytes=10),
        ),
        strict=True,
    )
    elsewhere, twice, few, polite, small = texts

    async def body(stack: Stack) -> None:
        async with stack.http(elsewhere) as http:
            answer = await ask(http)
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
            assert (await http.get("/v1/models")).status_code == 200
        async with stack.http(twice) as http:
            assert [(await ask(http)).status_code for _ in range(2)] == [200, 200]
            refused = await ask(http)
            assert refused.status_code == 429
            assert "2 requests a minute" in refused.json()["error"]["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 30
        async with stack.http(few) as http:
            assert (await ask(http)).json()["usage"]["total_tokens"] == 7
            refused = await ask(http)
            assert refused.status_code == 429
            assert "7 tokens a minute" in refused.json()["error"]["message"]
        async with stack.http(polite) as http:
            assert (await ask(http, priority=2)).status_code == 400
            assert (await ask(http, priority=3)).status_code == 200
        async with stack.http(small) as http:
            assert (await ask(http)).status_code == 413
        async with stack.http() as http:
            assert (await ask(http, priority=0)).status_code == 200, "others have no limits"
            text = (await http.get("/metrics")).text
        assert 'kevlarflow_key_requests_total{key="twice"} 2.0' in text
        assert 'kevlarflow_key_rejections_total{key="twice"} 1.0' in text
        assert 'kevlarflow_key_prompt_tokens_total{key="few"} 3.0' in text
        assert 'kevlarflow_key_generation_tokens_total{key="few"} 4.0' in text
        assert 'kevlarflow_key_requests_total{key="key1"}' in text

    with_stack(body, keys=ApiKeys([KEY], records))


def test_requests_at_a_time_are_counted_until_they_are_over() -> None:
    text, record = made("narrow", streams=1)
    another, others = made("another")

    async def body(stack: Stack) -> None:
        async with stack.http(text) as http:
            request = {
                "model": MODEL,
                "prompt": [400],
                "max_tokens": 400,
                "stream": True,
                "ignore_eos": True,
            }
            async with http.stream("POST", "/v1/completions", json=request) as streamed:
                assert streamed.status_code == 200
                assert (await http.get("/load")).json() == {"server_load": 1}
                for key, seen in ((another, 0), (KEY, 1)):  # a client is told of its own requests alone
                    async with stack.http(key) as other:
                        assert (await other.get("/load")).json() == {"server_load": seen}
                refused = await ask(http)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            await answers(http, lambda status: status != 429)  # the client has hung up
            bad = await http.post("/v1/completions", json={"prompt": 7})
            assert bad.status_code == 400
            assert (await ask(http)).status_code == 200, "what was refused is over, too"

    with_stack(body, keys=ApiKeys([KEY], (record, others)))


def test_a_stream_of_one_key_is_not_anothers() -> None:
    texts, records = zip(made("alice"), made("bob"), strict=True)

    async def body(stack: Stack) -> None:
        request = {"model": MODEL, "prompt": [400], "max_tokens": 3, "stream": True}
        async with stack.http(texts[0]) as alice, stack.http(texts[1]) as bob:
            async with alice.stream("POST", "/v1/completions", json=request) as streamed:
                lines = [line async for line in streamed.aiter_lines()]
            last = next(line for line in reversed(lines) if line.startswith("id: "))[4:]
            refused = await bob.post("/v1/completions", json=request, headers={"Last-Event-ID": last})
            assert refused.status_code == 403
            again = await alice.post("/v1/completions", json=request, headers={"Last-Event-ID": last})
            assert again.status_code == 200

    with_stack(body, keys=ApiKeys([], records))


def test_the_log_has_the_key_s_name_and_not_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    text, record = made("alice")

    async def body(stack: Stack) -> None:
        async with stack.http(text) as http:
            assert (await ask(http)).status_code == 200

    with_stack(body, keys=ApiKeys([], (record,)))
    said = capsys.readouterr().out
    assert "key=alice" in said
    assert text not in said
    assert text.split("-", 2)[2] not in said


def test_a_gateway_takes_in_what_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text, record = made("alice")
    with changing(path) as kept:
        kept.append(record)
    keys = ApiKeys.load(tmp_path / "api-keys", path)

    async def run() -> None:
        async with running(keys=keys) as stack, stack.http(text) as http, asyncio.timeout(20):
            following = asyncio.create_task(keys.follow())
            assert (await ask(http)).status_code == 200
            with changing(path) as kept:
                kept[0] = KeyRecord(record.id, record.name, record.salt, record.hash, revoked_unix_s=NOW)
            refused = await answers(http, lambda status: status != 200)
            assert refused.status_code == 401
            assert "revoked" in refused.json()["error"]["message"]
            following.cancel()

    asyncio.run(run())


def test_only_whole_files_are_ever_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with changing(path) as kept:
        kept.append(made("alice")[1])
    before = path.read_bytes()
    with pytest.raises(RuntimeError), changing(path) as kept:  # noqa: PT012
        kept.clear()
        raise RuntimeError
    assert path.read_bytes() == before

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"), changing(path) as kept:
            kept.clear()
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]
