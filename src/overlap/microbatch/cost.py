"""What steps cost: measured times by kind and size of step, and a guess where nothing was measured. Imports no torch.

What is kept of a size is not seconds but how a step compares with what the model's bytes and operations would take at a
nominal speed of the device. So one measurement serves the whole bucket that a size falls into, and its neighbours. A
size is, in this order: measured; between measured neighbours; like the nearest others of its kind; put together from
the decode step and the prompt step that it does the work of; nominal. `Guess.slack` says by how much that may be off.

Steps of two lanes at once are kept apart. Decode rows come and go while a chunk is read, so what one chunk says of a
size is little: contexts and prompts are coarse there, what the nearest others with this share of SMs say counts with
what one size does, and a decode step is compared with what it takes alone. (docs/log.md says what finer sizes lost.)
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

Kind: TypeAlias = Literal["decode", "prefill", "mixed", "decode beside", "prefill beside"]
"""A step of decode rows, of prompt chunks, or of both; "beside": while the other lane ran too."""
Size: TypeAlias = tuple[str, int, int, int, int]
"""Kind, bucket of decode rows, of tokens in KV a row, of prompt tokens, and SMs of the decode rows' own."""
VERSION: Final = 8
FIRM: Final = 3
"""Measurements of a size from which on it is known."""
_SURE: Final = 4 * FIRM
"""Measurements from which on a size is believed to take much longer than its neighbours: until then something may
have been built in its first steps, and the neighbours say what it takes."""
_WEIGHT: Final = 1 / 16
"""Of a new measurement, once many were taken."""
CLIP: Final = 1.5
"""A step that takes so many times what is known, or more, counts as so many times: a hiccup turns nothing over."""
_FAR: Final = 1.25
_LONGER: Final = 4
_SHORTER: Final = 2
"""So many in a row that are far off what is known are the new truth."""
_REACH: Final = 2
"""How many buckets away a neighbour may be."""
MOST_SIZES: Final = 512
"""Sizes of a kind, with a share of SMs, that are kept; of more the half that was measured most often."""
_FEW: Final = 5
"""Sizes that speak for one that has no neighbour."""
_BESIDES: Final[tuple[Kind, ...]] = ("decode beside", "prefill beside")
_DOUBT: Final = 6
"""Measurements that those at other sizes count for where the lanes ran beside each other."""
_BESIDE: Final = 1.3
"""How much longer a step is guessed to take while the other lane runs."""
_SLACK_FEW: Final = 0.05
_SLACK_NEAR: Final = 0.08
_SLACK_KIND: Final = 0.2
_SLACK_PARTS: Final = 0.35

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Nominal:
    """What a step would take if nothing were lost, as far as a first guess needs it. Seconds."""

    weights_s: float
    """To read all weights once."""
    kv_token_s: float
    """To read the KV of one token."""
    token_s: float
    """To compute one token."""
    step_s: float
    """What any step takes besides."""
    attend_s: float = 0.0
    """To let one prompt token attend to one token."""

    def seconds(self, rows: int, context: int, tokens: int, attended: float = 0.0) -> float:
        """Return the guess for `rows` decode rows over `context` tokens of KV and `tokens` prompt tokens, which attend
        to so many in all.
        """
        compute = (rows + tokens) * self.token_s + attended * self.attend_s
        return self.step_s + max(self.weights_s, compute) + context * self.kv_token_s


class Guess(NamedTuple):
    """What a step takes, as far as is known."""

    seconds: float
    slack: float
    """The share by which it may be less than that; 0 for what was measured often."""


class _Known(msgspec.Struct):
    """What is known of one size."""

    times: float
    """Its time as a multiple of the nominal one."""
    count: int
    streak: int = 0
    """How many of the newest in a row were far above (or, below 0, far below) what is known."""
    bound: float = 0.0
    """The one of them that is nearest to it; until it is firm, the higher one of two."""


@dataclass(slots=True)
class _Nearest:
    """The measured sizes that are nearest to another one, kept up when it is asked for."""

    sizes: list[tuple[float, Size]] = field(default_factory=list)
    """How near each is, and which."""
    seen: int = 0
    """So many of those of its kind were looked at."""

    def take_in(self, size: Size, like: list[Size]) -> None:
        """Look at those of `like` that are new."""
        if self.seen == len(like):
            return
        new = ((_distance(size, other), other) for other in like[self.seen :] if other != size)
        self.sizes, self.seen = nsmallest(_FEW, (*self.sizes, *new)), len(like)


