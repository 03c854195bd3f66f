"""The gateway's OpenAPI document (pure)."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from web.describe import (
    ANY,
    EVENTS,
    INTEGER,
    JSON,
    STRING,
    TEXT,
    Api,
    Endpoint,
    Schema,
    array,
    nullable,
    parameter,
    record,
    ref,
)
from web.gateway.model import Model
from web.gateway.openai.requests import (
    CHOICES_MAX,
    IGNORED,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from web.gateway.openai.responses_request import INCLUDE_MAX, INCLUDED, STORED, ResponsesRequest
from web.gateway.openai.sampling import BIAS_MAX
from web.gateway.openai.structured import DEMANDS

OUTPUT_TOKENS = frozenset({"max_tokens", "min_tokens", "max_completion_tokens", "max_output_tokens"})
ROLES = ("system", "developer", "user", "assistant", "tool")  # a template may know others
BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
GENERATION_ERRORS = (403, 404, 409, 410, 422, 429)
# What no schema can say of a parameter, as it depends on others, on the prompt, or on the operator.
MORE_OF = {
    "min_tokens": "At most max_tokens: before so many tokens nothing stops the output.",
    "best_of": "At least n: so many are generated, and the n best of them answered; in a stream it is n.",
    "bad_words": "Texts that the output must not contain.",
    "truncate_prompt_tokens": "How many of a prompt's tokens are kept; -1: as many as fit.",
    "continue_final_message": "The answer goes on with the last message; not beside add_generation_prompt.",
    "chat_template": "Where the operator allows it (gateway.request_chat_template).",
    "max_output_tokens": "At most what the input leaves room for.",
    **dict.fromkeys(
        DEMANDS, "What the output has to be: one of such parameters (docs/structured-output.md)."
    ),
    "guided_whitespace_pattern": "What may stand between the parts of guided_json.",
}
LAST_EVENT_ID = parameter(
    "Last-Event-ID", "header", STRING, "The id of the last event that came: the stream goes on after it."
)
# Said in words: a second body under the same key is refused, which no schema of one request can say.
IDEMPOTENCY_KEY = (
    "The header Idempotency-Key (1 to 255 printable ASCII characters, best a UUID) makes it safe to send the same body"
    " again: it is computed once, and answered the same. Another body under the same key is refused with 422."
)
REQUEST_ID = parameter("X-Request-Id", "header", STRING, "What the answer's id is made of, if it can be.")


def document(model: Model, version: str, priority_floor: int) -> dict[str, Any]:
    code = {"anyOf": [INTEGER, STRING]}
    error = record({"message": STRING, "type": STRING, "param": nullable(STRING), "code": code})
    return Api(
        "KevlarFlow gateway", version, _endpoints(), _schemas(model, priority_floor), record({"error": error})
    ).document()


def _endpoints() -> list[Endpoint]:
    counts = {
        "type": "object",
        "additionalProperties": INTEGER,
    }  # reachable pipelines, where there are several models
    health = {
        200: {
            JSON: record(
                {"status": STRING}, {"pipelines": INTEGER, "reasons": array(STRING), "models": counts}
            )
        }
    }
    model = {200: {JSON: ref("Model")}}
    name = parameter("name", "path", STRING, "The model's.")
    stream = parameter("stream", "path", STRING, "As Content-Location had it.")
    headers = (LAST_EVENT_ID, REQUEST_ID)
    return [
        Endpoint("GET", "/livez", "Whether the process answers", health, open=True),
        Endpoint("GET", "/readyz", "Whether a request could be served", health, open=True),
        Endpoint("GET", "/health", "Whether a request could be served", health, open=True),
        Endpoint("GET", "/version", "The release", {200: {JSON: record({"version": STRING})}}, open=True),
        Endpoint(
            "GET",
            "/load",
            "Requests under way: all, or a client's own",
            {200: {JSON: record({"server_load": INTEGER})}},
        ),
        Endpoint("GET", "/metrics", "For Prometheus", {200: {TEXT: STRING}}, (403,)),
        Endpoint("GET", "/v1/models", "The model", {200: {JSON: record({"data": array(ref("Model"))})}}),
        Endpoint("GET", "/v1/models/{name}", "The model", model, (403, 404), parameters=(name,)),
        Endpoint(
            "POST",
            "/v1/completions",
            "Complete prompts",
            _generated("Completion"),
            GENERATION_ERRORS,
            ref("CompletionRequest"),
            headers,
            description=IDEMPOTENCY_KEY,
        ),
        Endpoint(
            "POST",
            "/v1/chat/completions",
            "Answer a conversation",
            _generated("ChatCompletion"),
            GENERATION_ERRORS,
            ref("ChatRequest"),
            headers,
            description=IDEMPOTENCY_KEY,
        ),
        Endpoint(
            "POST",
            "/v1/responses",
            "Answer a conversation, which is stored nowhere",
            _generated("Response"),
            GENERATION_ERRORS,
            ref("ResponsesRequest"),
            headers,
            description=IDEMPOTENCY_KEY,
        ),
        Endpoint(
            "GET",
            "/v1/streams/{stream}",
            "The rest of a stream",
            {200: {EVENTS: ANY}},
            GENERATION_ERRORS,
            parameters=(stream, LAST_EVENT_ID),
        ),
        Endpoint(
            "POST",
            "/tokenize",
            "Token ids of a text",
            {200: {JSON: ref("Tokens")}},
            (403, 404, 429),
            ref("TokenizeRequest"),
        ),
        Endpoint(
            "GET",
            "/tokenizer_info",
            "Special tokens and the chat template",
            {200: {JSON: ref("Tokenizer")}},
            (403,),
        ),
        Endpoint(
            "POST",
            "/detokenize",
            "The text of token ids",
            {200: {JSON: record({"prompt": STRING})}},
            (403, 404, 429),
            ref("DetokenizeRequest"),
        ),
    ]


def _relate(schemas: dict[str, Schema], model: Model) -> None:
    """What the types do not say: the model's numbers, and which parameters go together."""
    null, true, no = {"type": "null"}, {"const": True}, {"enum": [None, False]}
    no_usage = {"anyOf": [null, {"properties": {"include_usage": no}}]}
    streaming = [
        {"properties": {"stream": true}, "required": ["stream"]},
        {"properties": {"stream_options": no_usage}},
    ]
    unstreamed = [{"properties": {"stream": no}}, {"properties": {"prompt_logprobs": null}}]
    top = [
        {"properties": {"logprobs": true}, "required": ["logprobs"]},
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
    ]
    some = [
        {"properties": {"max_tokens": {"anyOf": [null, {"type": "integer", "minimum": 1}]}}},
        {"properties": {"echo": true}, "required": ["echo"]},
        {"properties": {"prompt_logprobs": {"type": "integer"}}, "required": ["prompt_logprobs"]},
    ]
    schemas["CompletionRequest"]["allOf"] = [{"anyOf": choice} for choice in (streaming, unstreamed, some)]
    schemas["ChatRequest"]["allOf"] = [{"anyOf": choice} for choice in (streaming, unstreamed, top)]
    schemas["TokenizeRequest"]["oneOf"] = [
        {"properties": {"prompt": STRING, "messages": null}, "required": ["prompt"]},
        {"properties": {"prompt": null, "messages": {"type": "array"}}, "required": ["messages"]},
    ]
    schemas["Message"]["properties"]["role"] = {"enum": list(ROLES)}
    if not model.calls_tools:
        for name in ("ChatRequest", "ResponsesRequest", "TokenizeRequest"):
            schemas[name]["properties"]["tools"] = {
                "enum": [None, []],
                "description": "This model cannot be told of tools.",
            }
        for name in ("ChatRequest", "ResponsesRequest"):
            schemas[name]["properties"]["tool_choice"] = {"enum": [None, "none", "auto"]}
    zeros = 9 - len(str(model.vocab_size))  # that may stand before
    below = f"^0{{0,{zeros}}}(?:{_below(model.vocab_size)})$"
    for name in ("CompletionRequest", "ChatRequest"):
        properties = schemas[name]["properties"]
        _demands(schemas[name])
        _items(properties["stop_token_ids"], model.vocab_size - 1)
        for branch in properties["truncate_prompt_tokens"]["anyOf"]:
            if branch.get("type") == "integer":
                branch["not"] = {"const": 0}
        for branch in properties["logit_bias"]["anyOf"]:
            if branch.get("type") == "object":
                branch["propertyNames"] = {"pattern": below}
                branch["additionalProperties"] |= {"minimum": -BIAS_MAX, "maximum": BIAS_MAX}
    _responses(schemas["ResponsesRequest"]["properties"])
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]
    _items(prompt, model.vocab_size - 1)
    for branch in prompt["anyOf"]:
        if branch["type"] == "array":
            branch["minItems"] = 1
            if branch["items"]["type"] == "array":
                branch["items"]["minItems"] = 1
            if branch["items"]["type"] != "integer":
                branch["maxItems"] = CHOICES_MAX
    _items(schemas["DetokenizeRequest"]["properties"]["tokens"], model.vocab_size - 1)


