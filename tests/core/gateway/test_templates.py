"""Chat templates as transformers renders them, and what becomes of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from controlplane.contract.errors import ConfigError, RequestError
from tests.web.gateway.scripted import LLAMA, MISTRAL, QWEN
from web.gateway.openai.messages import plain
from web.gateway.openai.requests import ChatRequest, parse
from web.gateway.openai.tools import tool_use
from web.gateway.text.template import ChatTemplate, load_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Grüße <b>&</b> 'quoted' \"twice\""},
    {"role": "assistant", "content": "  ok \n"},
    {"role": "user", "content": "And {{ now }} {% if %}?"},
]
TEMPLATES = {
    "powers": "{{ 2 ** 10 }} {{ 1.5 ** 2 }} {{ 10 ** -1 }}{% if messages|length ** 2 > 4 %} long{% endif %}",
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message ="
        " messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
        " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "training marks": """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {%- else %}
{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '\\n' }}
    {%- endif %}
{% endfor %}""",
    "namespace": (
        "{%- set ns = namespace(first=true, system='', n=0) %}{%- for m in messages %}{%- if m.role == 'system' %}"
        "{%- set ns.system = ns.system ~ m.content %}{%- else %}{%- set ns.n = ns.n + 1 %}{%- if ns.first %}"
        "{%- set ns.first = false %}{{ ns.system }}{%- endif %}{{ ns.n }}:{{ m.content | trim }}{%- endif %}"
        "{%- endfor %}"
    ),
    "filters": (
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ messages[1] | tojson(ensure_ascii=true) }}|"
        "{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':'), sort_keys=True) }}|{{ messages[1] | tojson(true) }}|"
        "{{ messages | map(attribute='role') | join(',') }}|{{ messages | selectattr('role', 'equalto', 'user') |"
        " list | length }}|{{ messages | map(attribute='role') | unique | sort | join }}|{{ 'a b' | title }}|"
        "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | map('trim') | list }}|"
        "{{ dict(a=1, b=2) | items | list }}|{{ dict.fromkeys(['x', 'y'], 0) }}|{{ [3, 1] | sort | first }}|"
        "{{ messages[1].content | e }}|{{ 'x' | indent(4, true) }}|{{ none | default('d', true) }}|{{ 7 // 2 }}"
    ),
    "loops": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}"
        "{{ loop.length }}{{ loop.nextitem is defined }}{% if loop.index == 3 %}{% break %}{% endif %}{% else %}none"
        "{% endfor %}"
        "{% for m in messages | reverse %}{{ loop.revindex }}{{ m.role[0] }}{% endfor %}"
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}{% for x in nothing %}x{% endfor %}"
        "{% for m in messages[::-1] recursive %}{{ m.role }}{% if loop.depth0 == 0 %}{{ loop(messages[:1]) }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "macros": (
        "{% macro one(m, end='.') %}{{ caller() if caller else m.role }}{{ end }}{% endmacro %}"
        "{% for m in messages %}{{ one(m) }}{% call one(m, end='!') %}<{{ m.content }}>{% endcall %}{% endfor %}"
        "{% set text %}  kept {{ bos_token }} {% endset %}{{ text }}{% filter upper %}up{% endfilter %}"
    ),
    "blocks": "   {% if true %}\n  a\n   {% endif %}\n\tb {# said #}\n  {%- set x = 1 -%}  c{{ x }}\n\n",
    "undefined": "[{{ nothing }}{{ messages[0].nothing }}{{ tools }}{{ documents }}{{ pad_token is defined }}]",
    "texts": (
        "{{ messages[0].content.strip().split(' ')[-1].replace('.', '').upper() }}{{ messages[1]['content'][:5] }}"
        "{{ 'x'.join(['1', '2']) }}{{ '%s-%02d' % ('a', 5) }}{{ 'a' in messages[0].content }}{{ 'Be' ~ 1 ~ none }}"
        "{{ messages[2].content.rstrip() + '|' }}{{ 'abc'.startswith('a') }}{{ 'a' * 3 }}{{ [1] + [2] }}"
    ),
    "thinking": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ n }}",
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    ),
}


WHOLE_TALK = {"filters", "loops", "texts"}  # they look at what only the first conversation has


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [False, True])
def test_as_transformers_renders_it(name: str, generation: bool) -> None:
    extra: dict[str, Any] = {"enable_thinking": False, "n": [1, {"é": None}]} if name == "thinking" else {}
    for talk in (TALK, TALK[1:2], TALK[:2]):
        rendered, _ = render_jinja_template(
            [talk], chat_template=TEMPLATES[name], add_generation_prompt=generation, **SPECIAL, **extra
        )
        assert ChatTemplate(TEMPLATES[name], SPECIAL, 10_000).render(talk, generation, extra) == rendered[0]
        if name in WHOLE_TALK:
            break


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ dict.mro() }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.more }}",
        "{% for x in 5 %}{% endfor %}",
        "{{ messages | tojson(nothing=1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_what_transformers_refuses_is_refused(source: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - theirs may be any
        render_jinja_template([TALK], chat_template=source, **SPECIAL)
    with pytest.raises(RequestError, match="refuses these messages"):
        ChatTemplate(source, SPECIAL, 10_000).render(TALK)


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "f", "description": "ü", "parameters": {"type": "object", "properties": {}}},
    },
    {"type": "function", "function": {"name": "g"}},
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": "abcdefgh1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": ["ü", null]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "rain"},
]


@pytest.mark.parametrize("source", [QWEN, LLAMA, MISTRAL], ids=["qwen", "llama", "mistral"])
def test_tools_as_transformers_renders_them(source: str) -> None:
    """Of a conversation as a client sends it: arguments are text there, and an object for templates."""
    request = parse(ChatRequest, json.dumps({"messages": CALLED, "tools": TOOLS}).encode())
    use = tool_use(request.tools, request.tool_choice)
    assert use is not None
    assert use.described == TOOLS
    template = ChatTemplate(source, SPECIAL, 10_000)
    assert template.takes_tools
    ours = template.render(plain(request.messages, False, True), True, None, use.described)
    theirs = [CALLED[0], CALLED[1] | {"content": ""}, CALLED[2]]
    call = theirs[1]["tool_calls"][0]
    theirs[1]["tool_calls"] = [call | {"function": {"name": "f", "arguments": {"a": ["ü", None]}}}]
    rendered, _ = render_jinja_template(
        [theirs], tools=TOOLS, chat_template=source, add_generation_prompt=True, **SPECIAL
    )
    assert ours == rendered[0]
    assert "ü" in ours


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_both_names_in_templates(name: str) -> None:
    source = "{% for m in messages %}[{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.thinking is defined }}]"
    source += "{% endfor %}"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "Hm."}]
    messages = parse(ChatRequest, json.dumps({"messages": said}).encode()).messages
    rendered, _ = render_jinja_template([said], chat_template=source)
    assert ChatTemplate(source, {}, 1000).render(plain(messages, False, True)) == rendered[0]


@pytest.mark.parametrize("arguments", ["{'a': 1}", '{"a": ', "[" * 100_000])
def test_arguments_that_are_no_json_stay_text(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    seen = plain(parse(ChatRequest, json.dumps(body).encode()).messages, False, True)
    assert seen[0]["tool_calls"][0]["function"]["arguments"] == arguments


MANY = [{"role": "user", "content": "x" * 40}] * 20_000


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for k in messages %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}",
        "{% for m in messages %}{% set rest = messages[loop.index0:] %}{% endfor %}",
        "{% for m in messages %}{% if messages | map(attribute='role') | list %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if messages | join %}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for a in messages | map('upper') %}{% for b in messages | map('upper') %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set x = messages | tojson %}{% endfor %}",
    ],
)
def test_work_is_bounded(source: str) -> None:
    with pytest.raises(RequestError, match=r"too much work|recursion"):
        ChatTemplate(source, SPECIAL, 10**9).render(MANY)


# As Qwen3's: it looks for the last question from the end, and asks how many messages there are for each.
FROM_THE_END = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {%- set tool_call = tool_call.function %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""
CALLS_F = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TURNS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nyes"},
    ],
    "agent": [
        {"role": "assistant", "content": "", "tool_calls": [CALLS_F]},
        {"role": "tool", "content": "ok", "tool_call_id": "c"},
    ],
    "many calls": [{"role": "assistant", "content": "", "tool_calls": [CALLS_F] * 100}] * 2,
}


@pytest.mark.parametrize(("turns", "times"), [("chat", 2000), ("agent", 2000), ("many calls", 60)])
def test_work_grows_with_the_conversation(turns: str, times: int) -> None:
    talk = [{"role": "user", "content": "go"}, *TURNS[turns] * times]
    rendered, _ = render_jinja_template([talk], chat_template=FROM_THE_END)
    assert ChatTemplate(FROM_THE_END, {}, 10**7).render(talk) == rendered[0]


def test_long_texts_may_be_trimmed() -> None:
    """As Llama 3's template does with each message: of a million tokens, say."""
    talk = [{"role": "user", "content": " " + "x" * 100_000}] * 50
    text = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}", {}, 10**7).render(talk)
    assert text == "x" * 5_000_000


