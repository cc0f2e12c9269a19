"""StopStrings: ends an answer before any of its stop strings, and emits no part of one.

One automaton for all stop strings (Aho and Corasick, "Efficient string matching", 1975) reads each character once.
Its state *is* the longest end of the text that could still become a stop string, so the state's depth says how much to
hold back, and what is held back is a beginning of a stop string: nothing has to be buffered.
"""

from __future__ import annotations

import re
from collections import deque

from overlap.errors import RequestError

MAX_STOP_CHARACTERS = 65_536
"""The most characters that the stop strings of one request may have together; the automaton has one node for each."""


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, in time linear in the text.

    What comes out depends on the text alone, never on where the pieces were cut: the match is the stop string that is
    complete first, reading character by character; of several that are complete at the same character, the one that
    starts earliest (the longest). So with the stops "b" and "abc", the text "abc" ends before "b": when "b" was there,
    "abc" was not yet.

    Raises RequestError for an empty stop string and for more than `MAX_STOP_CHARACTERS` characters.
    """

    __slots__ = ("_children", "_depth", "_fallback", "_first", "_match", "_matched", "_sample", "_state")

    def __init__(self, stops: tuple[str, ...]) -> None:
        if not all(stops):
            raise RequestError("A stop string is empty. Leave it out.")
        if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"The stop strings have {sum(map(len, stops))} characters together; give {MAX_STOP_CHARACTERS} at most."
            )
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._sample = [""]  # a stop string that begins with what the state has read
        self._match: list[str | None] = [None]  # the longest stop string that ends at the state
        self._fallback = [0]  # the state of the longest proper end of what the state has read
        self._state = 0
        self._matched = False
        for stop in stops:
            self._add(stop)
        self._link()
        firsts = "".join(re.escape(character) for character in self._children[0])
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            following = self._children[state].get(character)
            if following is None:
                following = self._children[state][character] = len(self._children)
                self._children.append({})
                self._depth.append(depth)
                self._sample.append(stop)
                self._match.append(None)
                self._fallback.append(0)
            state = following
        self._match[state] = stop

    def _link(self) -> None:
        """Fill in the fallbacks, shallow states first."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            if self._match[state] is None:
                self._match[state] = self._match[self._fallback[state]]
            for character, child in self._children[state].items():
                self._fallback[child] = self._follow(self._fallback[state], character)
                queue.append(child)

    def _follow(self, state: int, character: str) -> int:
        children, fallback = self._children, self._fallback
        while True:
            following = children[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = fallback[state]

    def push(self, delta: str) -> tuple[str, str | None]:
        """Take the next piece of text; return what may be emitted now, and the stop string if one is complete.

        Once a stop string was returned the answer has ended: every later call returns `("", None)`.
        """
        if self._matched:
            return "", None
        before = state = self._state
        if not state and self._first.search(delta) is None:
            return delta, None  # the most frequent case, and 4 times as fast
        children, match = self._children, self._match
        root = children[0]
        for index, character in enumerate(delta):
            following = children[state].get(character) if state else root.get(character, 0)
            state = self._follow(state, character) if following is None else following
            stop = match[state]
            if stop is not None:
                self._matched = True
                self._state = 0
                return self._cut(before, delta, self._depth[before] + index + 1 - len(stop)), stop
        self._state = state
        return self._cut(before, delta, self._depth[before] + len(delta) - self._depth[state]), None

    def _cut(self, before: int, delta: str, length: int) -> str:
        """Return the first `length` characters of what was held back in state `before`, followed by `delta`."""
        held = self._depth[before]
        if not held:
            return delta[:length]
        return self._sample[before][: min(held, length)] + delta[: max(0, length - held)]

    def flush(self) -> str:
        """Return what was held back, for an answer that ended otherwise. Empty after a match."""
        held = self._sample[self._state][: self._depth[self._state]]
        self._state = 0
        return held
