"""When attention is reused: the rule of the hooks, on the host, in a compiled model and inside of a graph."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention

import pab_fx
from pab_fx import MLPBroadcast, PABBackend, PABConfig
from pab_fx.policy.when import END, NEVER, AfterTimesteps, Progress, Rule, SkipRange, Step, reused_calls
from pab_fx.testing import captured as captured_graph
from pab_fx.testing import strategies
from pab_fx.testing.strategies import TIMESTEPS, timestep_lists

lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])

skip_range, after_timesteps, generation = strategies.skip_ranges(), strategies.after_timesteps(), timestep_lists()
history = st.lists(st.tuples(st.booleans(), generation), min_size=1, max_size=4)  # (reset before it, timesteps)
few_examples = settings(max_examples=30, deadline=None)


# -------------------------------------------------------------------------------------- the rule, once more


def reuses_of_skip_range(n_skip: int, low: float, high: float, timesteps: Sequence[float]) -> list[bool]:
    """The rule of DESIGN.md, section 2, for one generation."""
    cache, reused = False, []
    for n, t in enumerate(timesteps):
        reuse = cache and n > 0 and low < t < high and n % n_skip != 0
        cache = True
        reused.append(reuse)
    return reused


def reuses_after_timesteps(skip_counts: dict[float, int], timesteps: Sequence[float]) -> list[bool]:
    """VideoSys' rule for feed-forwards: keep at a listed timestep, reuse for the next `skip_count` steps."""
    left, reused = 0, []
    for t in timesteps:
        reuse = t not in skip_counts and left > 0
        left = skip_counts[t] if t in skip_counts else left - 1
        reused.append(reuse)
    return reused


def reuses(rule: Rule, timesteps: Sequence[float]) -> list[bool]:
    """The reusing steps of one generation under either rule, by the models above."""
    if isinstance(rule, SkipRange):
        return reuses_of_skip_range(rule.skip_range, rule.low, rule.high, timesteps)
    return reuses_after_timesteps(dict(rule.skip_counts), timesteps)


def generations(calls: Sequence[tuple[bool, Sequence[float]]], resets: bool = True) -> list[tuple[float, ...]]:
    """The generations that a history of timesteps is: one begins at each reset and where a timestep rises."""
    found: list[tuple[float, ...]] = []
    for reset, timesteps in calls:
        if found and not (reset and resets) and timesteps[0] <= found[-1][-1]:
            found[-1] += tuple(timesteps)
        else:
            found.append(tuple(timesteps))
    return found


def sources(rule: Rule, parts: Sequence[tuple[float, ...]]) -> list[int]:
    """For each step of all generations, the step that its output was computed in."""
    found: list[int] = []
    for reuse in (reuse for timesteps in parts for reuse in reuses(rule, timesteps)):
        found.append(found[-1] if reuse else len(found))
    return found


# ---------------------------------------------------------------------------------------------- on the host


@given(skip_range | after_timesteps, generation)
def test_the_plan_of_a_generation_is_the_rule(rule: Rule, timesteps: tuple[float, ...]) -> None:
    assert list(reused_calls(rule, timesteps)) == reuses(rule, timesteps)


@given(skip_range | after_timesteps, generation)
def test_what_is_not_kept_is_never_reused_by_the_next_call(rule: Rule, timesteps: tuple[float, ...]) -> None:
    computed, computed_t = -1, NEVER
    for n, (t, next_t) in enumerate(zip(timesteps, (*timesteps[1:], END), strict=True)):
        if n == 0 or not rule.decide(Step(n, t), Progress(n - computed, computed_t)):
            computed, computed_t = n, t
        progress = Progress(n + 1 - computed, computed_t)
        reused_next = next_t != END and rule.decide(Step(n + 1, next_t), progress)
        assert rule.keeps(Step(n, t), progress, next_t) == reused_next  # what is known to come decides exactly
        if not rule.keeps(Step(n, t), progress, None):
            assert not any(rule.decide(Step(n + 1, later), progress) for later in TIMESTEPS if later <= t)


@given(st.integers(1, 6), st.integers(1, 40))
def test_a_skip_range_of_n_computes_every_nth_step_inside_the_window(n_skip: int, steps: int) -> None:
    plan = reused_calls(SkipRange(n_skip, -math.inf, math.inf), range(1000, 1000 - steps, -1))
    assert plan == tuple(n % n_skip != 0 for n in range(steps))


def test_the_edges_of_a_window_are_outside_of_it() -> None:
    assert reused_calls(SkipRange(9, 100, 800), (900, 800, 799, 101, 100, 50)) == (
        False,
        False,
        True,
        True,
        False,
        False,
    )