def _responses(properties: dict[str, Schema]) -> None:
    """Nothing is stored, so what refers to something that is has but the values that say nothing."""
    for name in STORED:
        properties[name] = {"enum": [None]}
    for name in ("store", "background"):
        properties[name] = {"enum": [None, False]}
    properties["include"] = nullable(array({"enum": sorted(INCLUDED)}) | {"maxItems": INCLUDE_MAX})
    properties["truncation"] = {"enum": [None, "disabled"]}


def _demands(schema: Schema) -> None:
    """Whose output has to be something ends with it."""
    any_text = {"anyOf": [{"type": "null"}, {"properties": {"type": {"const": "text"}}}]}
    schema["allOf"].append(
        {
            "anyOf": [
                {"properties": {"response_format": any_text}},
                {"properties": {"ignore_eos": {"enum": [None, False]}}},
            ]
        }
    )


def _below(limit: int) -> str:
    """A regular expression for the decimal numbers below `limit` (at least 1)."""
    digits, parts = str(limit), []
    for at, digit in enumerate(map(int, digits)):
        lowest = 1 if at == 0 and len(digits) > 1 else 0
        if digit > lowest:
            rest = len(digits) - at - 1
            parts.append(f"{digits[:at]}[{lowest}-{digit - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    if len(digits) > 1:
        parts.append(f"[0-9]{{1,{len(digits) - 1}}}")
    return "|".join(parts)


def _items(schema: Schema, maximum: int) -> None:
    """Bound the integers in (lists of) lists."""
    for branch in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        _items(branch, maximum)
    if schema.get("type") == "integer":
        schema["maximum"] = maximum


def _generated(schema: str) -> dict[int, dict[str, Schema]]:
    return {200: {JSON: ref(schema), EVENTS: ANY}}


def _schemas(model: Model, priority_floor: int) -> dict[str, Schema]:
    _, bodies = models_json_schema(
        [(kind, "validation") for kind in BODIES], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Schema] = bodies["$defs"]
    for kind in BODIES:
        properties = schemas[kind.__name__]["properties"]
        for name in sorted(IGNORED - set(properties)):
            properties[name] = {"description": "Accepted, and without effect here."}
        for name in sorted(set(UNSUPPORTED) - set(properties)):
            neutral = [value for value in UNSUPPORTED[name] if not isinstance(value, float)]
            properties[name] = {
                "enum": [None, *neutral],
                "description": "Not supported but for what says nothing.",
            }
    _relate(schemas, model)
    for name in ("CompletionRequest", "ChatRequest", "ResponsesRequest"):
        for branch in schemas[name]["properties"]["priority"]["anyOf"]:
            if branch["type"] == "integer":
                branch["minimum"] = priority_floor
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["description"] = (
            f"Prompt and output together have at most {model.max_model_len} tokens."
        )
    schemas["ResponsesRequest"]["description"] = (
        f"Input and output together have at most {model.max_model_len} tokens. Beside texts, input takes calls and"
        " their results."
    )
    for kind in BODIES:
        properties = schemas[kind.__name__]["properties"]
        for name in MORE_OF.keys() & kind.model_fields:
            properties[name]["description"] = MORE_OF[name]
        for name in OUTPUT_TOKENS & set(kind.model_fields):
            _bound(properties[name], model.max_model_len - 1)
    usage = record(
        {"prompt_tokens": INTEGER, "total_tokens": INTEGER, "completion_tokens": INTEGER},
        {
            "prompt_tokens_details": record({"cached_tokens": INTEGER}),
            "completion_tokens_details": record({"reasoning_tokens": INTEGER}),
        },
    )
    choice = record(
        {"index": INTEGER, "finish_reason": nullable(STRING), "logprobs": ANY},
        {"stop_reason": ANY, "token_ids": array(INTEGER)},
    )
    answer = {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING, "usage": usage}
    function = record({"name": STRING, "arguments": STRING})
    call = record({"id": STRING, "type": STRING, "function": function})
    spoken = record(
        {"role": STRING, "content": nullable(STRING)},
        {"reasoning_content": STRING, "tool_calls": array(call)},
    )
    return schemas | {
        "Model": record({"id": STRING, "object": STRING, "created": INTEGER, "max_model_len": INTEGER}),
        "Tokens": record(
            {"count": INTEGER, "max_model_len": INTEGER, "tokens": array(INTEGER)},
            {"token_strs": nullable(array(nullable(STRING)))},
        ),
        "Completion": record({**answer, "choices": array(_with(choice, "text", STRING))}),
        "Tokenizer": record({"tokenizer_class": STRING, "chat_template": nullable(STRING)}),
        "Response": record({"id": STRING, "object": STRING, "status": STRING, "output": array(ANY)}),
        "ChatCompletion": record({**answer, "choices": array(_with(choice, "message", spoken))}),
    }


def _with(schema: Schema, name: str, member: Schema) -> Schema:
    return record({**{key: schema["properties"][key] for key in schema["required"]}, name: member})


def _bound(schema: Schema, maximum: int) -> None:
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") == "integer":
            branch["maximum"] = maximum
