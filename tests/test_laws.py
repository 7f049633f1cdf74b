"""Laws of the rewrite: what holds for every graph, config and trajectory, on random models and models of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from diffusers import PyramidAttentionBroadcastConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from pab_fx import Last, PABBackend, PABConfig, rewrite, specialize
from pab_fx.graph.copies import copy_of
from pab_fx.passes.conditions import insert_conditions
from pab_fx.passes.form import conditionals, mark_of, set_slots_returned
from pab_fx.passes.order import Lowering, lowered
from pab_fx.policy.when import reused_calls
from pab_fx.select.tag import tag
from pab_fx.testing import (
    TRACERS,
    AttentionSpec,
    Clock,
    GraphSpec,
    Schedule,
    Site,
    TransformerSpec,
    assert_broadcasts_like,
    assert_graphs_equivalent,
    traced,
)
from pab_fx.testing.strategies import configs, graphs, schedules, transformers

LATTE, FLUX, WAN, COGVIDEOX = (
    "LatteTransformer3DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
)
OF_DIFFUSERS = [(LATTE, "export"), (FLUX, "dynamo"), (WAN, "dynamo"), (COGVIDEOX, "export")]
"""`symbolic_trace` takes none of them: they branch on their inputs."""

ALWAYS = PABConfig(**{f"{role}_attention_block_skip_range": 1 for role in ("spatial", "temporal", "cross")})
"""A schedule that computes in every step."""

EVERY = PABConfig(
    spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=3, cross_attention_block_skip_range=4
)

search = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
of_diffusers = pytest.mark.parametrize(("name", "tracer"), OF_DIFFUSERS)


pytestmark = pytest.mark.usefixtures("no_gradients")


@cache
def graph_of(name: str, tracer: str) -> fx.GraphModule:
    """The graph of a model of the zoo."""
    entry = zoo.BY_NAME[name]
    return traced(entry.build(), tracer, **entry.inputs(0), **entry.timestep(500.0), return_dict=False)


def graph_from(spec: TransformerSpec, tracer: str) -> fx.GraphModule:
    with spec.mode():  # Dynamo calls what it has traced
        return traced(spec.build(), tracer, spec.inputs(500.0, 0))


def clocked(config: PABConfig, tracer: str) -> PABConfig:
    """A graph of Dynamo may not have the timestep among its inputs."""
    fields = {**vars(config), "current_timestep_callback": Clock(500.0)}
    return PABConfig(**fields) if tracer == "dynamo" else config


drawn = [
    pytest.param("symbolic_trace", transformers(traceable=True), 15, id="symbolic_trace"),
    pytest.param("export", transformers(exportable=True), 3, id="export"),
    pytest.param("dynamo", transformers(), 3, id="dynamo"),
]
from_every_tracer = pytest.mark.parametrize(("tracer", "specs", "examples"), drawn)


# ----------------------------------------------------------------- rewriting is idempotent, or it is refused


def check_idempotent(gm: fx.GraphModule, config: PABConfig) -> None:
    """What a rewrite has changed is refused, whatever has been decided of it; what it has not stays as it is."""
    rewritten = rewrite(gm, config)
    if not conditionals(rewritten):
        assert_graphs_equivalent(rewrite(rewritten, config), rewritten)
        return
    names = sorted({conditional.name for conditional in conditionals(rewritten).values()})
    partly = specialize(rewritten, reuse=names[:1], compute=())
    decided = [specialize(rewritten), specialize(rewritten, reuse=names), partly]
    for each in (rewritten, *decided):
        with pytest.raises(ValueError, match="already broadcasts"):
            rewrite(each, config)


@from_every_tracer
def test_rewriting_twice_is_rewriting_once_or_refused(tracer: str, specs: Any, examples: int) -> None:
    @settings(search, max_examples=examples)
    @given(specs, configs())
    def check(spec: TransformerSpec, config: PABConfig) -> None:
        check_idempotent(graph_from(spec, tracer), clocked(config, tracer))

    check()


@of_diffusers
def test_rewriting_a_model_of_diffusers_twice_is_refused(name: str, tracer: str) -> None:
    check_idempotent(graph_of(name, tracer), clocked(EVERY, tracer))


# --------------------------------------------- a schedule that always computes lowers to the original graph


def keeping_updates(config: PABConfig) -> list[Any]:
    """The policies of a config, for graphs of which nothing is copied; and the config, for its callback."""
    return [*(replace(policy, how=Last(keeps_updates=True)) for policy in config.policies()), config]


def check_all_computing(gm: fx.GraphModule, config: PABConfig) -> None:
    """With every condition decided to compute there is the graph itself, and updates of what only the rewrite reads."""
    assert_graphs_equivalent(specialize(rewrite(gm, keeping_updates(config))), gm, private="^pab_")


def check_lowered(gm: fx.GraphModule, config: PABConfig) -> None:
    """What goes to the inner compiler is the graph itself, and returns what is to be kept behind what that returns."""
    rewritten = copy_of(gm)
    insert_conditions(rewritten, tag(rewritten, keeping_updates(config)[:-1]))
    count = len(conditionals(rewritten))
    found = lowered(rewritten, (False,) * count, Lowering()) if count else rewritten
    set_slots_returned(found, {})
    assert not any(map(mark_of, found.graph.find_nodes(op="placeholder")))
    assert_graphs_equivalent(found, gm)


@from_every_tracer
def test_a_schedule_that_always_computes_lowers_to_the_original_graph(tracer: str, specs: Any, examples: int) -> None:
    @settings(search, max_examples=examples)
    @given(specs)
    def check(spec: TransformerSpec) -> None:
        gm = graph_from(spec, tracer)
        check_all_computing(gm, clocked(ALWAYS, tracer))
        if tracer == "dynamo":
            check_lowered(gm, clocked(ALWAYS, tracer))

    check()


@of_diffusers
def test_a_schedule_that_always_computes_lowers_to_the_original_graph_of_diffusers(name: str, tracer: str) -> None:
    gm, config = graph_of(name, tracer), clocked(ALWAYS, tracer)
    assert conditionals(rewrite(gm, config))
    check_all_computing(gm, config)
    if tracer == "dynamo":
        check_lowered(gm, config)


def test_a_schedule_that_always_computes_reuses_nothing_and_keeps_nothing() -> None:
    spec = TransformerSpec()
    generations = Schedule().generations
    found = assert_broadcasts_like(
        spec.build(), ALWAYS, spec.build(), inputs=spec.inputs, generations=generations, reuses=False, changes=False
    )
    assert found.backend is not None
    (role,) = found.backend.report().roles
    assert (role.computed, role.reused, role.full_bytes > 0) == (sum(map(len, generations)), 0, False)


# ------------------------------------------- specialising every condition is specialising them one by one


def check_one_by_one(gm: fx.GraphModule, config: PABConfig, order: Sequence[int], reuse: Sequence[bool]) -> None:
    """Conditions are decided in an order, each to reuse or to compute, and at once."""
    rewritten = rewrite(gm, config)
    names = [conditional.label for conditional in conditionals(rewritten).values()]
    decisions = dict(zip(names, (reuse * len(names))[: len(names)], strict=True))
    at_once = specialize(rewritten, reuse=[name for name in names if decisions[name]])
    found = rewritten
    for name in sorted(names, key=lambda name: order[names.index(name) % len(order)]):
        if name not in {each.label for each in conditionals(found).values()}:
            continue  # a call that nobody reads any more, as a later call of its module computes
        found = specialize(found, **({"reuse": {name}, "compute": ()} if decisions[name] else {"compute": {name}}))
    assert_graphs_equivalent(found, at_once, dead_code=bool(names))  # no decision, no elimination of dead code
    assert not conditionals(found)


@from_every_tracer
def test_specialising_every_condition_is_specialising_them_one_by_one(tracer: str, specs: Any, examples: int) -> None:
    @settings(search, max_examples=examples)
    @given(specs, st.permutations(range(4)), st.lists(st.booleans(), min_size=1, max_size=4))
    def check(spec: TransformerSpec, order: list[int], reuse: list[bool]) -> None:
        check_one_by_one(graph_from(spec, tracer), clocked(EVERY, tracer), order, reuse)

    check()


@of_diffusers
def test_specialising_conditions_of_diffusers_models_one_by_one(name: str, tracer: str) -> None:
    """Some reuse, some compute; that all do either is drawn above."""
    check_one_by_one(graph_of(name, tracer), clocked(EVERY, tracer), [2, 0, 3, 1], [True, False, False])


# --------------------------------------------------------- cond and specialize agree on every trajectory


def check_trajectories(
    gm: fx.GraphModule,
    config: Any,
    inputs: Any,
    generations: Sequence[Sequence[float]],
    model: nn.Module | None = None,
) -> None:
    """A graph that decides by itself yields in each step what the graph does in which the schedule has decided."""
    conditional, other = rewrite(gm, config, model=model), rewrite(gm, config, model=model)
    found = list(conditionals(other).values())
    seed = 0
    for timesteps in generations:
        plans = {
            each.label: reused_calls(each.policy.when, timesteps, each.calls)[each.call :: each.calls] for each in found
        }
        for step, t in enumerate(timesteps):
            decided = specialize(other, reuse=[name for name, plan in plans.items() if plan[step]])
            for one, same in zip(conditional(*inputs(t, seed)), decided(*inputs(t, seed)), strict=True):
                assert torch.equal(one, same), f"step {step}, timestep {t}"
            seed += 1


@pytest.mark.parametrize(("tracer", "specs", "examples"), drawn[:2])
def test_decided_graphs_agree_with_one_that_decides_by_itself(tracer: str, specs: Any, examples: int) -> None:
    @settings(search, max_examples=examples)
    @given(specs, configs(), schedules(max_size=4))
    def check(spec: TransformerSpec, config: PABConfig, schedule: Schedule) -> None:
        check_trajectories(graph_from(spec, tracer), config, spec.inputs, schedule.generations)

    check()


def check_lowerings(spec: TransformerSpec, config: PABConfig, schedule: Schedule) -> None:
    backend = PABBackend(config, inner="eager", lowering="specialize")
    reference = torch.compile(spec.build(), backend=backend)
    assert_broadcasts_like(
        spec.build(),
        config,
        reference,
        inputs=spec.inputs,
        generations=schedule.generations,
        mode=spec.mode,
        lowering="cond",
        reuses=False,
        changes=False,
    )


@settings(search, max_examples=3)
@given(transformers(), configs(), schedules(max_size=4))
def test_both_lowerings_agree(spec: TransformerSpec, config: PABConfig, schedule: Schedule) -> None:
    """For models of diffusers `test_equality.py` compares both with the hooks."""
    check_lowerings(spec, config, schedule)


# --------------------------------------------------------- a graph without attention is never changed


@settings(search, max_examples=60)
@given(graphs(without=("matmul",)), configs())
def test_rewriting_never_changes_a_graph_without_attention(spec: GraphSpec, config: PABConfig) -> None:
    gm = spec.build()
    before = str(gm.graph)
    rewritten = rewrite(gm, config)
    assert_graphs_equivalent(rewritten, gm, dead_code=True)
    assert_graphs_equivalent(specialize(rewritten), gm)
    assert rewritten is not gm
    assert str(gm.graph) == before


@pytest.mark.parametrize("tracer", TRACERS)
def test_rewriting_never_changes_feed_forwards_without_attention(tracer: str) -> None:
    @settings(search, max_examples=3)
    @given(transformers(attention=False, traceable=tracer == "symbolic_trace"), configs())
    def check(spec: TransformerSpec, config: PABConfig) -> None:
        gm = graph_from(spec, tracer)
        assert_graphs_equivalent(rewrite(gm, clocked(config, tracer)), gm, dead_code=True)

    check()


@pytest.mark.parametrize(("name", "tracer"), OF_DIFFUSERS[1:])
def test_rewriting_never_changes_a_model_whose_attentions_are_left_alone(name: str, tracer: str) -> None:
    """Roles that the model has not; Latte has all."""
    gm = graph_of(name, tracer)
    role = "cross" if name in (FLUX, COGVIDEOX) else "temporal"
    config = PABConfig(**{f"{role}_attention_block_skip_range": 2})
    assert_graphs_equivalent(rewrite(gm, clocked(config, tracer)), gm, dead_code=True)


# ------------------------------------------------------------------------------------------------- more of it


@pytest.mark.slow
@pytest.mark.parametrize("tracer", TRACERS)
def test_the_laws_hold_for_many_models(tracer: str) -> None:
    specs = transformers(traceable=tracer == "symbolic_trace", exportable=tracer == "export")

    @settings(search, max_examples=150)
    @given(specs, configs(), schedules(), st.permutations(range(4)), st.lists(st.booleans(), min_size=1, max_size=4))
    def check(
        spec: TransformerSpec, config: PABConfig, schedule: Schedule, order: list[int], reuse: list[bool]
    ) -> None:
        gm, own = graph_from(spec, tracer), clocked(config, tracer)
        check_idempotent(gm, own)
        check_all_computing(gm, own)
        check_one_by_one(gm, own, order, reuse)
        if tracer == "dynamo":
            check_lowered(gm, own)
            check_lowerings(spec, config, schedule)
        else:
            check_trajectories(gm, config, spec.inputs, schedule.generations)

    check()


def test_what_one_call_reuses_is_not_overwritten_by_the_next_before_its_last_use() -> None:
    """Found by the search: the first call's output is read after the second one has computed and written the cache."""
    sites = Site(uses=("late",)), Site(prepare=("modulate",), uses=("add",))
    spec = TransformerSpec((AttentionSpec(),), (sites,))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(100, 1001)
    )
    gm, model = graph_from(spec, "symbolic_trace"), spec.build()
    assert {each.calls for each in conditionals(rewrite(gm, config, model=model)).values()} == {2}  # they share a cache
    check_trajectories(gm, config, spec.inputs, [(1000, 800, 700, 600, 500)], model)


def test_a_slice_of_a_shape_is_taken_again_in_the_branch_that_reads_it() -> None:
    """Found by the search: without recorded values, a part of an attention that it shares with others stays outside."""
    spec = TransformerSpec((AttentionSpec(math="baddbmm", returns="list", fused_qkv=True, context="no_grad"),))
    config = PABConfig(spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_range=(50, 1000))
    check_trajectories(graph_from(spec, "symbolic_trace"), config, spec.inputs, [(999.0, 499.5, 0.0)])


def test_the_inference_mode_of_an_attention_stays_where_all_is_computed() -> None:
    """Found by the search: nodes that enter and leave it went as dead code."""
    spec = TransformerSpec((AttentionSpec(context="inference"),))
    check_all_computing(graph_from(spec, "dynamo"), clocked(EVERY, "dynamo"))
