"""Built-in prompts to train a drafter on, drawn by seed: forms of many kinds, filled, and worded in many ways."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from overlap.spec.fillings import WORDS
from overlap.spec.forms import KINDS
from overlap.spec.passages import TEXTS
from overlap.spec.topics import PLACES, TOPICS

FILLINGS: Final = {**WORDS, **TEXTS, "": TOPICS, "place": PLACES}
TRIES: Final = 200
"""Draws without a new prompt after which a kind counts as exhausted."""
_SLOT: Final = re.compile(r"\{(\w*|\d+\.\.\d+)\}")
_ORDER: Final = re.compile(
    r"(Add|Ask|Calculate|Classify|Compare|Complete|Continue|Convert|Correct|Define|Describe|Divide|Draft|Explain|Extract|"
    r"Find|Finish|Fix|Give|Help|Introduce|Invent|List|Make|Name|Paraphrase|Plan|Pretend|Proofread|Rate|Read|Return|"
    r"Rewrite|Round|Say|Share|Shorten|Show|Solve|Sort|Suggest|Summarize|Teach|Tell|Test|Think|Translate|Turn|Use|Write)\b"
)
"""How a form begins that may be asked as "could you"."""
_BEFORE: Final = ("Hi! ", "Hello! ", "Quick question: ", "I need help. ", "Hey there. ", "One more thing. ")
_BEHIND: Final = (
    " Keep it short.", " Be specific.", " Thanks!", " Answer in detail.", " Use simple words.", " Use bullet points.",
    " Please be honest.", " I am a beginner.", " Give examples.", " Explain why.", " Make it interesting.",
)  # fmt: skip


def built_in(seed: int, kinds: Mapping[str, Sequence[str]] = KINDS) -> Iterator[tuple[str, str]]:
    """Yield (kind, prompt) for ever: each kind once a round, in random order, one of its forms with its slots filled.

    No prompt comes twice before its kind is exhausted, which then rests; once all are, all may come again.
    """
    draw = random.Random(seed)
    met: set[str] = set()
    left = list(kinds)
    while True:
        draw.shuffle(left)
        for kind in tuple(left):
            drawn = (worded(filled(draw.choice(kinds[kind]), draw), draw) for _ in range(TRIES))
            prompt = next((prompt for prompt in drawn if prompt not in met), None)
            if prompt is None:
                left.remove(kind)
            else:
                met.add(prompt)
                yield kind, prompt
        if not left:
            met.clear()
            left = list(kinds)


def filled(form: str, draw: random.Random) -> str:
    """Return a form with its slots filled, and those of what fills them."""
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        low, to, high = slot[1].partition("..")
        if to:
            return str(draw.randint(int(low), int(high)))
        found = draw.choice([filling for filling in FILLINGS[low] if filling not in used])
        used.add(found)
        return _SLOT.sub(fill, found)

    text = _SLOT.sub(fill, form)
    return text[:1].upper() + text[1:]


def worded(prompt: str, draw: random.Random) -> str:
    """Return a prompt in other words of the same meaning, or, as often as not, as it is."""
    if draw.random() < 0.5:
        return prompt
    first, line, rest = prompt.partition("\n")
    begun = first[:1].lower() + first[1:] if not re.match(r"I\b|[A-Z]{2}", first) else first
    ways = [begun.rstrip(".?"), first.lower().rstrip(".?"), draw.choice(_BEFORE) + first]
    if not line:
        ways.append(first + draw.choice(_BEHIND))
    if _ORDER.match(first):
        asked = re.sub(r"\.(?= |$)", "?", begun, count=1)
        ways += [f"Please {begun}", f"Could you {asked}", f"Can you {asked}", f"I want you to {begun}"]
    return draw.choice(ways) + line + rest
