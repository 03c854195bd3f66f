"""litellm, as a proxy or a library calls a server of vLLM's kind."""

import json
import os

import litellm
from pydantic import BaseModel

COMMON = {
    "model": "hosted_vllm/kevlar-demo",
    "api_base": f"{os.environ['URL']}/v1",
    "api_key": os.environ["KEY"],
}
COMMON |= {"num_retries": 0}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class Event(BaseModel):
    name: str
    day: int


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


whole = litellm.completion(messages=asked("Say something"), **COMMON)
assert whole.choices[0].message.content == "One moment.", whole
parts = litellm.completion(messages=asked("Say something"), stream=True, **COMMON)
assert "".join(part.choices[0].delta.content or "" for part in parts) == "One moment."
made = litellm.completion(messages=asked("An event"), response_format=Event, **COMMON)
assert Event.model_validate_json(made.choices[0].message.content) == Event(name="ball", day=3)
messages = asked("Weather?")
first = litellm.completion(messages=messages, tools=[TOOL], **COMMON).choices[0]
assert first.finish_reason == "tool_calls", first
(call,) = first.message.tool_calls
assert json.loads(call.function.arguments) == {"city": "Köln"}
messages += [first.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
last = litellm.completion(messages=messages, tools=[TOOL], **COMMON)
assert last.choices[0].message.content == "It rains in Köln.", last
for limit, prompt in ((99_999, "Say something"), (4, "word " * 5000)):
    for stream in (False, True):
        try:
            litellm.completion(messages=asked(prompt), max_tokens=limit, stream=stream, **COMMON)
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError("a prompt that is too long was not known as such")
response = litellm.responses(
    model="openai/kevlar-demo", input="Say something", api_base=COMMON["api_base"], api_key=COMMON["api_key"]
)
assert response.output[0].content[0].text == "One moment.", response
print("ok")
