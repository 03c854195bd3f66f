"""POST /v1/responses: prepared as the chat that it is."""

from __future__ import annotations

from web.gateway.errors import ApiError
from web.gateway.openai.chat import prepare_chat_request
from web.gateway.openai.chat import slim as slim_chat
from web.gateway.openai.chat_output import output_rules
from web.gateway.openai.generation import Plan
from web.gateway.openai.prepared import Origin, PreparedRequest, digest_of
from web.gateway.openai.requests import ChatRequest, parse
from web.gateway.openai.responses_format import ResponsesFormat
from web.gateway.openai.responses_request import ResponsesRequest, chat_of, renamed
from web.gateway.openai.sampling import text_rules
from web.gateway.service import Service


async def prepare_responses(service: Service, body: bytes, origin: Origin) -> PreparedRequest:
    """Check everything. Raises ApiError."""
    request = parse(ResponsesRequest, body)
    try:
        chat = chat_of(request)
        plans = await prepare_chat_request(service, chat, origin)
    except ApiError as error:
        raise renamed(error) from error
    slim = request.model_copy(update={"input": "", "chat_template_kwargs": None})
    return _prepared(service, slim, slim_chat(chat), plans, digest_of(slim, plans))


def kept_responses(service: Service, options: bytes) -> PreparedRequest:
    """What `PreparedRequest.options` was made of, with no plans: the logs have them."""
    request = parse(ResponsesRequest, options)
    return _prepared(service, request, slim_chat(chat_of(request)), [], b"")


def _prepared(
    service: Service, request: ResponsesRequest, chat: ChatRequest, plans: list[Plan], digest: bytes
) -> PreparedRequest:
    return PreparedRequest(
        request,
        plans,
        text_rules(chat, service.model, request.logprobs, output_rules(chat, service.model)),
        lambda generation, request_id, created: ResponsesFormat(
            service, request, generation, request_id, created
        ),
        digest,
        told_again=request.logprobs,
    )
