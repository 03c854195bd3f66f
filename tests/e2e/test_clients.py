"""What people use: curl, the openai client, and a client that hangs up."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path

import httpx
import openai

from tests.e2e.cluster import Cluster


def client(cluster: Cluster) -> openai.OpenAI:
    http = httpx.Client(trust_env=False)
    return openai.OpenAI(
        base_url=f"{cluster.local.gateway_url}/v1", api_key=cluster.local.api_key, http_client=http
    )


def test_curl_streams_to_done(home: Cluster) -> None:
    body = {"model": "kevlar-demo", "prompt": "It was a", "max_tokens": 12, "stream": True}
    answer = subprocess.run(
        [
            *("curl", "-sN", "--max-time", "20", f"{home.local.gateway_url}/v1/completions"),
            *("-H", f"Authorization: Bearer {home.local.api_key}", "-H", "Content-Type: application/json"),
            *("-d", json.dumps(body)),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1])


def test_openai_client_streaming_equals_not_streaming(home: Cluster) -> None:
    with client(home) as ask:
        wanted = {"model": "kevlar-demo", "messages": [{"role": "user", "content": "The old house"}]}
        options = {"max_tokens": 24, "seed": 5, "temperature": 0.7}
        whole = ask.chat.completions.create(**wanted, **options)  # type: ignore[call-overload]
        parts = list(
            ask.chat.completions.create(  # type: ignore[call-overload]
                **wanted, **options, stream=True, stream_options={"include_usage": True}
            )
        )
        models = [m.id for m in ask.models.list().data]
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 24
    assert models == ["kevlar-demo"]


def test_a_client_that_hangs_up_frees_every_block(home: Cluster) -> None:
    body = {
        "model": "kevlar-demo",
        "prompt": "x " * 200,
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {home.local.api_key}"}
    with (
        httpx.Client(base_url=home.local.gateway_url, headers=headers, trust_env=False) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: letting go of it would hang up at once
        next(lines)
        asyncio.run(
            home.wait_for(
                lambda s: any(n.blocks_used for n in s.nodes) and any(p.running for p in s.pipelines),
                "the request runs and holds blocks",
            )
        )
    asyncio.run(
        home.wait_for(
            lambda s: all(n.blocks_used == 0 and n.blocks_replica == 0 for n in s.nodes),
            "every block is free on every node",
        )
    )


def test_nothing_answers_without_its_key(home: Cluster) -> None:
    url = home.local.gateway_url
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(url + path, trust_env=False).status_code == 401
    for admin in home.local.endpoints.admin:
        for path in ("/admin/v1/status", "/metrics"):
            assert httpx.get(admin + path, trust_env=False).status_code == 401
        assert httpx.get(f"{admin}/livez", trust_env=False).status_code == 200


def test_the_cluster_stops_quickly_and_leaves_nothing() -> None:
    cluster = Cluster(instances=1, stages=2)
    with cluster:
        pids = cluster.local.pids()
        started = time.monotonic()
    assert time.monotonic() - started < 12.0
    for name, pid in pids.items():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            continue
        assert state == "Z", f"{name} still runs"
