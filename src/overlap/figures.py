"""Statistics: the figures of one engine at one moment, from the parts that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from overlap.loop import LoopStatistics
from overlap.schedule.settled import PlannerStatistics

if TYPE_CHECKING:
    from overlap.grammar.masks import Masks
    from overlap.graphs.driver import GraphStatistics
    from overlap.loop import Loop
    from overlap.schedule.planner import Planner


@dataclass(frozen=True, kw_only=True)
class Statistics(PlannerStatistics, LoopStatistics):
    """An engine's figures at one moment. Counters count from the start. Plain values, which may cross processes."""

    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Why attention, or the drafter's, is slower than it could be on this device: 1 each."""
    graphs: Mapping[str, float] = field(default_factory=dict)
    """What CUDA graphs did, by the names of `GraphStatistics`."""
    graph_fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Eager steps by why they had no graph."""
    graph_not_whole: Mapping[str, int] = field(default_factory=dict)
    """Decode steps that no graph holds whole, by what they ask for."""
    lane_choices: Mapping[str, int] = field(default_factory=dict)
    """Steps with prompts beside decode rows by how they were run: "mixed", "serial", "lanes", "lanes sm:N"."""
    sm_shares: int = 0
    """How many shares of SMs the lanes can choose from; 0 where SMs are not shared out (`explain` says why)."""
    structured: Mapping[str, float] = field(default_factory=dict)
    """What holding answers to a form took, by the names of `MaskStatistics`."""
    queue_seconds: Mapping[str, Any] = field(default_factory=dict)
    """How long requests waited for their first slot: a histogram's `bounds`, `counts` and `total`."""


def statistics_of(
    planner: Planner,
    loop: Loop,
    graphs: GraphStatistics,
    masks: Masks | None = None,
    fallbacks: Mapping[str, int] | None = None,
) -> Statistics:
    """Return the figures of this moment. From any thread; two figures may be of two moments."""
    waited = planner.queue_seconds.figures()
    return Statistics(
        **asdict(planner.statistics()),
        **asdict(loop.statistics()),
        fallbacks=dict(fallbacks or {}),
        graphs={
            each.name: getattr(graphs, each.name)
            for each in fields(graphs)
            if each.name not in ("fallbacks", "not_whole")
        },
        graph_fallbacks=dict(graphs.fallbacks),
        graph_not_whole=dict(graphs.not_whole),
        lane_choices=dict(planner.lane_choices),
        sm_shares=len(planner.splitter.shares) if planner.splitter is not None else 0,
        structured={} if masks is None else asdict(masks.statistics()),
        queue_seconds={"bounds": waited.bounds, "counts": waited.counts, "total": waited.total},
    )
