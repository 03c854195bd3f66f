"""From a request to its answer: a new one, a repeated one (Idempotency-Key), or the rest of a stream (Last-Event-ID).

All three are one thing: a nonce gives the requests their ids, schedulers are asked for the logs that they have of them,
and what they do not have is computed, or computed again, from the body.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from controlplane.contract.requests import Log, Sampling
from web.gateway.errors import OTHER_BODY, ApiError
from web.gateway.lives import OpenLife
from web.gateway.openai.answer_format import AnswerFormat
from web.gateway.openai.chat import kept_chat, prepare_chat
from web.gateway.openai.completions import kept_completion, prepare_completion
from web.gateway.openai.generation import Generation, Plan, Start
from web.gateway.openai.prepared import Origin, PreparedRequest, kept_bytes
from web.gateway.openai.requests import INT64_MAX
from web.gateway.openai.responses import kept_responses, prepare_responses
from web.gateway.request_memory import Hold
from web.gateway.resume.cursor import Cursor, Mark
from web.gateway.resume.find_logs import find_logs, recall
from web.gateway.resume.tickets import UNKNOWN, Ticket, new_nonce, rid_of, seed_of
from web.gateway.service import Service
from web.manners import own_request_id

PREPARE: dict[str, Callable[[Service, bytes, Origin], Awaitable[PreparedRequest]]] = {
    "completion": prepare_completion,
    "chat": prepare_chat,
    "responses": prepare_responses,
}
KEPT: dict[str, Callable[[Service, bytes], PreparedRequest]] = {
    "completion": kept_completion,
    "chat": kept_chat,
    "responses": kept_responses,
}
# How long to look for a request while a scheduler cannot be prepared, because it died or moves.
LOOK_REPEATED_S = 0.25  # most keys are new ones; to compute twice costs time, and no correctness
LOOK_RESUMED_S = 2.5  # to compute it again may take longer than to wait
LOOK_BODILESS_S = 5.0  # there is no other way
CONTEXT_BYTES_MAX = 1 << 20  # of all choices together; if it is more, only the first one carries it
REPEATED_MAX = 255  # characters of an Idempotency-Key
AGAIN = "POST the same body with Last-Event-ID: it is computed again, the same, and goes on from there"


@dataclass(frozen=True, slots=True)
class Visit:
    """Who asks, and what the request's headers say. `owner` is the hash of the API key."""

    owner: bytes
    request_id: str = ""
    idempotency_key: str | None = None
    last_event_id: str | None = None
    priority_floor: int | None = None  # of the key, if it has one of its own
    came_us: int = field(default_factory=lambda: time.time_ns() // 1000)  # since 1970


@dataclass(frozen=True, slots=True)
class StartedAnswer:
    """A generation that is ready to run, and how its answer is written.

    `ticket`: of the stream; empty for an answer in one piece. `cursor`: what the client has of it. `hold`: the memory
    that it keeps until it is over. `event_ids`: whether its events have ids, which whoever has come back reads.
    """

    generation: Generation
    form: AnswerFormat
    ticket: str
    cursor: Cursor
    hold: Hold
    event_ids: bool = True


class Context(msgspec.Struct, frozen=True, array_like=True):
    """What schedulers keep beside the log: all that another gateway needs to go on with the stream.

    `options`: what shapes the answer (`PreparedRequest.options`). Of the body nothing else is kept: the log has the
    rest.
    """

    kind: str
    options: bytes
    request_id: str
    created_unix_s: int
    digest: bytes
    prompt_tokens: tuple[int, ...] = ()  # of each prompt; empty: an older gateway has written it


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Context).decode