def test_parts_of_a_message_reach_templates_that_go_through_them() -> None:
    only_parts = "{% for m in messages %}{% for c in m['content'] %}[{{ c['text'] }}]{% endfor %}{% endfor %}"
    by_name = (
        "{% for m in messages %}{% set c = m.content %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endfor %}"
    )
    one = {"role": "user", "content": "a"}
    two = {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}
    messages = parse(ChatRequest, json.dumps({"messages": [one, two]}).encode()).messages
    for source, text in [
        (only_parts, "[a][b][c]"),
        (by_name, "[a][b][c]"),
        (TEMPLATES["parts"], "abc"),
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", "a|b\nc|"),
    ]:
        template = ChatTemplate(source, SPECIAL, 1000)
        assert template.render(plain(messages, template.goes_through_parts, template.takes_strings)) == text


# Where templates are


def folder_with(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, "a")).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


NAMED = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T"}]
ADDED = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config.json": {
                "chat_template": "A{{ bos_token }}{{ eos_token is defined }}",
                "bos_token": "<s>",
            }
        },
        {"tokenizer_config.json": {"chat_template": NAMED, "bos_token": ADDED | {"__type": "AddedToken"}}},
        {
            "tokenizer_config.json": {"chat_template": "A", "bos_token": "<s>"},
            "chat_template.jinja": "ü{{ bos_token }}\n",
        },
        {
            "tokenizer_config.json": {
                "chat_template": "{{ sep_token }}{{ cls_token }}",
                "sep_token": "S",
                "cls_token": "C",
            }
        },
        {"tokenizer_config.json": {"chat_template": "{{ bos_token }}x", "bos_token": None}},
    ],
)
def test_files_as_transformers_finds_them(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = folder_with(tmp_path / "model", files)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    template, reason = load_template(folder, 1000)
    assert (template is not None, reason) == (True, "")
    assert template is not None
    assert template.render(TALK) == theirs.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )


