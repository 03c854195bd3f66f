"""What all parsers of tool calls have in common (pure)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from web.gateway.text.held_back import first_of, possible_start
from web.gateway.text.parsers.call_scan import CallScan, Status
from web.gateway.text.parsers.parsed import Parsed


class ToolParser(ABC):
    """Where calls stand in the text is the business of the subclasses.

    What looks like a call and is none is content. White space beside calls is nothing. A call whose arguments turn out
    to be no JSON keeps them as the model wrote them: its client sees what is wrong. `calls_max`: where there are so
    many, the output has ended (`done`).
    """

    ends: tuple[str, ...] = ()  # what may end a call whose arguments are no JSON

    def __init__(self, calls_max: int | None = None) -> None:
        self.begun = 0  # calls
        self.done = False
        self._calls_max = calls_max
        self._buffer = ""
        self._space = ""  # white space that is content only if more of it follows
        self._after_call = False  # nothing but white space has come since
        self._call: CallScan | None = None
        self._head = ""  # what led to the call that is under way, and all of it: until it has begun
        self._counted = False  # it has begun
        self._closing = False  # the buffer is the beginning of what only closes calls
        self._state: Callable[[Parsed], bool] = self._first_state

    def push(self, text: str, out: Parsed) -> None:
        """Say to `out` what is certain."""
        self._buffer += text
        while self._buffer and not self.done and self._state(out):
            pass

    def finish(self, out: Parsed) -> None:
        """The text is over: what was held back is what it looks like."""
        if self.done:
            return
        if self._call is not None and not self._call.begun:
            self._say(self._head, out)
        elif self._call is None and not self._closing:
            self._say(self._buffer, out)
        elif self._state == self._broken:
            out.call(self.begun - 1, arguments=self._buffer)
        self._buffer = ""
        if not self._after_call:
            out.content += self._space

    # States: each takes in some of the buffer, and returns whether there is more to do with the rest.

    @abstractmethod
    def _first_state(self, out: Parsed) -> bool: ...

    @abstractmethod
    def _call_ended(self) -> Callable[[Parsed], bool]:
        """What comes after a call."""

    @abstractmethod
    def _no_call(self) -> Callable[[Parsed], bool]:
        """What comes where something turned out to be no call."""

    def _in_call(self, out: Parsed) -> bool:
        call = self._call
        assert call is not None
        used = call.feed(self._buffer, out)
        if not call.begun:
            self._head += self._buffer[:used]
        elif not self._counted:
            self._head = self._space = ""
            self._after_call = self._counted = True
            self.begun += 1
        self._buffer = self._buffer[used:]
        match call.status:
            case Status.OPEN:
                return False
            case Status.BROKEN if call.begun:
                self._buffer = call.unsaid() + self._buffer
                self._state = self._broken
            case Status.BROKEN:
                self._give_up(out)
            case _:
                self._end_call()
        return True

    def _broken(self, out: Parsed) -> bool:
        """The rest of the arguments, as it stands."""
        found = first_of(self._buffer, self.ends) if self.ends else None
        if found is not None:
            at = found[0]
        else:
            at = len(self._buffer) - (possible_start(self._buffer, self.ends) if self.ends else 0)
        if at:
            out.call(self.begun - 1, arguments=self._buffer[:at])
        self._buffer = self._buffer[at:]
        if found is not None:
            self._end_call()
        return found is not None

    def _plain(self, out: Parsed) -> bool:
        """Content to the end."""
        self._say(self._buffer, out)
        self._buffer = ""
        return False

    # Steps

    def _begin_call(self, call: CallScan, head: str) -> None:
        """`head`: the text that led to it, which is content if it is none."""
        self._call, self._head, self._state = call, head, self._in_call
        self._counted = self._closing = False

    def _end_call(self) -> None:
        self._call = None
        if self._calls_max is not None and self.begun >= self._calls_max:
            self.done = True
        self._state = self._call_ended()

    def _give_up(self, out: Parsed) -> None:
        """What is under way is no call."""
        self._call = None
        self._buffer = self._head + self._buffer
        self._head = ""
        self._state = self._no_call()

    def _say(self, text: str, out: Parsed) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._after_call = False
            out.content += said

    def _next_item(self, make: Callable[[], CallScan], behind: Callable[[Parsed], bool]) -> bool:
        """Of a list of calls: another one, or the end, behind which `behind` reads on."""
        self._take_space()
        if not self._buffer:
            return False
        if self._buffer[0] == ",":
            self._buffer = self._buffer[1:]
            self._begin_call(make(), ",")
            return True
        if self._buffer[0] == "]":
            self._buffer = self._buffer[1:]
        self._state = behind
        return True

    def _take_space(self) -> str:
        """Take white space from the beginning of the buffer."""
        bare = self._buffer.lstrip()
        space = self._buffer[: len(self._buffer) - len(bare)]
        self._buffer = bare
        return space
