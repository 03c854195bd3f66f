"""langchain-openai: structured output, tools, streams, through chats and through responses."""

import os

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Event(BaseModel):
    """An event."""

    name: str
    day: int


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


for responses in (False, True):
    model = ChatOpenAI(
        model="kevlar-demo",
        base_url=f"{os.environ['URL']}/v1",
        api_key=os.environ["KEY"],
        max_retries=0,
        use_responses_api=responses,
    )
    assert model.invoke("Say something").text == "One moment."
    parts = list(model.stream("Say something"))
    assert "".join(part.text for part in parts) == "One moment."
    methods = ("json_schema",) if responses else ("json_schema", "function_calling", "json_mode")
    for method in methods:
        found = model.with_structured_output(Event, method=method).invoke("An event, as JSON")
        assert found == Event(name="ball", day=3), (method, found)
    bound = model.bind_tools([get_weather])
    messages = [HumanMessage("Weather?")]
    answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Köln"}), call
    grown = None
    for part in bound.stream(messages):
        grown = part if grown is None else grown + part
    assert [(c["name"], c["args"]) for c in grown.tool_calls] == [("get_weather", {"city": "Köln"})]
    messages += [answer, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert bound.invoke(messages).text == "It rains in Köln."
    try:
        model.invoke("word " * 5000)
    except ContextOverflowError:
        continue
    raise AssertionError("a prompt that is too long was not known as such")
print("ok")
