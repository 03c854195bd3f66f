"""The grammar of a request, checked before the request goes out."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.grammar import GrammarError
from web.gateway.errors import ApiError
from web.gateway.model import Model
from web.gateway.openai.structured import Asked, Fields, asked_of, text_of
from web.gateway.text.grammars import TooManyGrammars


async def grammar_of(model: Model, request: Fields, owner: bytes) -> str:
    """`Sampling.grammar` of a request, checked; "" if it asks for nothing. Raises ApiError naming the parameter."""
    asked = demand_of(request)
    return "" if asked is None else await checked(model, lambda: text_of(asked), asked.param, owner)


def demand_of(request: Fields) -> Asked | None:
    """What a request demands of its output. Raises ApiError."""
    asked = asked_of(request)
    if asked is not None and request.ignore_eos:
        text = f"ignore_eos cannot go with {asked.param}, which says where the text ends"
        raise ApiError(400, text, "ignore_eos")
    return asked


async def checked(model: Model, make: Callable[[], str], param: str, owner: bytes) -> str:
    """The grammar that `make` returns, once every node can follow it; `owner`s take turns. Raises ApiError naming
    `param`."""
    if old := model.context.without_grammars:
        text = f"{param}: node {min(old)} runs code that cannot hold an output to a grammar: it has to be restarted"
        raise ApiError(503, text, param, retry_after_s=5)
    try:
        return await model.grammars.check(make, owner)
    except GrammarError as error:
        raise ApiError(400, f"{param}: {in_clear(str(error))}", param) from error
    except TooManyGrammars:
        text = "too many grammars are being compiled: try again"
        raise ApiError(429, text, param, retry_after_s=1) from None


def in_clear(error: str) -> str:
    """An error of the library that tells of its settings, as it is of use to a client."""
    if error.startswith("oneOf constraints"):
        return (
            "oneOf is supported where no two of its schemas can be true of one document (their types, or constants "
            "or names of required properties, tell): anyOf takes what any of them does"
        )
    return error