class _Saved(msgspec.Struct):
    """A cost model on disk."""

    version: int
    machine: str
    kinds: dict[str, _Known]
    sizes: list[tuple[Size, _Known]]
    attended: float
    """To how many tokens a prompt token has attended of late."""


def size_bucket(count: int) -> int:
    """Return `count` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: two sizes for each doubling. 0 stays 0."""
    if count <= 4:
        return count
    low = 1 << (count - 1).bit_length() - 1
    return low + low // 2 if count <= low + low // 2 else 2 * low


def alike(count: int) -> int:
    """Return the power of four up to which numbers are alike: 1, 4, 16, 64 ...; 0 stays 0."""
    return 1 << 2 * ((count - 1).bit_length() + 1 >> 1) if count else 0


def near_bucket(bucket: int, steps: int) -> int:
    """Return the bucket that is so many steps up (or down, below 0) from another; 1 is the least, and 0 stays 0."""
    for _ in range(abs(steps) if bucket else 0):
        if steps > 0:
            bucket = size_bucket(bucket + 1)
        else:
            bucket = bucket * 2 // 3 if bucket % 3 == 0 else max(1, bucket * 3 // 4)
    return bucket


class CostModel:
    """Keeps what steps took. `note` costs some look-ups in dictionaries; `guess` some more where little is known."""

    def __init__(self, nominal: Nominal, machine: str = "") -> None:
        """`machine` names model, type and device: what is saved for another one is not read."""
        self._nominal = nominal
        self._machine = machine
        self._kinds: dict[str, _Known] = {}
        self._sizes: dict[Size, _Known] = {}
        self._like: dict[tuple[str, int], list[Size]] = {}
        """Sizes by kind and SMs, in the order in which they were first measured."""
        self._nearest: dict[Size, _Nearest] = {}
        """Of each size that was asked for."""
        self._attended = 0.0  # to how many tokens a prompt token has attended of late
        self.note_on_file = "nothing was measured before"

    def note(
        self,
        kind: Kind,
        rows: int,
        context: int,
        tokens: int,
        seconds: float,
        share: int = 0,
        attended: float | None = None,
    ) -> None:
        """Take in what a step took. `rows` and `context` of a prompt step are those of the step it ran beside.

        `attended` is to how many tokens its prompt tokens attend in all; None for about as many as of late. A prompt of
        8,000 tokens takes longer to read than eight of 1,000: what was measured of one way with the former is not to be
        held against another that was measured with the latter.
        """
        if not seconds > 0:
            return  # a clock that did not move has nothing to say
        if kind == "decode beside" and self.guess("decode", rows, context, 0).slack > _SLACK_NEAR:
            return  # nor has one that nothing is known to compare with
        times = seconds / self._nominal_s(kind, rows, context, tokens, attended)
        if attended is not None and tokens:
            self._attended += (_WEIGHT if self._attended else 1.0) * (attended / tokens - self._attended)
        _learn(self._kinds, _kind(kind, share), times)
        size = _size(kind, rows, context, tokens, share)
        if size not in self._sizes:
            like = self._like.setdefault((kind, share), [])
            if len(like) >= MOST_SIZES:
                self._forget_half(like)
            like.append(size)
        _learn(self._sizes, size, times)

    def _forget_half(self, like: list[Size]) -> None:
        """Forget those of the sizes of a kind that were measured least."""
        like.sort(key=lambda size: self._sizes[size].count)
        for size in like[: len(like) // 2]:
            del self._sizes[size]
        del like[: len(like) // 2]
        self._nearest.clear()

    def seconds(self, kind: Kind, rows: int, context: int, tokens: int, share: int = 0) -> float:
        """Return what such a step takes, as far as is known."""
        return self.guess(kind, rows, context, tokens, share).seconds

    def guess(self, kind: Kind, rows: int, context: int, tokens: int, share: int = 0) -> Guess:
        """Return what such a step takes, and how well that is known."""
        size = _size(kind, rows, context, tokens, share)
        nominal_s = self._nominal_s(kind, rows, context, tokens)
        known = self._sizes.get(size)
        if kind in _BESIDES:
            return self._guess_beside(size, known, nominal_s, tokens)
        near = self._near(size) if known is None or known.count < _SURE else None
        if known is not None and (near is None or known.times < near * CLIP):
            return Guess(known.times * nominal_s, 0.0 if known.count >= FIRM else _SLACK_FEW)
        if near is not None:
            return Guess(near * nominal_s, _SLACK_NEAR)
        far = self._far(size)
        if far is not None:
            return Guess(far * nominal_s, _SLACK_KIND)
        return Guess(self._from_parts(kind, rows, context, tokens, nominal_s), _SLACK_PARTS)

    def _guess_beside(self, size: Size, known: _Known | None, nominal_s: float, tokens: int) -> Guess:
        others = self._far(size)
        if known is not None:
            times = known.times
            if others is not None:
                times = (known.count * times + _DOUBT * others) / (known.count + _DOUBT)
            return Guess(times * nominal_s, 0.0 if known.count >= FIRM else _SLACK_FEW)
        if others is not None:
            return Guess(others * nominal_s, _SLACK_NEAR)
        alone_s = nominal_s if size[0] == "decode beside" else self.seconds("prefill", 0, 0, tokens)
        return Guess(_BESIDE * alone_s, _SLACK_PARTS)

    def count(self, kind: Kind, rows: int, context: int, tokens: int, share: int = 0) -> int:
        """Return how often such a step was measured."""
        known = self._sizes.get(_size(kind, rows, context, tokens, share))
        return 0 if known is None else known.count

    def total(self, kind: Kind, share: int = 0) -> int:
        """Return how often steps of a kind were measured, of any size."""
        known = self._kinds.get(_kind(kind, share))
        return 0 if known is None else known.count

    def _nominal_s(self, kind: Kind, rows: int, context: int, tokens: int, attended: float | None = None) -> float:
        """Return what times are multiples of; for a decode step beside a prompt, what it takes alone."""
        if kind == "decode beside":
            return self.seconds("decode", rows, context, 0)
        if attended is None:
            attended = self._attended * tokens
        if kind in ("prefill", "prefill beside"):
            return self._nominal.seconds(0, 0, tokens, attended)
        if kind == "mixed":
            return self._nominal.seconds(rows, context, tokens, attended)
        return self._nominal.seconds(rows, context, 0)

    def _near(self, size: Size) -> float | None:
        """Return the mean of the measured neighbours, the nearest on either side of each of the three axes."""
        total = weights = 0.0
        buckets = [size[1], size[2], size[3]]
        for axis in range(3):
            for way in (-1, 1):
                for steps in range(1, _REACH + 1):
                    moved = list(buckets)
                    moved[axis] = near_bucket(buckets[axis], way * steps)
                    known = self._sizes.get((size[0], moved[0], moved[1], moved[2], size[4]))
                    if known is not None and moved != buckets:
                        total += known.times / steps
                        weights += 1 / steps
                        break
        return total / weights if weights else None

    def _far(self, size: Size) -> float | None:
        """Return the mean of the few other sizes of the kind that are nearest, however far; None if there is none.

        Not of all: what is measured of small steps, of which most is launching them, says nothing of large ones.
        """
        nearest = self._nearest.get(size)
        if nearest is None:
            if len(self._nearest) >= 4 * MOST_SIZES:
                self._nearest.clear()
            nearest = self._nearest[size] = _Nearest()
        nearest.take_in(size, self._like.get((size[0], size[4]), []))
        total = weights = 0.0
        for distance, other in nearest.sizes:
            known = self._sizes[other]
            weight = min(known.count, _SURE) / distance**2
            total += weight * known.times
            weights += weight
        return total / weights if weights else None

    def _from_parts(self, kind: Kind, rows: int, context: int, tokens: int, nominal_s: float) -> float:
        if kind == "mixed" and self._kinds:
            apart_s = self.seconds("decode", rows, context, 0) + self.seconds("prefill", 0, 0, tokens)
            parts_s = self._nominal_s("decode", rows, context, 0) + self._nominal_s("prefill", 0, 0, tokens)
            return apart_s * nominal_s / parts_s
        other = self._kinds.get("prefill" if kind == "decode" else "decode")
        return nominal_s * (other.times if other is not None else 1.0)

    # ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, path: Path) -> None:
        """Write what is known, whole or not at all. Raises OSError.

        What another engine has written meanwhile stays where it is measured more often: a calibration beside a server
        is not lost when that one ends.
        """
        other = self._read(path)
        kinds, sizes, attended = self._kinds, self._sizes, self._attended
        if isinstance(other, _Saved):
            kinds, sizes = _more_often(kinds, other.kinds), _more_often(sizes, dict(other.sizes))
            attended = attended or other.attended
            if len(sizes) > len(self._sizes):
                sizes = _most_often(sizes)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")  # its own: others may be saving, too
        try:
            part.write_bytes(msgspec.json.encode(_Saved(VERSION, self._machine, kinds, list(sizes.items()), attended)))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Read what was known; `note_on_file` says whether that could be used. Never raises for a file's content."""
        saved = self._read(path)
        if saved is None:
            return
        if isinstance(saved, str):
            self.note_on_file = f"{saved}; measuring anew"
            return
        self._sizes, self._kinds, self._attended = dict(saved.sizes), saved.kinds, saved.attended
        self._like, self._nearest = {}, {}
        for size in self._sizes:
            self._like.setdefault((size[0], size[4]), []).append(size)
        self.note_on_file = f"{len(self._sizes)} sizes of steps were measured before ({path})"

    def _read(self, path: Path) -> _Saved | str | None:
        """Return what a file has, why that cannot be used, or None if there is none."""
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, ValueError) as failure:
            return f"{path} could not be read ({failure})"
        if (saved.version, saved.machine) != (VERSION, self._machine):
            return f"{path} was measured on {saved.machine!r}"
        if not all(
            known.times > 0 and known.count > 0 for known in (*saved.kinds.values(), *dict(saved.sizes).values())
        ):
            return f"{path} has times that no step can take"
        return saved


def cost_path(folder: Path, machine: str) -> Path:
    """Return where the cost model of a machine is kept in the cache directory `folder`."""
    return folder / "costs" / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _more_often(known: dict[K, _Known], others: dict[K, _Known]) -> dict[K, _Known]:
    """Return what is known of all, each from where it was measured more often."""
    return others | {key: one for key, one in known.items() if key not in others or one.count >= others[key].count}


def _most_often(sizes: dict[Size, _Known]) -> dict[Size, _Known]:
    """Return the MOST_SIZES sizes of each kind and share that were measured most often."""
    kept, seen = dict[Size, _Known](), Counter[tuple[str, int]]()
    for size, known in sorted(sizes.items(), key=lambda item: -item[1].count):
        seen[size[0], size[4]] += 1
        if seen[size[0], size[4]] <= MOST_SIZES:
            kept[size] = known
    return kept


def _learn(known: dict[K, _Known], key: K, times: float) -> None:
    """Take the median of the first three, then a moving mean that no single measurement moves far.

    What disturbs a step makes it longer, so two much shorter ones in a row are believed, and only four longer ones.
    """
    old = known.get(key)
    if old is None:
        known[key] = _Known(times, 1)
        return
    old.count += 1
    if old.count == 2:
        old.times, old.bound = min(old.times, times), max(old.times, times)
    elif old.count == FIRM:
        old.times = min(max(times, old.times), old.bound)
    elif times > old.times * _FAR:
        old.bound = min(times, old.bound) if old.streak > 0 else times
        old.streak = max(0, old.streak) + 1
        _move(old, times, believed=old.streak >= _LONGER)
    elif times * _FAR < old.times:
        old.bound = max(times, old.bound) if old.streak < 0 else times
        old.streak = min(0, old.streak) - 1
        _move(old, times, believed=old.streak <= -_SHORTER)
    else:
        old.streak = 0
        _move(old, times, believed=False)


def _move(old: _Known, times: float, *, believed: bool) -> None:
    if believed:
        old.times, old.streak = old.bound, 0
        return
    weight = max(_WEIGHT, 1 / old.count)
    old.times += weight * (min(max(times, old.times / CLIP), old.times * CLIP) - old.times)


def _kind(kind: Kind, share: int) -> str:
    return f"{kind}, {share} SMs" if share else kind


def _size(kind: Kind, rows: int, context: int, tokens: int, share: int) -> Size:
    if kind in _BESIDES:  # decode rows hold a chunk up the more, the more they read
        return kind, size_bucket(rows), alike(context // rows if rows else 0), alike(tokens), share
    return kind, size_bucket(rows), size_bucket(context // rows if rows else 0), size_bucket(tokens), share


def _distance(size: Size, other: Size) -> float:
    """Return how many doublings two sizes of a kind are apart, and a little."""
    axes = zip(size[1:4], other[1:4], strict=True)
    return 0.1 + sum(abs(math.log2((one + 1) / (two + 1))) for one, two in axes)
