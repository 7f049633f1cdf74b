"""Hypothesis strategies: schedules, timesteps, configs, transformers and graphs, drawn as data that can be pasted.

@given(transformers(), schedules())
def test_my_pass_keeps_what_the_model_computes(spec, schedule): ...
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("the strategies of pab_fx.testing need hypothesis: pip install 'pab-fx[testing]'") from error

from ..policy.config import MLPBroadcast, PABConfig
from ..policy.when import AfterTimesteps, SkipRange
from .small_graphs import STEPS, GraphSpec
from .specs import KINDS, MATHS, PREPARATIONS, RETURNS, USES, AttentionSpec, Schedule, Site, TransformerSpec

# ----------------------------------------------------------------------------------- schedules and timesteps

TIMESTEPS = (50, 100, 101, 300, 400, 500, 600, 700, 799, 800, 900, 1000)
"""Few values, so that steps fall onto the edges of windows and timesteps repeat."""

timesteps = st.sampled_from(TIMESTEPS)


def windows() -> st.SearchStrategy[tuple[float, float]]:
    """Windows of timesteps, of no width too."""
    return st.tuples(timesteps, timesteps).map(lambda edges: (min(edges), max(edges)))


def skip_ranges() -> st.SearchStrategy[SkipRange]:
    """Rules of attentions."""
    return st.builds(lambda n, edges: SkipRange(n, *edges), st.integers(1, 5), windows())


def after_timesteps() -> st.SearchStrategy[AfterTimesteps]:
    """Rules of feed-forwards."""
    listed = st.lists(st.tuples(timesteps, st.integers(1, 4)), min_size=1, max_size=4, unique_by=lambda pair: pair[0])
    return listed.map(lambda pairs: AfterTimesteps(tuple((float(t), n) for t, n in pairs)))


@st.composite
def timestep_lists(draw: st.DrawFn, min_size: int = 1, max_size: int = 9, restarts: bool = False) -> tuple[float, ...]:
    """The timesteps of a generation, none of which rises: as schedulers yield them, and odd ones.

    Args:
        draw: hypothesis'.
        min_size: least number of steps.
        max_size: largest number of steps.
        restarts: let timesteps rise now and then, where a new generation begins.
    """
    steps = draw(st.integers(min_size, max_size))
    kind = draw(st.sampled_from(("any", "any", "leading", "linspace", "flow matching", "repeated", "restarts")))
    if kind == "leading":  # DDIM, DDPM
        return tuple(t * (1000 // steps) + 1 for t in reversed(range(steps)))
    if kind == "linspace":  # Euler
        return _single(999.0 * (steps - 1 - i) / max(steps - 1, 1) for i in range(steps))
    if kind == "flow matching":  # sigmas shifted towards noise
        shift, sigmas = draw(st.sampled_from((1.0, 3.0, 7.0))), [1 - i / steps for i in range(steps)]
        return _single(1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas)
    found = sorted(draw(st.lists(timesteps, min_size=steps, max_size=steps)), reverse=True)
    if kind == "repeated":  # Heun evaluates each twice
        found = [t for t in found for _ in range(2)][:steps]
    if kind == "restarts" and restarts:
        at = draw(st.integers(0, steps))
        found = found[at:] + found[:at]
    return tuple(found)


def _single(found: Iterable[float]) -> tuple[float, ...]:
    """Numbers in single precision, as a scheduler's tensor holds them."""
    return tuple(torch.tensor(list(found)).tolist())


@st.composite
def schedules(draw: st.DrawFn, generations: int = 2, max_size: int = 6) -> Schedule:
    """Ranges of 1 to 4 or none, windows, and generations, of which each but the first starts higher than the last."""
    ranges = draw(st.tuples(*(st.sampled_from((2, 3, 4, 1, None)) for _ in range(3))))
    found = draw(st.tuples(*(st.sampled_from(((100, 800), (0, 1001), (300, 700))) for _ in range(3))))
    lists = [draw(timestep_lists(3, max_size)) for _ in range(generations)]
    lists[1:] = [(max(1000, lists[0][0]) + i, *each) for i, each in enumerate(lists[1:])]
    if ranges == (None, None, None):
        ranges = (2, None, None)
    return Schedule(ranges, found, tuple(lists))


@st.composite
def configs(draw: st.DrawFn, mlp: bool = True) -> PABConfig:
    """Configs that decide roles by the dataflow; `mlp` allows feed-forwards to be broadcast."""
    ranges = {role: draw(st.none() | st.integers(1, 5)) for role in ("spatial", "temporal", "cross")}
    fields: dict[str, Any] = {f"{role}_attention_block_skip_range": each for role, each in ranges.items()}
    fields |= {f"{role}_attention_timestep_skip_range": draw(windows()) for role in ranges}
    if mlp and draw(st.booleans()):
        listed = tuple(draw(st.lists(timesteps, min_size=1, max_size=3, unique=True)))
        blocks = draw(st.none() | st.just((0,)))
        fields["mlp"] = MLPBroadcast(listed, blocks, draw(st.integers(1, 3)))
    return PABConfig(**fields)


