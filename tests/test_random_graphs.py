"""Random small transformers broadcast to the bit as diffusers' hooks do: compiled by Dynamo, and rewritten traces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

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

LOWERINGS = ("specialize", "cond")
search = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure takes minutes: add Phase.shrink to look into one
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Handing tensors of this size to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_compiled(spec: Spec, schedule: Schedule, lowering: str, dynamic: bool | None = None) -> PABBackend:
    """Compile the model, generate twice, and compare outputs and the number of reuses with the hooks'."""
    torch._dynamo.reset()
    clock, model = Clock(), build(spec)
    config = config_of(schedule, clock)
    oracle = Hooked(model, config)
    backend = PABBackend(config, inner="eager", lowering=lowering)
    compare(spec, schedule, torch.compile(model, backend=backend, dynamic=dynamic), oracle, clock)
    if all(region.left_alone is None for region in backend.report().regions):
        assert backend.report().reused == oracle.reused
    return backend


def compare(spec: Spec, schedule: Schedule, model: Callable[..., object], oracle: Hooked, clock: Clock) -> None:
    for seed, timesteps in enumerate(schedule.generations):
        expected = generate(oracle, spec, timesteps, clock, seed)
        oracle.reset()
        difference = first_difference(expected, generate(model, spec, timesteps, clock, seed))
        assert difference is None, f"generation {seed}, {difference}"


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
    compare(spec, schedule, rewrite(gm, reads_its_input, model=model), oracle, clock)


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
def test_a_break_in_an_attention_that_closes_over_itself(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `self` is a free variable, Dynamo's continuation does not take it as its first argument."""
    import random_models

    class Closing(random_models.Attention):
        def _core(self, *qkv: torch.Tensor) -> torch.Tensor:
            return super()._core(*qkv)

        def _attend(self, hidden: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            query, key, value = (self._heads(each(hidden)) for each in (self.to_q, self.to_k, self.to_v))
            torch._dynamo.graph_break()
            return self.to_out(self._core(query, key, value).transpose(1, 2).flatten(2))

    monkeypatch.setattr(random_models, "Attention", Closing)
    assert check_compiled(Spec(), EVERY_2ND, lowering).report().reused
