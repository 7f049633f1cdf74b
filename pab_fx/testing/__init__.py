"""For tests of graph passes: are two graphs the same, does a model broadcast as it should, and models to try it on.

    assert_graphs_equivalent(before, after)                  the same up to names and order; the error is a diff
    assert_broadcasts_like(model, config, reference, ...)    whole generations, step by step; the error reproduces itself
    @given(transformers(), schedules())                      hypothesis strategies: `pip install "pab-fx[testing]"`

docs/testing.md shows how a pass of one's own is tested with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .broadcasts import Broadcast, Clock, Hooked, Step, assert_broadcasts_like
from .graphs import assert_graphs_equivalent, graph_difference
from .small_graphs import GraphSpec
from .specs import AttentionSpec, Schedule, Site, TransformerSpec
from .tracing import TRACERS, captured, traced

if TYPE_CHECKING:
    from .strategies import (
        after_timesteps,
        attention_specs,
        configs,
        graphs,
        schedules,
        skip_ranges,
        timestep_lists,
        transformers,
        windows,
    )

_STRATEGIES = (
    "after_timesteps",
    "attention_specs",
    "configs",
    "graphs",
    "schedules",
    "skip_ranges",
    "timestep_lists",
    "transformers",
    "windows",
)
__all__ = [
    "TRACERS",
    "AttentionSpec",
    "Broadcast",
    "Clock",
    "GraphSpec",
    "Hooked",
    "Schedule",
    "Site",
    "Step",
    "TransformerSpec",
    "assert_broadcasts_like",
    "assert_graphs_equivalent",
    "captured",
    "graph_difference",
    "traced",
]


def __getattr__(name: str) -> Any:
    """The strategies, which alone need hypothesis."""
    if name in _STRATEGIES:
        from . import strategies

        return getattr(strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