# ---------------------------------------------------------------------------------------------- transformers

SIZES = st.sampled_from(
    [
        {"frames": 3, "space": 4, "text": 5, "heads": 2},
        {"frames": 4, "space": 4, "text": 4, "heads": 4},
        {"frames": 2, "space": 2, "text": 2, "heads": 2},
        {"frames": 1, "space": 4, "text": 3, "heads": 1},
        {"frames": 3, "space": 1, "text": 1, "heads": 3},
        {"frames": 2, "space": 3, "text": 6, "heads": 2},
    ]
)

UNTRACEABLE_USES = ("out_setitem", "x_setitem", "iadd")
"""What `symbolic_trace` traces otherwise than eager does it: its proxies take no `x[i] = y`, and make `x = x + y` of
`x += y`."""

UNTRACEABLE_PREPARATIONS = ("norm_add_",)

PURE_USES = ("add", "gate", "iadd", "x_setitem", "twice", "late", "unused")
"""Uses that leave an output as it is."""


@st.composite
def attention_specs(draw: st.DrawFn, breaks: bool = False, inference: bool = True) -> AttentionSpec:
    """Attention modules; `inference` allows inference mode inside, which `torch.export` does not take.

    One that breaks enters no mode: Dynamo gives up the frame around it, and with it that of every attention
    of the class, broadcast before or not.
    """
    does_break = draw(st.booleans()) if breaks else False
    contexts = ("none", "none", "no_grad", *(("inference",) if inference else ()))
    return AttentionSpec(
        kind=draw(st.sampled_from(KINDS)),
        math=draw(st.sampled_from(MATHS)),
        returns=draw(st.sampled_from(RETURNS)),
        fused_qkv=draw(st.booleans()),
        context="none" if does_break else draw(st.sampled_from(contexts)),
        dropout=draw(st.sampled_from(("none", "zero", "eval"))),
        breaks=does_break,
    )


@st.composite
def transformers(
    draw: st.DrawFn,
    breaks: bool = False,
    traceable: bool = False,
    exportable: bool = False,
    attention: bool = True,
) -> TransformerSpec:
    """Models of one or two blocks with one to three attentions.

    Where an attention is called several times its outputs are not updated in place: the hooks then hand the
    same tensor to both calls, and an update by one user is seen by the other.

    Args:
        draw: hypothesis'.
        breaks: allow breaks of the graph.
        traceable: only what `symbolic_trace` traces.
        exportable: only what `torch.export` takes.
        attention: `False` for feed-forwards alone.
    """
    shape = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    feed_forward = draw(st.sampled_from(("add", "none") if traceable else ("add", "in_place", "none")))
    if not attention:
        return TransformerSpec((), ((),) * len(shape), feed_forward, **draw(SIZES))
    attentions = draw(st.lists(attention_specs(breaks, inference=not exportable), min_size=1, max_size=3))
    called = draw(st.lists(st.integers(0, len(attentions) - 1), min_size=sum(shape), max_size=sum(shape)))
    prepare = [each for each in PREPARATIONS if not traceable or each not in UNTRACEABLE_PREPARATIONS]
    sites = []
    for index in called:
        uses = [use for use in USES if not traceable or use not in UNTRACEABLE_USES]
        if called.count(index) > 1:
            uses = [use for use in uses if use in PURE_USES]
        sites.append(
            Site(
                attention=index,
                prepare=draw(st.lists(st.sampled_from(prepare), max_size=3, unique=True).map(tuple)),
                uses=draw(st.tuples(st.sampled_from(uses), st.sampled_from(uses))),
                break_before=draw(st.booleans()) if breaks else False,
                break_after=draw(st.booleans()) if breaks else False,
            )
        )
    blocks = tuple(tuple(sites[sum(shape[:i]) :][:count]) for i, count in enumerate(shape))
    return TransformerSpec(tuple(attentions), blocks, feed_forward, **draw(SIZES))


# ---------------------------------------------------------------------------------------------------- graphs


@st.composite
def graphs(draw: st.DrawFn, returns: bool = True, without: tuple[str, ...] = ()) -> GraphSpec:
    """Small graphs of views, updates in place, writes to slices and random numbers: `spec.build()` makes them.

    Args:
        draw: hypothesis'.
        returns: allow tensors to be returned as they are, inputs too.
        without: names out of `small_graphs.STEPS` to leave out.
    """
    names = [name for name in STEPS if name not in without]
    numbers = st.integers(0, 10)
    steps = st.tuples(st.sampled_from(names), numbers, numbers)
    returned = st.none() | numbers if returns else st.none()
    drawn = draw(st.lists(steps, min_size=3, max_size=18))
    return GraphSpec(tuple(drawn), draw(st.tuples(numbers, numbers, numbers)), draw(returned))
