"""lm-eval's log-likelihood tasks over local-completions: what it reads of an echo is what the model says.

It comes with `make clients`, like the others of tests/clients.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dataplane.demo
from tests.clients.test_clients import PYTHON, needs, run_quietly
from tests.e2e.cluster import Cluster

DOCS = [
    ("It was a", [" very fine day", " xq zzv kkp", " house"]),
    ("She looked at the", [" window", " old house and the garden", " of of of"]),
    ("They had been", [" married for", " very very very", " in the house"]),
    ("The old man said", [" that he would not go", " blue blue", " it"]),
]
TASK = """task: kf_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def likelihoods(context: str, choices: list[str]) -> list[tuple[float, bool]]:
    """Of each choice after the context, and whether it is what greedy decoding would have said; by transformers."""
    folder = str(dataplane.demo.model_dir())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for choice in choices:
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        whole = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        at = range(len(before) - 1, len(whole) - 1)
        total = sum(float(logprobs[i, whole[i + 1]]) for i in at)
        found.append((total, all(int(logprobs[i].argmax()) == whole[i + 1] for i in at)))
    return found


@pytest.mark.timeout(240)
def test_log_likelihoods_are_the_models(home: Cluster, tmp_path: Path) -> None:
    needs(PYTHON / "lm-eval", "lm-eval")
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps({"context": c, "choices": x}) + "\n" for c, x in DOCS))
    (tmp_path / "kf_choice.yaml").write_text(TASK.format(data=data))
    url, key = home.local.gateway_url, home.local.api_key
    arguments = (
        f"model=kevlar-demo,base_url={url}/v1/completions,num_concurrent=2,max_retries=1,auth_token={key}"
    )
    command = [str(PYTHON / "lm-eval"), "run", "--model", "local-completions", "--model_args", arguments]
    command += [
        "--tasks",
        "kf_choice",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
    ]
    command += ["--log_samples", "--batch_size", "3"]
    asyncio.run(run_quietly(*command, URL=url, KEY=key, OPENAI_API_KEY=key, HF_HOME=str(tmp_path / "hf")))
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(DOCS)
    for row, (context, choices) in zip(sorted(rows, key=lambda r: r["doc_id"]), DOCS, strict=True):
        wanted = likelihoods(context, choices)
        for (given, greedy), (logprob, is_greedy) in zip(row["filtered_resps"], wanted, strict=True):
            assert math.isclose(float(given), logprob, abs_tol=0.02), (context, row["filtered_resps"], wanted)
            assert str(greedy) == str(is_greedy)
