"""instructor: typed answers by tools, by schemas and by free JSON, whole and as they grow; chats and responses."""

import os

import instructor
import openai
from pydantic import BaseModel


class Event(BaseModel):
    """An event."""

    name: str
    day: int


client = openai.OpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
asked = {
    "model": "kevlar-demo",
    "messages": [{"role": "user", "content": "An event"}],
    "response_model": Event,
}
for name in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "RESPONSES_TOOLS"):
    typed = instructor.from_openai(client, mode=instructor.Mode[name])
    made = typed.chat.completions.create(**asked, max_retries=0)
    assert (made.name, made.day) == ("ball", 3), (name, made)
    if name == "JSON_SCHEMA":  # of tools its stream makes a class of another name than the tool has
        grown = list(typed.chat.completions.create_partial(**asked, max_retries=0))
        assert (grown[-1].name, grown[-1].day) == ("ball", 3), grown
print("ok")