def test_latte_reuses_feed_forwards_in_the_two_steps_after_each_listed_timestep() -> None:
    (mlp,) = PABConfig.preset("latte").mlp
    rule = AfterTimesteps(tuple((t, mlp.skip_count) for t in mlp.timesteps))
    timesteps = range(980, 0, -20)  # 50 steps but the first
    reused = [t for t, reuse in zip(timesteps, reused_calls(rule, timesteps), strict=True) if reuse]
    assert reused == [700, 680, 620, 600, 540, 520, 460, 440, 380, 360]


# ---------------------------------------------------------------------------------------- in a compiled model


class SelfAttention(nn.Module):
    """Yields its input, if that is constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x)


class CrossAttention(nn.Module):
    """Yields the text, if that is constant."""

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x, text, text)


class Probe(nn.Module):
    """Two attentions that yield what they are given, so that their outputs tell when they were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross = SelfAttention(), CrossAttention()

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden_states + 0 * timestep
        return self.attn(x), self.cross(x, encoder_hidden_states)


def probe_inputs(step: int, t: float) -> dict[str, torch.Tensor]:
    """Inputs of a `Probe` that all hold the number of the step."""
    return {
        "hidden_states": torch.full((1, 1, 3, 4), float(step)),
        "encoder_hidden_states": torch.full((1, 1, 5, 4), float(step)),
        "timestep": torch.tensor(float(t)),
    }


@functools.cache
def captured() -> tuple[fx.GraphModule, tuple[str, ...], list[Any]]:
    """The graph of a `Probe` as Dynamo hands it to a backend, its inputs by argument, example inputs."""
    gm, example_inputs = captured_graph(Probe(), (), probe_inputs(0, 0))
    inputs = gm.graph.find_nodes(op="placeholder")
    names = tuple(next(name for name in probe_inputs(0, 0) if f"l_{name}_" == node.target.lower()) for node in inputs)
    return gm, names, example_inputs


def probe_config(spatial: SkipRange, cross: SkipRange) -> PABConfig:
    return PABConfig(
        spatial_attention_block_skip_range=spatial.skip_range,
        spatial_attention_timestep_skip_range=(spatial.low, spatial.high),
        cross_attention_block_skip_range=cross.skip_range,
        cross_attention_timestep_skip_range=(cross.low, cross.high),
    )


def observed(
    model: Callable[..., Sequence[torch.Tensor]],
    calls: Sequence[tuple[bool, Sequence[float]]],
    reset: Callable[[], None],
) -> tuple[list[int], ...]:
    """For each output of `model` and each step, the step that the output was computed in."""
    found, step = [], 0
    for resets, timesteps in calls:
        if resets:
            reset()
        for t in timesteps:
            found.append([round(output.mean().item()) for output in model(**probe_inputs(step, t))])
            step += 1
    return tuple(list(of_output) for of_output in zip(*found, strict=True))


@lowerings
@few_examples
@given(skip_range, skip_range, history)
def test_compiled_attention_is_reused_when_the_rule_says(
    lowering: str, spatial: SkipRange, cross: SkipRange, calls: list[tuple[bool, tuple[float, ...]]]
) -> None:
    gm, names, example_inputs = captured()
    backend = PABBackend(probe_config(spatial, cross), inner="eager", lowering=lowering)
    compiled = backend(gm, example_inputs)

    def model(**inputs: torch.Tensor) -> Any:
        return compiled(*(inputs[name] for name in names))

    parts = generations(calls)
    expected = sources(spatial, parts), sources(cross, parts)
    assert observed(model, calls, backend.reset) == expected
    reused = sum(source != step for steps in expected for step, source in enumerate(steps))
    assert backend.report().reused == reused


@few_examples
@given(skip_range, skip_range, st.lists(generation, min_size=1, max_size=3), st.booleans())
def test_knowing_the_timesteps_changes_no_decision_and_keeps_nothing_in_vain(
    spatial: SkipRange, cross: SkipRange, parts: list[tuple[float, ...]], conditional: bool
) -> None:
    gm, names, example_inputs = captured()
    running: list[tuple[float, ...]] = [()]
    backend = PABBackend(
        probe_config(spatial, cross),
        inner="eager",
        lowering="cond" if conditional else "specialize",
        timesteps=lambda: running[-1],
    )
    compiled = backend(gm, example_inputs)
    for timesteps in parts:
        running.append(timesteps)
        backend.reset()
        plans = [reuses(rule, timesteps) for rule in (spatial, cross)]
        for step, t in enumerate(timesteps):
            inputs = probe_inputs(step, t)
            outputs = compiled(*(inputs[name] for name in names))
            for rule, output, role, plan in zip((spatial, cross), outputs, ("spatial", "cross"), plans, strict=True):
                assert round(output.mean().item()) == sources(rule, [timesteps])[step]
                held = next(r.cache_bytes for r in backend.report().roles if r.role == role)
                is_reused_next = step + 1 < len(timesteps) and plan[step + 1]
                assert (held > 0) == is_reused_next


