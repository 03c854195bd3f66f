"""guidellm and aiperf measure a gateway. `make clients-load` installs them, in several gigabytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import dataplane.demo
from tests.clients.test_clients import ROOT, needs, run_client
from tests.web.gateway.stack import MODEL, Stack, with_stack

BIN = ROOT / ".venv-clients-load/bin"
REQUESTS, TOKENS = 6, 16
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LIMIT_S = 170.0


@pytest.mark.timeout(240)
def test_guidellm(tmp_path: Path) -> None:
    needs(BIN / "guidellm", "guidellm")

    async def body(stack: Stack) -> None:
        backend = f"kind=openai_http,target={stack.url},model={MODEL},api_key=sk-test"
        data = f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"
        command = ["guidellm", "run", "--backend", backend, "--data", data, "--disable-progress"]
        command += [
            "--profile",
            "kind=concurrent,streams=2",
            "--constraint",
            f"kind=max_requests,count={REQUESTS}",
        ]
        command += ["--tokenizer", f"kind=huggingface_auto,model={dataplane.demo.model_dir()}"]
        command += ["--output", f"kind=json,path={tmp_path / 'out.json'}"]
        await run_client(stack, str(BIN / command[0]), *command[1:])
        (found,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
        totals = {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
        assert found["metrics"]["request_totals"] == totals
        assert {request["output_tokens"] for request in found["requests"]["successful"]} == {TOKENS}
        check_asked(stack)

    with_stack(body, limit_s=LIMIT_S)


@pytest.mark.timeout(240)
def test_aiperf(tmp_path: Path) -> None:
    """It takes a tokenizer from a cache of the hub only."""
    needs(BIN / "aiperf", "aiperf")
    held = tmp_path / "hf/hub/models--kevlar--demo"
    revision = "a" * 40
    (held / "refs").mkdir(parents=True)
    (held / "refs/main").write_text(revision)
    (held / "snapshots" / revision).mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(dataplane.demo.model_dir() / name, held / "snapshots" / revision / name)

    async def body(stack: Stack) -> None:
        command = [
            "profile",
            "--model",
            MODEL,
            "--url",
            stack.url,
            "--api-key",
            "sk-test",
            "--endpoint-type",
            "chat",
        ]
        command += [
            "--streaming",
            "--tokenizer",
            "kevlar/demo",
            "--request-count",
            str(REQUESTS),
            "--ui",
            "none",
        ]
        command += [
            "--concurrency",
            "2",
            "--synthetic-input-tokens-mean",
            "32",
            "--output-tokens-mean",
            str(TOKENS),
        ]
        command += ["--extra-inputs", "ignore_eos:true", "--artifact-dir", str(tmp_path / "out")]
        await run_client(stack, str(BIN / "aiperf"), *command, HF_HOME=str(tmp_path / "hf"))
        found = json.loads((tmp_path / "out/profile_export_aiperf.json").read_text())
        assert (found["request_count"]["avg"], found["error_summary"]) == (REQUESTS, [])
        check_asked(stack)

    with_stack(body, limit_s=LIMIT_S)


def check_asked(stack: Stack) -> None:
    """What has come is what they were told to ask for: so many tokens each, whatever the model says."""
    submits = [submit for node in stack.nodes for submit in node.submits]
    assert len(submits) == REQUESTS
    assert {(submit.sampling.max_tokens, submit.sampling.stop_token_ids) for submit in submits} == {
        (TOKENS, ())
    }
