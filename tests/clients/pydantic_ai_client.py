"""pydantic-ai: an agent with a tool, its conversation, and typed outputs, through chats and through responses."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

asked: list[str] = []


class Event(BaseModel):
    name: str
    day: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "rain"


async def main() -> None:
    provider = OpenAIProvider(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"])
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("kevlar-demo", provider=provider)
        for output in (NativeOutput(Event), PromptedOutput(Event), ToolOutput(Event, name="Event")):
            typed = Agent(model, output_type=output, retries=0)
            assert (await typed.run("An event")).output == Event(name="ball", day=3), output
        agent = Agent(model, tools=[get_weather])
        first = await agent.run("Weather?")
        assert first.output == "It rains in Köln."
        assert (await agent.run("And now?", message_history=first.all_messages())).output == first.output
        async with agent.run_stream("Weather?") as streamed:
            assert await streamed.get_output() == first.output
        assert first.usage.output_tokens > 0
    assert asked == ["Köln"] * 4, asked


asyncio.run(main())
print("ok")
