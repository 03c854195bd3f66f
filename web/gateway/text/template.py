"""Chat templates: the model's own Jinja text, from messages to a prompt (pure but for reading the files)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from controlplane.contract.errors import ConfigError, RequestError
from web.gateway.text.surrogates import paired
from web.gateway.text.template_sandbox import Environment

OTHERS = "additional_chat_templates"  # all but the default one, where each has a file
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of their classes, where no file says anything of a name.
_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_QWEN2 = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
CLASS_TOKENS = {"GemmaTokenizer": _GEMMA, "LlamaTokenizer": _LLAMA, "Qwen2Tokenizer": _QWEN2}


class PromptTooLong(RequestError):
    """What a template made of the messages has more characters than fit into the context."""


class ChatTemplate:
    """One compiled template. Raises ConfigError if it cannot be compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], chars_max: int) -> None:
        self._environment = Environment()
        self._special_tokens = dict(special_tokens)
        self._chars_max = chars_max
        try:
            self._template = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except (
            jinja2.TemplateError,
            SyntaxError,
            RecursionError,
            TypeError,
            ValueError,
            ArithmeticError,
        ) as error:
            raise ConfigError(f"the model's chat template is not valid: {error}") from error
        self.source = source
        self.takes_tools = "tools" in meta.find_undeclared_variables(tree)
        self.knows_developers = "developer" in source
        self.for_tools = self  # what renders a conversation with tools
        # Most templates want a message's text as one string, some go through its parts, and some can do both.
        self.goes_through_parts = _loops_over_content(tree)
        self.takes_strings = not self.goes_through_parts or any(
            t.name == "string" for t in tree.find_all(nodes.Test)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now_unix_s: int | None = None,
    ) -> str:
        """The prompt for `messages` (role, content). Raises RequestError if the template refuses them.

        `tools`: functions as OpenAI's API describes them. `now_unix_s`: what time it is in the prompt; None: now.
        """
        self._environment.begin(len(tools or ()) + sum(map(_entries, messages)))
        pieces: list[str] = []
        left = self._chars_max
        now = time.time() if now_unix_s is None else now_unix_s

        def strftime_now(format: str) -> str:
            # The same at each gateway, wherever its clock hangs: a stream that goes on at another one has its prompt.
            return datetime.fromtimestamp(now, UTC).replace(tzinfo=None).strftime(format)

        given = {"strftime_now": strftime_now, **self._special_tokens, **(extra or {})}
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # `generate` and not `render`: a runaway output is stopped while it is made.
            for piece in self._template.generate(given | variables):
                self._environment.spend()
                left -= len(piece)
                if left < 0:
                    raise PromptTooLong(
                        f"what is made from the messages exceeds {self._chars_max} characters"
                    )
                pieces.append(piece)
        except RequestError:
            raise
        except Exception as error:  # whatever the template's own code raises
            text = str(error)[:300] or type(error).__name__
            raise RequestError(f"the model's chat template refuses these messages: {text}") from error
        return paired("".join(pieces))  # arguments of calls are JSON within JSON, which may have halves


def load_template(folder: Path, chars_max: int) -> tuple[ChatTemplate | None, str]:
    """The model's template, or None and why chat cannot be had: that costs nothing else."""
    try:
        settings = _settings(folder / "tokenizer_config.json")
        sources = _sources(folder, settings)
        if sources is None:
            return None, "this model has no chat template"
        special = special_tokens(folder, settings)
        template = ChatTemplate(sources["default"], special, chars_max)
        if "tool_use" in sources:
            template.for_tools = ChatTemplate(sources["tool_use"], special, chars_max)
        return template, ""
    except (ConfigError, OSError, ValueError) as error:
        return None, f"the model's chat template cannot be used: {error}"


def _sources(folder: Path, settings: dict[str, Any]) -> dict[str, str] | None:
    """By name, as transformers looks for them: files of their own, then the tokenizer's settings, then the
    processor's."""
    found = settings.get("chat_template") or _settings(folder / "chat_template.json").get("chat_template")
    if (file := folder / "chat_template.jinja").exists():
        found = file.read_text(encoding="utf-8")
    if isinstance(found, list):  # several, by name
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    beside = {path.stem: path.read_text(encoding="utf-8") for path in (folder / OTHERS).glob("*.jinja")}
    if found is None and not beside:
        return None
    if not isinstance(found, dict):
        found = {} if found is None else {"default": found}
    found |= beside
    if "default" not in found:
        raise ConfigError(f"there are several, and none is the default: {', '.join(sorted(found))[:200]}")
    for source in found.values():
        if not isinstance(source, str):
            raise ConfigError(f"it is not a text but a {type(source).__name__}")
    return found


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By the names that templates have for them, as transformers finds them: the older file counts only where
    `settings`, those of tokenizer_config.json, have no table of added tokens, and then before them."""
    older: dict[str, Any] = {}
    if "added_tokens_decoder" not in settings:
        older = _settings(folder / "special_tokens_map.json")
    tokens = {
        **CLASS_TOKENS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"), {}),
        **_named(older),
        **_object(settings, "model_specific_special_tokens"),
        **_named(settings),
        **_object(settings, "extra_special_tokens"),
        **{name: older[name] for name in SPECIAL_TOKENS if name in older},
        **_object(older, "extra_special_tokens"),
    }
    found = {}
    for name, token in tokens.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.endswith("_token")}


def _object(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Tokens by their names; some files have a list of tokens without a name there."""
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold an object")
    return data


def _entries(message: Mapping[str, Any]) -> int:
    """The message, its parts and its calls: what templates do something for."""
    inner = (message.get("content"), message.get("tool_calls"))
    return 1 + sum(len(values) for values in inner if isinstance(values, list))


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether some loop goes over a message's `content`, or over a variable made of it."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and any(map(_is_content, _and_below(assign.node))):
            names.add(assign.target.name)
    return any(
        _is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names)
        for loop in tree.find_all(nodes.For)
    )


def _is_content(node: nodes.Node) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False


def _and_below(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)
