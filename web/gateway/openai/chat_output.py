"""What the output of a chat may be, and what is told apart in it."""

from __future__ import annotations

from collections.abc import Sequence

from web.gateway.errors import ApiError
from web.gateway.model import Model
from web.gateway.openai.grammar_check import checked, demand_of
from web.gateway.openai.requests import ChatRequest
from web.gateway.openai.structured import text_of
from web.gateway.openai.tool_grammar import Calls, Reasoning, output_grammar
from web.gateway.openai.tools import ToolUse, tool_use
from web.gateway.text.detok import ends_with
from web.gateway.text.parsers.output import OutputRules


def check_tools(model: Model, use: ToolUse) -> None:
    """Raises ApiError 400: the model cannot be told of tools, or it is not known how it calls them."""
    if model.template is not None and not model.template.for_tools.takes_tools:
        raise ApiError(400, "tools: this model's chat template knows of no tools", "tools")
    if model.output.tools is None:
        text = "tools: it is not known how this model writes calls (gateway.tool_parser)"
        raise ApiError(400, text, "tools")


def output_rules(request: ChatRequest, model: Model) -> OutputRules | None:
    """What is told apart in the answer to `request`; None: nothing is."""
    use, reasoning = tool_use(request.tools, request.tool_choice), model.output.reasoning
    if use is None:
        return OutputRules(reasoning) if reasoning is not None else None
    return OutputRules(
        reasoning, model.output.tools, use.names, _calls_max(request, use), use.named is not None
    )


async def chat_grammar(model: Model, request: ChatRequest, prompt: Sequence[int], owner: bytes) -> str:
    """`Sampling.grammar`: of reasoning, and then calls, or an answer as it is asked for. "": anything. Raises ApiError.

    Where calls are not needed they are no part of it unless the answer is held to a grammar, too.
    """
    use, demand = tool_use(request.tools, request.tool_choice), demand_of(request)
    must = use is not None and use.must
    if must and demand is not None and demand.param == "response_format":
        demand = None  # it says what an answer is, and there comes none: agents ask for both until a tool was called
    if demand is None and not must:
        return ""
    if demand is not None and must:
        text = f"{demand.param} says what an answer is, and tool_choice wants calls: give one of them"
        raise ApiError(400, text, demand.param)
    if must and request.ignore_eos:
        raise ApiError(
            400, "ignore_eos cannot go with tool_choice, which says where the text ends", "ignore_eos"
        )
    calls = None
    if use is not None and model.output.tools is not None:
        calls = Calls(model.output.tools, use.functions, _calls_max(request, use), must)
    reasoning = _reasoning(model, prompt)

    def make() -> str:
        answer = text_of(demand) if demand is not None else ""
        if calls is None and reasoning is None:
            return answer
        return output_grammar(answer, calls, reasoning, model.special_marks)

    return await checked(model, make, demand.param if demand is not None else "tool_choice", owner)


def _calls_max(request: ChatRequest, use: ToolUse) -> int | None:
    return 1 if use.named is not None or request.parallel_tool_calls is False else None


def _reasoning(model: Model, prompt: Sequence[int]) -> Reasoning | None:
    """None: the model does not reason, or the prompt says that it has."""
    marks = model.output.reasoning
    if marks is None or ends_with(model.tokenizer, prompt, marks.end):
        return None
    return Reasoning(marks, ends_with(model.tokenizer, prompt, marks.begin))