ALL_TOKENS = (
    "[{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ mask_token }}|{{ think_token }}|{{ image }}"
    "|{{ bos_token is defined }}]"
)
OLDER: dict[str, Any] = {"bos_token": "<s>", "eos_token": ADDED | {"content": "</s>"}, "think_token": "<t>"}


@pytest.mark.parametrize(
    ("settings", "older"),
    [
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token": "<s>"}),
        ({"bos_token": "<s>", "eos_token": "</e>"}, OLDER | {"bos_token": "</s>"}),
        ({"bos_token": None}, OLDER),
        ({"bos_token": "</s>", "think_token": "<u>"}, OLDER),
        ({"bos_token": "<x>", "eos_token": None, "added_tokens_decoder": {}}, OLDER),
        ({"extra_special_tokens": {"think_token": "<think>", "image": ADDED | {"__type": "AddedToken"}}}, {}),
        ({"extra_special_tokens": {"think_token": "<think>"}, "think_token": "<t>"}, {}),
        ({"extra_special_tokens": ["<think>"]}, {}),
        ({"model_specific_special_tokens": {"think_token": "<think>"}}, {}),
        ({"think_token": "<think>", "add_bos_token": True, "image": "<image>"}, {}),
        ({"tokenizer_class": "LlamaTokenizer"}, {}),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": None, "eos_token": "<e>"}, {}),
        ({"tokenizer_class": "GemmaTokenizer", "pad_token": "<p>"}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"bos_token": "<s>"}),
        ({"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<e>"}, {}),
    ],
)
def test_special_tokens_as_transformers_names_them(
    tmp_path: Path, settings: dict[str, Any], older: dict[str, Any]
) -> None:
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": ALL_TOKENS} | settings
    files = {"tokenizer_config.json": own, "special_tokens_map.json": older}
    folder = folder_with(tmp_path / "model", {name: said for name, said in files.items() if said})
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "a": 1}, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(TALK, tokenize=False)
    template, _ = load_template(folder, 1000)
    assert template is not None
    assert template.render(TALK, False) == theirs


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    template, _ = load_template(
        folder_with(tmp_path, {"tokenizer_config.json": {"chat_template": NAMED}}), 1000
    )
    assert template is not None
    assert (template.render(TALK), template.for_tools.render(TALK, tools=TOOLS)) == ("D", "T")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T{{ tools }}"},
            ("D", "T"),
        ),
        ({"additional_chat_templates/default.jinja": "D"}, ("D", "D")),
        (
            {
                "tokenizer_config.json": {"chat_template": "C"},
                "chat_template.jinja": "D",
                "additional_chat_templates/rag.jinja": "R",
                "additional_chat_templates/notes.txt": "N",
            },
            ("D", "D"),
        ),
    ],
)
def test_templates_in_files_of_their_own(
    tmp_path: Path, files: dict[str, Any], said: tuple[str, str]
) -> None:
    """As transformers writes several since it writes one into chat_template.jinja."""
    (tmp_path / "model" / "additional_chat_templates").mkdir(parents=True)
    folder = folder_with(tmp_path / "model", files)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    template, _ = load_template(folder, 1000)
    assert template is not None
    assert (template.render(TALK), template.for_tools.render(TALK, tools=TOOLS)[:1]) == said
    assert theirs.get_chat_template() == template.source
    assert theirs.get_chat_template(tools=TOOLS) == template.for_tools.source


def test_a_processors_template(tmp_path: Path) -> None:
    template, _ = load_template(folder_with(tmp_path, {"chat_template.json": {"chat_template": "P"}}), 1000)
    assert template is not None
    assert template.render(TALK) == "P"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no chat template"),
        ({"chat_template.jinja": "{% for %}"}, "cannot be used: .* not valid"),
        ({"chat_template.jinja": "{{ x | nothing }}"}, "cannot be used: .*nothing"),
        ({"chat_template.jinja": "{% unheard_of %}"}, "cannot be used: .*unheard_of"),
        ({"chat_template.jinja": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"}, "cannot be used"),
        ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, "none is the default: tool_use"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "not a text but a int"),
        ({"tokenizer_config.json": "{"}, "cannot be used"),
        ({"tokenizer_config.json": "[]"}, "does not hold an object"),
    ],
)
def test_a_template_that_cannot_be_used_costs_chat_only(
    tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    template, why = load_template(folder_with(tmp_path, files), 1000)
    assert template is None
    with pytest.raises(ConfigError, match=reason):
        raise ConfigError(why)
