"""The register: which request ids are in use, and how requests are let go of, from any thread and from finalizers."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlap.errors import RequestAborted, RequestError

if TYPE_CHECKING:
    from overlap.core import Core
    from overlap.front import Answer, Front


@dataclass(slots=True, eq=False)
class Entry:
    """A request id in use."""

    request_id: str
    front: Front
    answer: Answer | None = None
    """None while the prompt is encoded."""
    aborted: bool = False

    def check(self) -> None:
        """Raise RequestAborted if somebody aborted it."""
        if self.aborted:
            raise RequestAborted(f"Request {self.request_id!r} was aborted.")


class Register:
    """The requests of one engine that have not been let go of. From any thread."""

    def __init__(self, core: Core) -> None:
        self.entries: dict[str, Entry] = {}
        """By request id."""
        self.dropped: Final[deque[Entry]] = deque()
        """What finalizers found: they must not wait for a lock."""
        self._core = core
        self._lock = threading.Lock()  # guards the entries
        self._reference = weakref.ref(self)

    def check_process(self) -> None:
        """Raise EngineClosed in a process that was forked off the engine's own."""
        self._core.check_process()

    def enter(self, request_id: str, front: Front) -> Entry:
        """Take a request in. Raises RequestError if its id is in use."""
        self.forget_dropped()
        entry = Entry(request_id, front)
        with self._lock:
            if request_id in self.entries:
                raise RequestError(f"The request id {request_id!r} is in use. Give each request one of its own.")
            self.entries[request_id] = entry
        return entry

    def note_answer(self, entry: Entry, answer: Answer) -> None:
        """A request is about to be submitted. Raises RequestAborted if somebody aborted it meanwhile."""
        with self._lock:
            entry.check()
            entry.answer = answer

    def abort(self, request_id: str) -> Entry | None:
        """Take a request out and note that it was aborted; None if there is none of this id."""
        with self._lock:
            entry = self.entries.pop(request_id, None)
            if entry is not None:
                entry.aborted = True
        return entry

    def forget_closed(self) -> None:
        """Let go of the ids of event loops that are closed; what runs for them has ended."""
        with self._lock:
            self.entries = {name: one for name, one in self.entries.items() if not one.front.loop.is_closed()}

    def forget_answer(self, answer: Answer) -> None:
        """Let go of an answer that nobody reads any more."""
        entry = self.entries.get(answer.request_id)
        if entry is not None and entry.answer is answer:  # else it was aborted
            self.forget(entry)

    def drop_answer(self, answer: Answer) -> None:
        """As `forget_answer`, from a finalizer, which runs anywhere: it takes no lock."""
        entry = self.entries.get(answer.request_id)
        if entry is not None and entry.answer is answer:
            self.drop(entry)

    def forget(self, entry: Entry) -> None:
        """Let go of a request, and end it if it still runs."""
        if self._core.forked:
            return
        with self._lock:
            if self.entries.get(entry.request_id) is entry:
                del self.entries[entry.request_id]
        answer = entry.answer
        if answer is not None:
            entry.front.close(answer)
            if not answer.ended:
                self._core.end(answer.key)

    def drop(self, entry: Entry) -> None:
        """As `forget`, from a finalizer: it takes no lock, since its thread may hold any, and leaves that for later.

        What the request runs on comes free at once all the same.
        """
        if self._core.forked:
            return
        self.dropped.append(entry)
        if entry.answer is not None and not entry.answer.ended:
            self._core.drop(entry.answer.key)
        with suppress(RuntimeError):  # its event loop was closed: the next request does it
            entry.front.loop.call_soon_threadsafe(_remind, self._reference)

    def forget_dropped(self) -> None:
        """Let go of what finalizers found."""
        while self.dropped:
            try:
                entry = self.dropped.popleft()
            except IndexError:  # another thread was faster
                return
            self.forget(entry)


def _remind(reference: weakref.ref[Register]) -> None:
    register = reference()
    if register is not None:  # else its engine has closed, and every request has ended with it
        register.forget_dropped()