@lowerings
@pytest.mark.parametrize("rule", [SkipRange(2, 100, 800), SkipRange(3, 100, 800), SkipRange(5, 0, 1001)], ids=repr)
def test_a_model_compiled_by_torch_compile_follows_the_rule_without_a_recompile(lowering: str, rule: SkipRange) -> None:
    backend = PABBackend(probe_config(rule, SkipRange(4, 100, 800)), inner="eager", lowering=lowering)
    model = torch.compile(Probe(), backend=backend)
    parts = [(900, 700, 600, 500, 400, 300, 200, 50), (1000, 600, 500, 400), (700, 300)]

    spatial, cross = observed(model, [(False, part) for part in parts], backend.reset)

    assert spatial == sources(rule, parts)
    assert cross == sources(SkipRange(4, 100, 800), parts)
    assert backend.report().reused > 0
    assert len(backend.graphs) == 1


class Block(nn.Module):
    """An attention and a feed-forward, both showing which step they were computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = SelfAttention()
        self.ff = FeedForward()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attn(x), self.ff(x)


class FeedForward(nn.Module):
    """Yields its input, if that is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.into.weight)
        nn.init.eye_(self.out_of.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_of(torch.relu(self.into(x)))


class BlockProbe(nn.Module):
    """A block with the inputs of a `Probe`; yields the attention's and the feed-forward's output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()]).requires_grad_(False)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks[0](hidden_states + 0 * timestep)  # type: ignore[no-any-return]


def block_config(spatial: SkipRange, mlp: AfterTimesteps) -> PABConfig:
    return PABConfig(
        spatial_attention_block_skip_range=spatial.skip_range,
        spatial_attention_timestep_skip_range=(spatial.low, spatial.high),
        mlp=[MLPBroadcast(t, 0, n) for t, n in mlp.skip_counts],  # type: ignore[arg-type]
    )


@lowerings
@settings(max_examples=6, deadline=None)
@given(skip_range, after_timesteps, history)
def test_compiled_feed_forwards_are_reused_when_the_rule_says(
    lowering: str, spatial: SkipRange, mlp: AfterTimesteps, calls: list[tuple[bool, tuple[float, ...]]]
) -> None:
    torch.compiler.reset()
    backend = PABBackend(block_config(spatial, mlp), inner="eager", lowering=lowering)
    model = torch.compile(BlockProbe(), backend=backend)

    parts = generations(calls)
    assert observed(model, calls, backend.reset) == (sources(spatial, parts), sources(mlp, parts))


# ---------------------------------------------------------------------------------------- inside of a graph


@few_examples
@given(skip_range, after_timesteps, history)
def test_a_rewritten_graph_decides_as_the_host_does(
    spatial: SkipRange, mlp: AfterTimesteps, calls: list[tuple[bool, tuple[float, ...]]]
) -> None:
    model = pab_fx.rewrite(fx.symbolic_trace(BlockProbe()), block_config(spatial, mlp))

    parts = generations(calls, resets=False)  # such a graph is its own master: only a rising timestep resets it
    assert observed(model, calls, reset=lambda: None) == (sources(spatial, parts), sources(mlp, parts))


@few_examples
@given(skip_range, skip_range, history)
def test_a_rewritten_dynamo_graph_decides_as_the_host_does(
    spatial: SkipRange, cross: SkipRange, calls: list[tuple[bool, tuple[float, ...]]]
) -> None:
    gm, names, _ = captured()
    rewritten = pab_fx.rewrite(gm, probe_config(spatial, cross))

    def model(**inputs: torch.Tensor) -> Any:
        return rewritten(*(inputs[name] for name in names))

    parts = generations(calls, resets=False)
    assert observed(model, calls, reset=lambda: None) == (sources(spatial, parts), sources(cross, parts))


def test_a_new_generation_in_a_rewritten_graph_reuses_no_feed_forward_of_the_last_one() -> None:
    mlp = AfterTimesteps(((700.0, 4),))
    model = pab_fx.rewrite(fx.symbolic_trace(BlockProbe()), block_config(SkipRange(1, 100, 800), mlp))
    cut_off, following = (700, 600), (900, 800, 750)
    _, found = observed(model, [(False, cut_off), (False, following)], reset=lambda: None)
    assert found == [0, 0, 2, 3, 4]
