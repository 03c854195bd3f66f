"""OpenAI's response objects, and the events of their streams.

The output is a list of items: reasoning, a message, calls. Each is opened, grows, and is closed before the next one. An
answer in one piece goes through the same steps. The number of an event follows from how many tokens were
generated before it, so that a stream that goes on elsewhere goes on counting; numbers grow, and some are left out.

What ends an item or the answer tells all of its log probabilities, four times. So these are encoded once, as they come,
and such events leave in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from web.gateway.errors import ApiError
from web.gateway.openai import answers
from web.gateway.openai.call_ids import CallIds
from web.gateway.openai.generation import Generation
from web.gateway.openai.long_lists import LongList, encode, gathered, in_pieces
from web.gateway.openai.responses_request import ResponsesRequest
from web.gateway.service import Service
from web.gateway.text.choice_decoder import Piece
from web.gateway.text.parsers.parsed import CallDelta

EVENTS_PER_TOKEN = 16  # no token makes more of them
OPENING_EVENTS = 2
ITEM_BYTES = 600
TEXT_BYTES = 64  # of a piece of text as an object, beside its characters
# The events that may tell log probabilities of many tokens. What they tell does not change any more.
ENDS = frozenset(
    {
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
    }
)
LONG_BYTES = 16 << 10  # an event with so much of log probabilities leaves in pieces


class ResponsesFormat:
    def __init__(
        self,
        service: Service,
        request: ResponsesRequest,
        generation: Generation,
        request_id: str,
        created_unix_s: int,
    ) -> None:
        self._model = service.model
        self._request = request
        self._generation = generation
        self._name = request_id
        self._created = created_unix_s
        self._ids = CallIds(
            f"resp_{request_id}", created_unix_s, service.model.output.tools, generation.plans
        )
        self._items: list[dict[str, Any]] = []  # each as it stands
        self._texts: list[str] = []  # of the open one, in pieces
        self._logprobs = LongList()  # of the open one
        self._logprobs_size = 0  # bytes, of all items
        self._open = ""  # type of the last item, while it grows
        self._calls = 0
        self._status = "in_progress"
        self._why: str | None = None
        self._error: dict[str, str] | None = None
        self._tokens = 0  # before the present piece
        self._said = 0  # events of the present piece
        self._number = OPENING_EVENTS - 1  # of the last event
        self._out: list[bytes] = []
        self._rest: list[bytes | dict[str, Any]] = []  # events after these, the long ones still to be encoded
        self._whole = False  # the answer leaves in one piece: there are no events

    # ------------------------------------------------------------------ as others see it

    def opening(self, index: int) -> bytes:
        self._out = []
        for number, kind in enumerate(("response.created", "response.in_progress")):
            event = {"type": kind, "sequence_number": number, "response": self._response([])}
            self._out.append(_event(kind, event))
        return b"".join(self._out)

    def chunk(self, index: int, piece: Piece) -> bytes:
        self._generation.keep(self._add(piece))
        return b"".join(self._out)

    def long_rest(self, id_line: Callable[[], bytes]) -> Iterator[bytes] | None:
        rest, self._rest = self._rest, []
        return gathered(_written(rest, id_line)) if rest else None

    def last(self) -> bytes:
        return b""

    def failure(self, error: ApiError, opened: bool) -> bytes:
        """The output is not told again: with log probabilities it may be megabytes."""
        out = b"" if opened else self.opening(0)
        code = _code_of(error)
        number = max(self._number + 1, OPENING_EVENTS + EVENTS_PER_TOKEN * self._tokens)
        said = {"code": code, "message": error.message, "param": error.param}
        out += _event("error", {"type": "error", "sequence_number": number} | said)
        self._status, self._error = "failed", {"code": code, "message": error.message}
        kind = "response.failed"
        return out + _event(
            kind, {"type": kind, "sequence_number": number + 1, "response": self._response([])}
        )

    def keep(self, index: int, piece: Piece) -> int:
        self._whole = True
        return self._add(piece)

    def body(self) -> dict[str, Any]:
        return self._response(self._items)

    @property
    def heavy(self) -> bool:
        return False

    # ------------------------------------------------------------------ items

    def _add(self, piece: Piece) -> int:
        """Returns about how many bytes that keeps."""
        self._out, self._rest, self._said = [], [], 0
        items, size = len(self._items), self._logprobs_size
        self._take(piece)
        self._tokens += len(piece.tokens)
        texts = [piece.text, piece.reasoning, *(part.arguments for part in piece.calls)]
        return (
            ITEM_BYTES * (len(self._items) - items)
            + sum(TEXT_BYTES + 4 * len(text) for text in texts if text)
            + self._logprobs_size
            - size
        )

    def _take(self, piece: Piece) -> None:
        if piece.reasoning:
            self._grow("reasoning", piece.reasoning, [])
        if piece.text:
            self._grow("message", piece.text, self._logprobs_of(piece))
        for part in piece.calls:
            self._call(part)
        if piece.finish is not None:
            cut = piece.finish == "length"
            if not self._items or (
                self._open == "" and not self._calls and self._items[-1]["type"] != "message"
            ):
                self._begin("message")  # an answer that says nothing is one
            self._close("incomplete" if cut else "completed")
            self._status, self._why = ("incomplete", "max_output_tokens") if cut else ("completed", None)
            kind = "response.incomplete" if cut else "response.completed"
            self._say(kind, {"response": self._response(self._items)})

    def _grow(self, kind: str, text: str, logprobs: list[Any]) -> None:
        if self._open != kind:
            self._close("completed")
            self._begin(kind)
        self._texts.append(text)
        self._logprobs_size += self._logprobs.extend(logprobs)
        if kind == "message":
            self._say("response.output_text.delta", self._place() | {"delta": text, "logprobs": logprobs})
        else:
            self._say("response.reasoning_text.delta", self._place() | {"delta": text})

    def _begin(self, kind: str) -> None:
        number = len(self._items)
        self._open, self._texts, self._logprobs = kind, [], LongList()
        if kind == "message":
            item: dict[str, Any] = {"type": kind, "id": f"msg_{self._name}_{number}", "role": "assistant"}
        else:
            item = {"type": kind, "id": f"rs_{self._name}_{number}", "summary": []}
        self._items.append(item | {"content": [], "status": "in_progress"})
        self._say("response.output_item.added", {"output_index": number, "item": self._items[-1]})
        self._say("response.content_part.added", self._place() | {"part": self._part("")})

    def _call(self, part: CallDelta) -> None:
        if part.name:
            self._close("completed")
            number = len(self._items)
            item = {
                "type": "function_call",
                "id": f"fc_{self._name}_{number}",
                "call_id": self._ids.new(0, part.index),
                "name": part.name,
                "arguments": "",
                "status": "in_progress",
            }
            self._open, self._texts = "function_call", []
            self._calls += 1
            self._items.append(item)
            self._say("response.output_item.added", {"output_index": number, "item": item})
        if part.arguments:
            self._texts.append(part.arguments)
            place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
            self._say("response.function_call_arguments.delta", place | {"delta": part.arguments})

    def _close(self, status: str) -> None:
        if not self._open:
            return
        kind, self._open = self._open, ""
        item, text = self._items[-1], "".join(self._texts)
        item["status"] = status
        number = len(self._items) - 1
        if kind == "function_call":
            item["arguments"] = text
            place = {"item_id": item["id"], "output_index": number}
            done = {"arguments": text, "name": item["name"]}
            self._say("response.function_call_arguments.done", place | done)
        else:
            part = self._part(text, kind)
            item["content"] = [part]
            if kind == "message":
                self._say(
                    "response.output_text.done", self._place() | {"text": text, "logprobs": self._logprobs}
                )
            else:
                self._say("response.reasoning_text.done", self._place() | {"text": text})
            self._say("response.content_part.done", self._place() | {"part": part})
        self._say("response.output_item.done", {"output_index": number, "item": item})

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _part(self, text: str, kind: str = "") -> dict[str, Any]:
        if (kind or self._open) == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _logprobs_of(self, piece: Piece) -> list[Any]:
        if not self._request.logprobs:
            return []
        found: list[Any] = answers.chat_logprobs(
            self._model.vocabulary, piece, self._request.top_logprobs or 0
        )["content"]
        return found

    def _say(self, kind: str, fields: dict[str, Any]) -> None:
        if self._whole:
            return
        number = OPENING_EVENTS + EVENTS_PER_TOKEN * self._tokens + self._said
        self._said, self._number = self._said + 1, number
        event = {"type": kind, "sequence_number": number} | fields
        if kind in ENDS and self._logprobs_size > LONG_BYTES:
            self._rest.append(event)
        else:
            (self._rest if self._rest else self._out).append(_event(kind, event))

    # ------------------------------------------------------------------ the response

    def _response(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        request, over = self._request, self._status in ("completed", "incomplete")
        plan = self._generation.plans[0]
        text = {"type": "text"}
        if request.text is not None and request.text.format is not None:
            text = request.text.format.model_dump(by_alias=True, exclude_none=True)
        choice: Any = request.tool_choice or "auto"
        return {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": self._created,
            # Nobody keeps when: a repeated request, and a stream that goes on elsewhere, is answered the same.
            "completed_at": None,
            "status": self._status,
            "background": False,
            "error": self._error,
            "frequency_penalty": plan.sampling.frequency_penalty,
            "incomplete_details": {"reason": self._why} if self._why else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self._model.name,
            "output": items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "presence_penalty": plan.sampling.presence_penalty,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": plan.sampling.temperature,
            "text": {"format": text},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_described(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": plan.sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if over else None,
        }

    def _usage(self) -> dict[str, Any]:
        choice, plan = self._generation.choices[0], self._generation.plans[0]
        cached = choice.cached if self._generation.tells_cached else 0
        return {
            "input_tokens": len(plan.prompt),
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
            "total_tokens": len(plan.prompt) + choice.tokens,
        }


def _code_of(error: ApiError) -> str:
    """As OpenAI's clients know them; others than these two are of no use to any."""
    if error.status == 429:
        return "rate_limit_exceeded"
    return "server_error" if error.status >= 500 or error.status == 409 else "invalid_prompt"


def _described(tool: Any) -> dict[str, Any]:
    given: dict[str, Any] = tool.model_dump(exclude_none=True)
    return {"parameters": None, "strict": None} | given


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode(data) + b"\n\n"


def _written(events: Sequence[bytes | dict[str, Any]], id_line: Callable[[], bytes]) -> Iterator[bytes]:
    """Whoever has the id has all of them."""
    for number, event in enumerate(events, 1):
        if number == len(events):
            yield id_line()
        if isinstance(event, bytes):
            yield event
        else:
            yield b"event: " + event["type"].encode() + b"\ndata: "
            yield from in_pieces(event)
            yield b"\n\n"
