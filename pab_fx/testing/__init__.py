"""For tests of graph passes: are two graphs the same, does a model broadcast as it should, and models to try it on.

    assert_graphs_equivalent(before, after)                 the same up to names and order; the error is a diff
    assert_broadcasts_like(model, config, reference, ...)   whole generations, step by step; the error can be pasted
    @given(strategies.transformers(), ...)                  hypothesis strategies: `pip install "pab-fx[testing]"`

docs/testing.md shows how a pass of one's own is tested with it. `pab_fx.testing.strategies` alone needs
hypothesis.
"""

from .broadcasts import Broadcast, Step, assert_broadcasts_like
from .graphs import assert_graphs_equivalent, graph_difference
from .hooked import Clock, Hooked
from .replaying import Replayed, replaying
from .small_graphs import GraphSpec
from .specs import AttentionSpec, Schedule, Site, TransformerSpec
from .tracing import TRACERS, captured, traced

__all__ = [
    "TRACERS",
    "AttentionSpec",
    "Broadcast",
    "Clock",
    "GraphSpec",
    "Hooked",
    "Replayed",
    "Schedule",
    "Site",
    "Step",
    "TransformerSpec",
    "assert_broadcasts_like",
    "assert_graphs_equivalent",
    "captured",
    "graph_difference",
    "replaying",
    "traced",
]
