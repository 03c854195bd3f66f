"""Models that say what a test wrote down: the demo's tokenizer, a chat template, and nodes that follow a script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dataplane.demo
from controlplane.contract.config import ClusterConfig, GatewayConfig
from controlplane.contract.requests import Submit
from web.gateway.model import Model, load_model

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

# As Qwen's, as far as tools and reasoning go.
QWEN = """{%- if tools %}<|system|># Tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}
For each function call, return a json object within <tool_call></tool_call>.<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- elif m.role == 'tool' %}<|user|><tool_response>{{ m.content }}</tool_response><|end|>
{%- else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# As Llama 3.1's.
LLAMA = """{{ bos_token }}{% if tools is not none %}<|system|>Respond in the format {"name": function name,
"parameters": dictionary of argument name and its value}.{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}
<|end|>{% endif %}{% for m in messages %}<|user|>{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}
{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|end|>
{% endfor %}"""
PYTHONIC = """{% if tools %}[func_name1(params_name1=params_value1)]{{ tools | tojson }}{% endif %}
{% for m in messages %}{{ m.content }}{% endfor %}"""
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}
{% if m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}
{{ raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
{{ c.function | tojson }}{% endfor %}]{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""
# Models that always reason: the prompt ends within.
REASONER = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|><think>\n{# </think> #}"


def scripted_model(folder: Path, template: str, **settings: Any) -> Model:
    """The demo's, with another `template`; `settings`: of the gateway."""
    for name in FILES:
        shutil.copyfile(dataplane.demo.model_dir() / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    gateway = GatewayConfig(**settings)
    return load_model(
        ClusterConfig(
            run_dir="/nonexistent",
            model=str(folder),
            served_model_name="kevlar-demo",
            etcd=(),
            gateway=gateway,
        )
    )


def says(model: Model, *texts: str) -> Callable[[Submit, int], int]:
    """Which token comes: choice k of a request (by its seed) says text k, and then ends."""
    scripts = [model.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def speak(submit: Submit, position: int) -> int:
        ids = scripts[submit.sampling.seed % len(scripts)]
        return ids[position] if position < len(ids) else model.eos_token_ids[0]

    return speak


@dataclass
class JoinedChoice:
    text: str = ""
    reasoning: str = ""
    tokens: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list, compare=False)  # of each call: each stream has its own
    finish: list[str] = field(default_factory=list)

    def add(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        self.text += delta.get("content") or ""
        self.reasoning += delta.get("reasoning_content") or ""
        self.tokens += choice.get("token_ids") or []
        self.finish += [choice["finish_reason"]] if choice["finish_reason"] else []
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(self.ids), "it is told once"
                self.ids.append(part["id"])
                self.names.append(part["function"]["name"])
                self.arguments.append("")
            self.arguments[part["index"]] += part["function"]["arguments"]


@dataclass
class Joined:
    """All that a client of a chat stream has in the end, however it was cut into events."""

    choices: dict[int, JoinedChoice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    done: int = 0


def joined(events: Sequence[tuple[str, str]]) -> Joined:
    """`events`: of each its id and its data."""
    made = Joined()
    for _, data in events:
        if data == "[DONE]":
            made.done += 1
            continue
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        made.usage = chunk.get("usage") or made.usage
        for choice in chunk["choices"]:
            made.choices.setdefault(choice["index"], JoinedChoice()).add(choice)
    return made
