"""The agents SDK: an agent with a tool and one with a typed output, through responses and through chats."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
asked: list[str] = []


class Event(BaseModel):
    name: str
    day: int


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "rain"


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model = kind(model="kevlar-demo", openai_client=client)
        agent = Agent(name="a", instructions="Be brief.", tools=[get_weather], model=model)
        result = await Runner.run(agent, "Weather?")
        assert result.final_output == "It rains in Köln.", result
        streamed = Runner.run_streamed(agent, "Weather?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "It rains in Köln."
        typed = Agent(name="b", output_type=Event, model=model)
        assert (await Runner.run(typed, "An event")).final_output == Event(name="ball", day=3)
        # It asks for a call and says what its answer will have to be; when the tool was called it asks for that alone.
        settings = ModelSettings(tool_choice="required")
        both = Agent(name="c", output_type=Event, tools=[get_weather], model=model, model_settings=settings)
        assert (await Runner.run(both, "Weather?")).final_output == Event(name="ball", day=3)
    assert asked == ["Köln"] * 6, asked


asyncio.run(main())
print("ok")
