"""A generation as server-sent events: from a scheduler's message to the client's socket in one chain of calls.

No task runs for a token. What a message brings is written at once if the client takes it. A slow client's tokens wait
in the queue, and leave when it reads again. The request's task is called for what needs one: the first
bytes (status and headers go before them), the end, and whatever goes wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from web.gateway.errors import ApiError
from web.gateway.http.connection import Wire
from web.gateway.openai.answer_format import AnswerFormat
from web.gateway.openai.generation import Generation
from web.gateway.resume.cursor import Cursor, Mark
from web.gateway.text.choice_decoder import Piece

# No empty line after it: the openai client takes one for an event once it has seen an id.
KEEP_ALIVE = b": keep-alive\n"
END = b"\n\n"  # of an event


class EventStream:
    """With `ids` each event has one: the stream's ticket, and how far the client has come with it (`cursor`)."""

    def __init__(
        self,
        generation: Generation,
        form: AnswerFormat,
        ticket: str,
        cursor: Cursor,
        wire: Wire,
        keep_alive_s: float,
        ids: bool = True,
    ) -> None:
        self._ids = ids
        self._pause = KEEP_ALIVE if ids else KEEP_ALIVE + b"\n"
        self._loop = asyncio.get_running_loop()
        self._generation = generation
        self._form = form
        self._id_head = f"id: {ticket}."
        self._cursor = cursor
        self._marks = ["" if mark is None else str(mark) for mark in cursor.marks]
        self._taken = [0] * len(cursor.marks)  # tokens of each choice, up to the last piece
        self._wire = wire
        self._keep_alive_s = keep_alive_s
        self._begun = False
        self._said = 0.0  # when something was sent last
        self._turn: asyncio.Future[bytes] = self._loop.create_future()
        self._quiet: asyncio.TimerHandle | None = None
        self._rest: Iterator[bytes] | None = None  # of the last piece, too long to be made in one go
        self._pieces: list[tuple[int, Piece]] = []  # taken with it, and after it

    async def turn(self, begun: bool) -> bytes:
        """Write what comes until the task is needed: returns what it has to send.

        That is the first bytes if not yet `begun`, those before a `rest`, and else those before the end (`finished`,
        and see `generation`). Raises ApiError and ClientGone.
        """
        self._begun = begun
        self._turn = self._loop.create_future()
        if self._quiet is None:
            self._said = self._loop.time()
            self._quiet = self._loop.call_later(self._keep_alive_s, self._keep_alive)
            self._wire.watch(self._advance, self._say_something)
            self._generation.queue.attach(self._advance)
        self._advance()
        return await self._turn

    @property
    def finished(self) -> bool:
        """Whether nothing but `rest` and `last` is to be sent."""
        return self._generation.finished and not self._pieces

    def rest(self) -> Iterator[bytes]:
        """What is to be sent after the bytes of this turn, in pieces that are made as they are asked for."""
        rest, self._rest = self._rest, None
        return rest or iter(())

    def close(self) -> None:
        self._rest, self._pieces = None, []
        self._generation.queue.attach(None)
        self._wire.watch(None, None)
        self._turn.cancel()
        self._turn = self._loop.create_future()  # what the last one may have raised knows this object
        if self._quiet is not None:
            self._quiet.cancel()

    def events(self, index: int, piece: Piece) -> bytes:
        """The events of a piece with their ids; none when the client has them already."""
        self._taken[index] += len(piece.tokens)
        data = self._form.chunk(index, piece)
        if piece.silent:
            return b""
        opening = b""
        if not self._marks[index] and (event := self._form.opening(index)):
            self._marks[index] = "0"
            opening = self.id() + event
        self._rest = self._form.long_rest(self.id)
        if not data and self._rest is None:
            return opening
        self._marks[index] = str(self._taken[index])
        if piece.finish:
            reasoning = self._generation.choices[index].reasoning_tokens
            self._marks[index] = str(Mark(self._taken[index], True, reasoning))
        if self._rest is not None:  # and the id is in its last event
            return opening + data
        # A piece may be several events: whoever has the id has all of them.
        at = data.rfind(END, 0, -len(END)) + len(END) if data.count(END) > 1 else 0
        return opening + data[:at] + self.id() + data[at:]

    def id(self) -> bytes:
        if not self._ids:
            return b""
        return f"{self._id_head}{'-'.join(self._marks)}{'u' if self._cursor.usage else ''}\n".encode()

    def last(self) -> bytes:
        """Usage, when asked for and not sent yet."""
        data = b"" if self._cursor.usage else self._form.last()
        self._cursor.usage = True
        return self.id() + data if data else b""

    def failure(self, error: ApiError) -> bytes:
        """What tells its client that it ends here."""
        return self._form.failure(error, bool(self._marks[0]))

    def _advance(self) -> None:
        """Take in what has come."""
        generation = self._generation
        if self._turn.done():
            return  # the task comes first, and looks here again
        if self._wire.paused and not generation.queue.full:
            return  # called again when the client reads
        try:
            pieces, self._pieces = [*self._pieces, *generation.take()], []
            said: list[bytes] = []
            for at, (index, piece) in enumerate(pieces, 1):
                said.append(self.events(index, piece))
                if self._rest is not None:
                    self._pieces = pieces[at:]
                    break
            out = b"".join(said)
        except Exception as error:  # ends this stream, and no other: the task tells the client
            self._turn.set_exception(error)
            return
        if generation.finished or generation.leaving or self._rest is not None or (out and not self._begun):
            self._turn.set_result(out)
        elif out:
            self._wire.write(out)
            self._said = self._loop.time()

    def _say_something(self) -> None:
        """The client may be gone: only writing shows it."""
        if self._begun and not (self._turn.done() or self._wire.paused):
            self._said = self._loop.time()
            self._wire.write(self._pause)

    def _keep_alive(self) -> None:
        now = self._loop.time()
        if now >= self._said + self._keep_alive_s:
            self._said = now
            if self._turn.done() or self._wire.paused:
                pass  # something is about to be sent
            elif self._begun:
                self._wire.write(self._pause)
            else:
                self._turn.set_result(self._pause)
        self._quiet = self._loop.call_at(self._said + self._keep_alive_s, self._keep_alive)
