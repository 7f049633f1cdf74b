"""Random small transformers broadcast to the bit as diffusers' hooks do: compiled by Dynamo, and rewritten traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pab_fx import PABBackend
from pab_fx.testing import AttentionSpec, Broadcast, Clock, Schedule, Site, TransformerSpec, assert_broadcasts_like
from pab_fx.testing import transformers as models
from pab_fx.testing.strategies import schedules, transformers

LOWERINGS = ("specialize", "cond")
search = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def check_compiled(spec: TransformerSpec, schedule: Schedule, lowering: str, dynamic: bool | None = None) -> PABBackend:
    """As the hooks; what the schedule reuses, and whether that changes an output, is left to chance."""
    found = check(spec, schedule, schedule.config(Clock()), lowering=lowering, dynamic=dynamic, breaks=True)
    backend = found.backend
    assert backend is not None
    broken = [each for each in backend.report().regions if "breaks inside" in (each.left_alone or "")]
    assert not broken or any(attention.breaks for attention in spec.attentions)
    return backend


def check(spec: TransformerSpec, schedule: Schedule, config: Any, **options: Any) -> Broadcast:
    return assert_broadcasts_like(
        spec.build(),
        config,
        inputs=spec.inputs,
        generations=schedule.generations,
        mode=spec.mode,
        reuses=False,
        changes=False,
        **options,
    )


# ------------------------------------------------------------------------------------------ what is drawn


@settings(search, max_examples=12)
@given(transformers(), schedules(), st.sampled_from(LOWERINGS))
def test_compiled_models_equal_the_hooks(spec: TransformerSpec, schedule: Schedule, lowering: str) -> None:
    check_compiled(spec, schedule, lowering)


@settings(search, max_examples=4)
@given(transformers(breaks=True), schedules(), st.sampled_from(LOWERINGS))
def test_models_with_graph_breaks_equal_the_hooks(spec: TransformerSpec, schedule: Schedule, lowering: str) -> None:
    check_compiled(spec, schedule, lowering)


@settings(search, max_examples=30)
@given(transformers(traceable=True), schedules())
def test_rewritten_symbolic_traces_equal_the_hooks(spec: TransformerSpec, schedule: Schedule) -> None:
    """To rounding: this tracer records no strides, so a part of a tensor may be kept dense, and is then added up so."""
    check(spec, schedule, schedule.config(), tracer="symbolic_trace", tolerance=1e-6)


@settings(search, max_examples=10)
@given(transformers(exportable=True), schedules())
def test_rewritten_exports_equal_the_hooks(spec: TransformerSpec, schedule: Schedule) -> None:
    check(spec, schedule, schedule.config(), tracer="export")


@pytest.mark.slow
@settings(search, max_examples=400)
@given(transformers(breaks=True), schedules(), st.sampled_from(LOWERINGS), st.sampled_from([None, True]))
def test_many_compiled_models_equal_the_hooks(
    spec: TransformerSpec, schedule: Schedule, lowering: str, dynamic: bool | None
) -> None:
    check_compiled(spec, schedule, lowering, dynamic)


# --------------------------------------------------------------------------- what the search found, by hand

EVERY_2ND = Schedule(ranges=(2, 2, 2))
EVERY_3RD = Schedule(ranges=(3, 3, 3))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("uses", [("add", "unused"), ("unused", "unused")], ids=str)
def test_calls_of_one_attention_may_use_different_outputs(lowering: str, uses: tuple[str, str]) -> None:
    """The unused output of one call is the other's after a reuse, and every call counts."""
    spec = TransformerSpec((AttentionSpec(returns="pair"),), ((Site(uses=("add", "gate")), Site(uses=uses)),))
    for schedule in (EVERY_2ND, EVERY_3RD):
        check_compiled(spec, schedule, lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_calls_of_one_attention_may_drop_a_slice_of_it(lowering: str) -> None:
    """Dynamo leaves a slice that nobody uses out of the graph, and the calls still are calls of one attention."""
    spec = TransformerSpec((AttentionSpec(kind="joint"),), ((Site(uses=("add", "add")), Site(uses=("add", "unused"))),))
    regions = check_compiled(spec, EVERY_2ND, lowering).report().regions
    assert regions
    assert all(region.left_alone is None for region in regions)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_break_in_an_attention_that_closes_over_itself(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `self` is a free variable, Dynamo's continuation does not take it as its first argument."""

    class Closing(models.Attention):
        def _core(self, *qkv: torch.Tensor) -> torch.Tensor:
            return super()._core(*qkv)

        def forward(self, hidden: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            query, key, value = (self._heads(each(hidden)) for each in (self.to_q, self.to_k, self.to_v))
            torch._dynamo.graph_break()
            return self.to_out(self._core(query, key, value).transpose(1, 2).flatten(2))

    monkeypatch.setattr(models, "Attention", Closing)
    assert check_compiled(TransformerSpec(), EVERY_2ND, lowering).report().reused