async def start_or_resume(
    service: Service, kind: str, body: bytes, visit: Visit, hold: Hold
) -> StartedAnswer:
    """The answer to a POST. `hold`: of the body's bytes; the answer holds what it keeps of them. Raises ApiError."""
    if visit.last_event_id is not None:
        ticket, cursor = read_ticket(service, visit.last_event_id, visit)
        prepared = await _prepare(service, kind, body, ticket.nonce, ticket.created_unix_s, visit)
        if not prepared.request.stream:
            raise ApiError(400, "Last-Event-ID needs stream: true")
        if prepared.digest != ticket.digest:
            raise ApiError(422, "Last-Event-ID is of a stream with another body: send the very same one")
        return await _resume(
            service,
            prepared,
            _context(kind, prepared, ticket, visit),
            ticket,
            cursor,
            {},
            visit.came_us,
            hold,
        )
    key = visit.idempotency_key
    if key is not None and not (0 < len(key) <= REPEATED_MAX and key.isascii() and key.isprintable()):
        raise ApiError(400, f"Idempotency-Key: 1 to {REPEATED_MAX} printable ASCII characters")
    nonce = new_nonce() if key is None else service.tickets.keyed_nonce(visit.owner, key)
    created = int(time.time())
    prepared = await _prepare(service, kind, body, nonce, created, visit)
    rids = [rid_of(nonce, index) for index in range(len(prepared.plans))]
    stream = bool(prepared.request.stream)
    digest = prepared.digest if stream or key is not None else b""
    ticket = service.tickets.issue(nonce, created, digest, visit.owner)
    context = _context(kind, prepared, ticket, visit)
    if key is None:
        starts = [Start(rid, blob) for rid, blob in zip(rids, _blobs(context, len(rids)), strict=True)]
        if not stream:  # its client has no id to come back with: nothing needs to be kept
            starts = [Start(rid) for rid in rids]
        return _answer(service, prepared, context, starts, ticket.text if stream else "", None, hold)
    logs, _ = await recall(service, rids, LOOK_REPEATED_S)
    if (earlier := _first_context(logs)) is not None:
        if earlier.digest != digest:  # a template may have told another day
            prepared = await _prepare(service, kind, body, nonce, earlier.created_unix_s, visit)
            digest = prepared.digest
        if earlier.digest != digest:
            raise ApiError(422, OTHER_BODY)
        ticket = service.tickets.issue(nonce, earlier.created_unix_s, digest, visit.owner)
        context = earlier
        prepared = replace(prepared, plans=_plans(prepared, logs, Cursor([])))
        service.metrics.resumed.labels("repeated").inc()
    running = service.dispatcher.router.context_of(rids[0])
    if running is not None and _decode(running).digest != digest:
        raise ApiError(422, OTHER_BODY)  # both came at once: this one would take the other's place
    starts = _starts(rids, logs, context, [None] * len(rids), visit.came_us, resumed=False)
    return _answer(service, prepared, context, starts, ticket.text if stream else "", None, hold)


async def _prepare(
    service: Service, kind: str, body: bytes, nonce: bytes, created_unix_s: int, visit: Visit
) -> PreparedRequest:
    prepared = await PREPARE[kind](service, body, Origin(seed_of(nonce), created_unix_s, visit.owner))
    service.check_priority(prepared.request.priority, visit.priority_floor)
    return prepared


async def reopen(service: Service, stream: str, visit: Visit, hold: Hold) -> StartedAnswer:
    """The answer to GET /v1/streams/STREAM: the rest of it, or all of it without Last-Event-ID. Raises ApiError."""
    ticket, cursor = read_ticket(service, visit.last_event_id or stream, visit)
    if not stream or not ticket.text.startswith(stream.partition(".")[0]):
        raise ApiError(400, "Last-Event-ID is of another stream")
    logs, sure = await find_logs(service, ticket.nonce, cursor, LOOK_BODILESS_S)
    context = _first_context(logs.values())
    if context is None and not sure:
        raise ApiError(
            503, f"not every scheduler can be asked for this stream now: try again, or {AGAIN}", None, 1
        )
    if context is None:
        raise ApiError(410, f"this stream is no longer kept: {AGAIN}")
    prepared = KEPT[context.kind](service, context.options)
    return await _resume(service, prepared, context, ticket, cursor, logs, visit.came_us, hold)


async def _resume(
    service: Service,
    prepared: PreparedRequest,
    context: Context,
    ticket: Ticket,
    cursor: Cursor,
    known: dict[int, Log | None],
    came_us: int,
    hold: Hold,
) -> StartedAnswer:
    """`known`: the logs of those choices that have been asked for."""
    marks = cursor.marks or [None] * prepared.count
    if len(marks) != prepared.count:
        raise ApiError(400, "Last-Event-ID: this is not an event id as it was sent")
    rids = [rid_of(ticket.nonce, index) for index in range(len(marks))]
    # Of a choice that its client has all of, nothing but the length of its prompt is told: in the usage.
    lengths = context.prompt_tokens or ([0] * prepared.prompts if cursor.usage else [])
    told = bool(prepared.plans or lengths)
    wanted = [k for k in range(len(rids)) if k not in known and not (told and cursor.has_all(k))]
    found, _ = await recall(service, [rids[k] for k in wanted], LOOK_RESUMED_S)
    known |= zip(wanted, found, strict=True)
    logs = [known.get(index) for index in range(len(rids))]
    context = _first_context(logs) or context
    plans = _plans(prepared, logs, cursor, lengths)
    if any(_beyond(mark, plan) for mark, plan in zip(marks, plans, strict=True)):
        raise ApiError(400, "Last-Event-ID: this stream has not so many tokens")
    starts = _starts(rids, logs, context, marks, came_us, resumed=True)
    again = any(start.log is None and not start.finished for start in starts)
    service.metrics.resumed.labels("regenerated" if again else "attached").inc()
    return _answer(
        service,
        replace(prepared, plans=plans),
        context,
        starts,
        ticket.text,
        Cursor(marks, cursor.usage),
        hold,
    )


