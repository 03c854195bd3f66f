"""Tools of a request: which there are, and whether the model has to call one (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from web.gateway.errors import ApiError, shorten
from web.gateway.openai.strict import Lenient, Neutrals, Strict, check_kind

TOOLS_MAX = 128
FUNCTIONS = frozenset({"function"})
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Function(Lenient):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class OfFunction(Lenient):
    """One of a request's tools. Those that OpenAI's own servers run, and those of free text, say so in their type."""

    neutrals: ClassVar[Neutrals] = {"defer_loading": (False,)}

    type: Literal["function"] = "function"

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, data: Any) -> Any:
        check_kind(data, FUNCTIONS, "tools", "tools")
        return data


class Tool(OfFunction):
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=TOOLS_MAX, fail_fast=True)]


class AllowedChoice(Strict):
    """Only some of the tools: as if the others had not been sent."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


Tools = Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`tools`: those that the model is told of."""

    tools: tuple[Tool, ...]
    must: bool = False  # it has to call at least one
    named: str | None = None  # the only one that it may call

    @property
    def functions(self) -> list[Function]:
        """Those that it may call."""
        return [tool.function for tool in self.tools if self.named in (None, tool.function.name)]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    @property
    def described(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> ToolUse | None:
    """None: the model is to know of no tools. Raises ApiError 400."""
    names = [tool.function.name for tool in tools or ()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"tools: there are two functions with the name {shorten(twice)}", "tools")
    chosen = choice.allowed_tools.tools if isinstance(choice, AllowedChoice) else [choice]
    for one in chosen:
        if isinstance(one, NamedChoice) and (wanted := one.function.name) not in names:
            raise ApiError(400, f"tool_choice: no tool has the name {shorten(wanted)}", "tool_choice")
    if isinstance(choice, NamedChoice):
        return ToolUse(tuple(tools or ()), must=True, named=choice.function.name)
    if isinstance(choice, AllowedChoice):
        allowed = {one.function.name for one in choice.allowed_tools.tools}
        tools, choice = (
            [tool for tool in tools or () if tool.function.name in allowed],
            choice.allowed_tools.mode,
        )
    if not tools:
        if choice == "required":
            raise ApiError(400, "tool_choice: required needs tools", "tool_choice")
        return None
    return None if choice == "none" else ToolUse(tuple(tools), must=choice == "required")
