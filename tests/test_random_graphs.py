"""Random small transformers broadcast to the bit as diffusers' hooks do: compiled by Dynamo, and rewritten traces."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_models import (
    AttentionSpec,
    Clock,
    Hooked,
    Schedule,
    Site,
    Spec,
    build,
    config_of,
    first_difference,
    generate,
    inputs,
    schedules,
    specs,
)

from pab_fx import PABBackend, rewrite

Trajectory = list[tuple[torch.Tensor, ...]]
LOWERINGS = ("specialize", "cond")
search = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure takes minutes: add Phase.shrink to look into one
    suppress_health_check=list(HealthCheck),
)


def check_compiled(spec: Spec, schedule: Schedule, lowering: str, dynamic: bool | None = None) -> PABBackend:
    """Compile the model, generate twice, and compare outputs and the number of reuses with the hooks'.

    A module that the report calls left alone because Dynamo breaks in it is one without a hook.
    """
    torch._dynamo.reset()
    clock, model = Clock(), build(spec)
    config = config_of(schedule, clock)
    oracle = Hooked(model, config)
    backend = PABBackend(config, inner="eager", lowering=lowering)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    outputs = generations(spec, schedule, compiled, clock)
    broken = broken_modules(backend)
    assert not broken or any(attention.breaks for attention in spec.attentions)
    oracle.leave_alone(broken)
    compare(outputs, generations(spec, schedule, oracle, clock, reset=oracle.reset))
    if all(region.left_alone is None for region in backend.report().regions):
        assert backend.report().reused == oracle.reused
    return backend


def broken_modules(backend: PABBackend) -> set[str]:
    """Attentions of which no graph holds the whole, or the part that yields the output."""
    regions = backend.report().regions
    whole = {region.name for region in regions if region.left_alone is None}
    return {region.name for region in regions if "breaks inside" in (region.left_alone or "")} - whole


def generations(
    spec: Spec, schedule: Schedule, model: Callable[..., object], clock: Clock, reset: Callable[[], None] | None = None
) -> list[Trajectory]:
    """The outputs of each generation of the schedule."""
    outputs = []
    for seed, timesteps in enumerate(schedule.generations):
        outputs.append(generate(model, spec, timesteps, clock, seed))
        if reset:
            reset()
    return outputs


def compare(outputs: list[Trajectory], expected: list[Trajectory]) -> None:
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        difference = first_difference(wanted, output)
        assert difference is None, f"generation {i}, {difference}"


# ------------------------------------------------------------------------------------------ what is drawn


@settings(search, max_examples=25)
@given(specs(), schedules(), st.sampled_from(LOWERINGS))
def test_compiled_models_equal_the_hooks(spec: Spec, schedule: Schedule, lowering: str) -> None:
    check_compiled(spec, schedule, lowering)


@settings(search, max_examples=8)
@given(specs(breaks=True), schedules(), st.sampled_from(LOWERINGS))
def test_models_with_graph_breaks_equal_the_hooks(spec: Spec, schedule: Schedule, lowering: str) -> None:
    check_compiled(spec, schedule, lowering)


@settings(search, max_examples=100)
@given(specs(traceable=True), schedules())
def test_rewritten_symbolic_traces_equal_the_hooks(spec: Spec, schedule: Schedule) -> None:
    check_rewritten(spec, schedule, lambda model, _: torch.fx.symbolic_trace(model))


@settings(search, max_examples=20)
@given(specs(exportable=True), schedules())
def test_rewritten_exports_equal_the_hooks(spec: Spec, schedule: Schedule) -> None:
    check_rewritten(spec, schedule, lambda model, args: torch.export.export(model, args).module())


@pytest.mark.slow
@settings(search, max_examples=400)
@given(specs(breaks=True), schedules(), st.sampled_from(LOWERINGS), st.sampled_from([None, True]))
def test_many_compiled_models_equal_the_hooks(
    spec: Spec, schedule: Schedule, lowering: str, dynamic: bool | None
) -> None:
    check_compiled(spec, schedule, lowering, dynamic)


def check_rewritten(
    spec: Spec, schedule: Schedule, trace: Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], torch.fx.GraphModule]
) -> None:
    """Rewrite a trace of the model, generate twice, and compare with the hooks."""
    torch._dynamo.reset()
    clock, model = Clock(), build(spec)
    config = config_of(schedule, clock)
    oracle = Hooked(model, config)
    reads_its_input = copy.copy(config)
    reads_its_input.current_timestep_callback = None
    with torch.no_grad():
        gm = trace(model, inputs(spec, t=500, seed=0))
    outputs = generations(spec, schedule, rewrite(gm, reads_its_input, model=model), clock)
    compare(outputs, generations(spec, schedule, oracle, clock, reset=oracle.reset))


# --------------------------------------------------------------------------- what the search found, by hand

EVERY_2ND = Schedule(ranges=(2, 2, 2))
EVERY_3RD = Schedule(ranges=(3, 3, 3))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("uses", [("add", "unused"), ("unused", "unused")], ids=str)
def test_calls_of_one_attention_may_use_different_outputs(lowering: str, uses: tuple[str, str]) -> None:
    """The unused output of one call is the other's after a reuse, and every call counts."""
    spec = Spec((AttentionSpec(returns="pair"),), ((Site(uses=("add", "gate")), Site(uses=uses)),))
    for schedule in (EVERY_2ND, EVERY_3RD):
        check_compiled(spec, schedule, lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_calls_of_one_attention_may_drop_a_slice_of_it(lowering: str) -> None:
    """Dynamo leaves a slice that nobody uses out of the graph, and the calls still are calls of one attention."""
    spec = Spec((AttentionSpec(kind="joint"),), ((Site(uses=("add", "add")), Site(uses=("add", "unused"))),))
    regions = check_compiled(spec, EVERY_2ND, lowering).report().regions
    assert regions
    assert all(region.left_alone is None for region in regions)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_break_in_an_attention_that_closes_over_itself(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `self` is a free variable, Dynamo's continuation does not take it as its first argument."""
    import random_models

    class Closing(random_models.Attention):
        def _core(self, *qkv: torch.Tensor) -> torch.Tensor:
            return super()._core(*qkv)

        def forward(self, hidden: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            query, key, value = (self._heads(each(hidden)) for each in (self.to_q, self.to_k, self.to_v))
            torch._dynamo.graph_break()
            return self.to_out(self._core(query, key, value).transpose(1, 2).flatten(2))

    monkeypatch.setattr(random_models, "Attention", Closing)
    assert check_compiled(Spec(), EVERY_2ND, lowering).report().reused