def _plans(
    prepared: PreparedRequest, logs: list[Log | None], cursor: Cursor, lengths: Sequence[int] = ()
) -> list[Plan]:
    """The logs' own, as a gateway of an older release may have put another date into the prompt; else the body's.
    Choices of one prompt differ by their seeds alone. Of a prompt whose answers the client has, `lengths` are enough.
    Raises ApiError when nothing says what a prompt was."""
    plans: list[Plan] = []
    for first in range(0, len(logs), prepared.request.choices):
        group = range(first, first + prepared.request.choices)
        known = next(((k, log) for k in group if (log := logs[k]) is not None), None)
        if known is not None:
            at, log = known
            seed = log.sampling.seed - at
            plans += [
                Plan(log.prompt, msgspec.structs.replace(log.sampling, seed=(seed + k) & INT64_MAX))
                for k in group
            ]
        elif prepared.plans:
            plans += prepared.plans[first : group.stop]
        elif lengths and all(map(cursor.has_all, group)):
            prompt = (0,) * lengths[first // prepared.request.choices]
            plans += [Plan(prompt, Sampling(max_tokens=INT64_MAX, seed=0)) for _ in group]
        else:
            raise ApiError(410, f"a part of this stream is no longer kept: {AGAIN}")
    return plans


def _beyond(mark: Mark | None, plan: Plan) -> bool:
    return mark is not None and mark.tokens + (not mark.finished) > plan.sampling.max_tokens


def _answer(
    service: Service,
    prepared: PreparedRequest,
    context: Context,
    starts: list[Start],
    ticket: str,
    cursor: Cursor | None,
    hold: Hold,
) -> StartedAnswer:
    hold.become(kept_bytes(prepared, context.options, [start.context for start in starts if start.context]))
    request = prepared.request
    life = OpenLife(
        service.dispatcher.lives,
        request=context.request_id,
        kind=context.kind,
        key=hold.key,
        model=service.model.name,
        stream=bool(ticket),
        resumed=any(start.resumed for start in starts),
        rids=tuple(start.rid for start in starts),
        prompt_tokens=sum({id(plan.prompt): len(plan.prompt) for plan in prepared.plans}.values()),
        began=time.time(),
    )
    generation = Generation(
        service,
        prepared.plans,
        prepared.rules,
        request.priority or 0,
        starts,
        hold,
        life,
        prepared.told_again,
    )
    form = prepared.form(generation, context.request_id, context.created_unix_s)
    ids = cursor is not None or prepared.event_ids
    return StartedAnswer(generation, form, ticket, cursor or Cursor([None] * len(starts)), hold, ids)


def _starts(
    rids: list[int],
    logs: list[Log | None],
    context: Context,
    marks: list[Mark | None],
    came_us: int,
    resumed: bool,
) -> list[Start]:
    blobs = _blobs(context, len(rids))
    have = [mark or Mark(0) for mark in marks]
    return [
        Start(
            rid,
            blob,
            resumed or log is not None,
            log,
            mark.tokens,
            mark.finished,
            mark.reasoning_tokens,
            _reader(log, came_us),
        )
        for rid, blob, log, mark in zip(rids, blobs, logs, have, strict=True)
    ]


def _reader(log: Log | None, came_us: int) -> int:
    """Above every earlier connection's (see Submit). Where no log tells of them the time does: a gateway that has not
    noticed yet that its client is gone brings an earlier one to the next scheduler, before or after this one."""
    return max(came_us, log.reader + 1) if log is not None else came_us


def read_ticket(service: Service, text: str, visit: Visit) -> tuple[Ticket, Cursor]:
    sealed, dot, position = text.partition(".")
    if not sealed.isascii():
        raise ApiError(404, UNKNOWN)
    return service.tickets.read(sealed, visit.owner), Cursor.parse(position) if dot else Cursor([])


def _context(kind: str, prepared: PreparedRequest, ticket: Ticket, visit: Visit) -> Context:
    own = own_request_id(prepared.request.request_id) or own_request_id(visit.request_id)
    # Not the one in X-Request-Id: a stream keeps its id wherever it goes on.
    request_id = own or ticket.nonce.hex()
    lengths = tuple(len(plan.prompt) for plan in prepared.plans[:: prepared.request.choices])
    return Context(kind, prepared.options, request_id, ticket.created_unix_s, ticket.digest, lengths)


def _first_context(logs: Iterable[Log | None]) -> Context | None:
    return next((_decode(log.context) for log in logs if log is not None and log.context), None)


def _blobs(context: Context, count: int) -> list[bytes]:
    blob = _encode(context)
    return [blob if index == 0 or len(blob) * count <= CONTEXT_BYTES_MAX else b"" for index in range(count)]
