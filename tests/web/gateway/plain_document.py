"""What schemathesis is told of the gateway's bodies: it asks whatever a schema allows, and takes a refusal for a fault.

The document names every parameter with its type. Which of their values go together (min_tokens is at most max_tokens),
which grammars compile and what a prompt leaves room for no schema can say: here those have few values, or none.
"""

from __future__ import annotations

from typing import Any

import schemathesis

from web.describe import STRING, Schema
from web.gateway.openai.structured import DEMANDS

BEYOND = (
    "min_tokens",
    "best_of",
    "bad_words",
    "truncate_prompt_tokens",
    *(set(DEMANDS) - {"response_format"}),
)


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Called by schemathesis, which finds this module in its environment."""
    schemas = raw_schema["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        properties = schemas[name]["properties"]
        for beyond in BEYOND:
            del properties[beyond]
        kinds = {"properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]}
        free = {"type": "object", **kinds, "additionalProperties": False}
        properties["response_format"] = {"anyOf": [free, {"type": "null"}]}
    for name in ("ChatRequest", "TokenizeRequest"):
        del schemas[name]["properties"]["continue_final_message"]
    del schemas["ChatRequest"]["properties"]["chat_template"]
    _responses(schemas["ResponsesRequest"]["properties"])


def _responses(properties: dict[str, Schema]) -> None:
    """A text as input, and no tools."""
    message = {
        "type": "object",
        "properties": {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": STRING},
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    properties["input"] = {"anyOf": [STRING, {"type": "array", "items": message, "minItems": 1}]}
    properties["text"] = {
        "enum": [None, {}, {"format": {"type": "text"}}, {"format": {"type": "json_object"}}]
    }
    properties["include"] = {"enum": [None, [], ["message.output_text.logprobs"]]}
    properties["tools"] = {"enum": [None]}
    properties["tool_choice"] = {"enum": [None, "none", "auto"]}
    for beyond in ("chat_template_kwargs", "max_output_tokens"):
        del properties[beyond]
