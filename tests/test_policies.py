"""Policies: where, when and how, against a plain eager reference; forecasts in every way that a model can run."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Part, distance, equal
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

import pab_fx
from pab_fx import (
    AfterTimesteps,
    Attentions,
    Every,
    FeedForwards,
    How,
    Last,
    PABConfig,
    Policy,
    Progress,
    Rule,
    Scalars,
    SkipRange,
    Step,
    Taylor,
)
from pab_fx.policy.when import reused_calls

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = tuple(float(t) for t in range(1000, 0, -50))
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])
orders = pytest.mark.parametrize("order", [1, 2])


# ------------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


class Block(nn.Module):
    def __init__(self, updates: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.updates = nn.LayerNorm(8), Attention(), updates
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm(x))
        if self.updates:
            y += x
        else:
            y = x + y
        return y + self.ff(y)


class Model(nn.Module):
    def __init__(self, updates: bool, blocks: int, shared: bool) -> None:
        super().__init__()
        first = Block(updates)
        self.blocks = nn.ModuleList([first, *(first if shared else Block(updates) for _ in range(1, blocks))])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states * (1 + timestep / 1000)
        for block in self.blocks:
            x = block(x)
        return x


def build(updates: bool = False, blocks: int = 2, shared: bool = False) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(updates, blocks, shared).eval().requires_grad_(False)


def inputs(step: int, t: float, length: int = 5) -> tuple[Tensor, Tensor]:
    """Latents that go a smooth way, as those of a sampler do, and that no norm makes alike."""
    start, end = torch.randn(2, 1, length, 8, generator=torch.Generator().manual_seed(length))
    return start * math.cos(step / 30) + 0.5 * end * math.sin(step / 20), torch.tensor([t])


def trajectory(model: Any, timesteps: Sequence[float] = TIMESTEPS, length: int = 5) -> list[Tensor]:
    return [model(*inputs(step, t, length)).clone() for step, t in enumerate(timesteps)]


class Reference:
    """A policy for every attention (or feed-forward) of a model, in plain eager Python."""

    def __init__(self, model: Model, policy: Policy, part: str = "attn", of: float = math.inf) -> None:
        self.model, self._calls = copy.deepcopy(model), Counter[Any]()
        # each call of a module in a step is a part
        self._parts: defaultdict[Any, Part] = defaultdict(lambda: Part(policy, of))
        for module in {getattr(block, part) for block in self.model.blocks}:
            self._wrap(module)

    @property
    def reused(self) -> int:
        return sum(part.reused for part in self._parts.values())

    def _wrap(self, module: Any) -> None:
        compute = module.forward

        def called(x: Tensor) -> Tensor:
            part = self._parts[module, self._calls[module]]
            self._calls[module] += 1
            return part(self._n, self._t, (x,), lambda: (compute(x),))[0]

        module.forward = called

    def trajectory(self, timesteps: Sequence[float] = TIMESTEPS, length: int = 5) -> list[Tensor]:
        for part in self._parts.values():
            part.reset()
        found = []
        for self._n, self._t in enumerate(timesteps):
            self._calls.clear()
            found.append(self.model(*inputs(self._n, self._t, length)).clone())
        return found


# ------------------------------------------------------------------------------------- rules and hows

RULES = [SkipRange(3, 100, 800), Every(4, warmup=2), AfterTimesteps(((900.0, 2), (700.0, 3)))]
HOWS = [Last(), Taylor(1), Taylor(2), Taylor(2, torch.bfloat16)]


@pytest.mark.parametrize(
    ("rule", "how", "lowering"),
    [
        pytest.param(rule, how, ("specialize", "cond")[(i + j) % 2], id=f"{rule}-{how}")
        for i, rule in enumerate(RULES)
        for j, how in enumerate(HOWS)
    ],
)
def test_a_policy_does_what_its_three_functions_say(rule: Rule, how: How, lowering: str) -> None:
    model, policy = build(), Policy(Attentions(), rule, how)
    reference = Reference(model, policy)
    expected, plain = reference.trajectory(), trajectory(model)
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering) as pab:
        assert equal(trajectory(model), expected)
        assert pab.report().reused == reference.reused > 0
    assert not equal(expected, plain)


@lowerings
@pytest.mark.parametrize("how", [Last(), Taylor(1)], ids=str)
def test_each_call_of_a_module_in_a_step_is_a_part_with_a_cache_of_its_own(how: How, lowering: str) -> None:
    model, policy = build(shared=True), Policy(Attentions(), Every(3), how)
    reference = Reference(model, policy)
    expected, plain = reference.trajectory(), trajectory(model)
    assert equal(trajectory(pab_fx.rewrite(fx.symbolic_trace(model), policy)), expected)
    with pab_fx.enable(model, policy, inner="eager", lowering=lowering) as pab:
        assert equal(trajectory(model), expected)
        report = pab.report()
    assert report.reused == reference.reused == 2 * 12  # of 20 steps 8 compute
    assert report.schedule.strips[0].steps.startswith("CCRRCRR")
    assert report.roles[0].full_bytes == sum(region.cache_bytes for region in report.regions)
    assert not equal(expected, plain)


def test_a_forecast_is_nearer_than_what_was_kept_and_its_order_counts() -> None:
    model = build()
    plain = trajectory(model)
    errors = []
    for order in range(3):
        with pab_fx.enable(model, Policy(Attentions(), Every(3), Taylor(order)), inner="eager") as pab:
            errors.append(distance(trajectory(model), plain))
            assert pab.report().reused == 2 * 12  # 8 of 20 steps compute
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


@dataclass(frozen=True)
class LastSteps(Rule):
    """A rule of a user's own: reuse late, and never twice in a row."""

    below: float

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        return (step.t < self.below) & (progress.age < 2)


@dataclass(frozen=True)
class Damped(How):
    """A how of a user's own, that reads its input: the residual, less of it with each step."""

    by: float

    def slots(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(outputs)

    def update(self, slots: Any, inputs: Any, outputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (outputs[0] - inputs[0],)

    def read(self, slots: Any, inputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (inputs[0] + slots[0] * self.by**scalars.distance,)


@lowerings
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_rule_and_a_how_of_the_users_own_work(lowering: str, inner: str) -> None:
    model, policy = build(blocks=1), Policy(Attentions(), LastSteps(600), Damped(0.9))
    reference = Reference(model, policy)
    expected = reference.trajectory()
    with pab_fx.enable(model, policy, inner=inner, lowering=lowering) as pab:
        # Inductor fuses, so it rounds otherwise
        assert distance(trajectory(model), expected) <= (0 if inner == "eager" else 1e-5)
        assert pab.report().reused == reference.reused > 0
        assert "LastSteps(below=600)" in str(pab.report())
    assert distance(expected, trajectory(model)) > 1e-3


@dataclass(frozen=True)
class Turning(How):
    """A how whose slots change places in each step that reuses; one is the output, the other what was read before."""

    def slots(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (outputs[0], outputs[0])

    def update(self, slots: Any, inputs: Any, outputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (torch.where(scalars.filled > 0, slots[1], 0.5 * outputs[0]), outputs[0])

    def read(self, slots: Any, inputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (slots[0],)

    def carry(self, slots: Any, inputs: Any, outputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (slots[1], slots[0])


@dataclass(frozen=True)
class Sinking(Last):
    """A how of which each step that reuses leaves less."""

    by: float = 0.9

    def read(self, slots: Any, inputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (self.by * slots[0],)

    def carry(self, slots: Any, inputs: Any, outputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (outputs[0],)


@lowerings
@pytest.mark.parametrize("how", [Turning(), Sinking()], ids=str)
def test_a_step_that_reuses_may_change_what_is_kept(how: How, lowering: str, inner: Any) -> None:
    model, policy = build(updates=True), Policy(Attentions(), Every(4, warmup=2), how)
    reference = Reference(model, policy)
    expected = reference.trajectory()
    with pab_fx.enable(model, policy, inner=inner, lowering=lowering) as pab:
        for _ in range(2):
            assert equal(trajectory(model), expected)
        assert pab.report().reused == 2 * reference.reused > 0


@pytest.mark.parametrize("how", [Turning(), Sinking()], ids=str)
def test_a_program_changes_what_is_kept_in_steps_that_reuse(how: How) -> None:
    model, policy = build(), Policy(Attentions(), SkipRange(4, 100, 900), how)
    expected = Reference(model, policy).trajectory()
    x, t = inputs(0, TIMESTEPS[0])
    rewritten = pab_fx.rewrite(fx.symbolic_trace(model), policy)
    computing, reusing = (pab_fx.specialize(rewritten, reuse=reuse) for reuse in ((), ("spatial",)))
    program = pab_fx.export(model, {"hidden_states": x, "timestep": t}, policy, timesteps=TIMESTEPS).module()
    for step, t_now in enumerate(TIMESTEPS):
        x, t = inputs(step, t_now)
        assert torch.equal(program(hidden_states=x, timestep=t), expected[step])
        reuses = reused_calls(SkipRange(4, 100, 900), TIMESTEPS)[step]
        assert torch.equal((reusing if reuses else computing)(x, t), expected[step])
    assert equal(trajectory(rewritten), expected)


class Weighed(Last):
    """A how that asks for a weight in each step that reuses."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __hash__(self) -> int:
        return id(self)

    def weigh(self, module: Any) -> float:
        self.asked.append(module)
        return 0.01 * len(self.asked)

    def read(self, slots: Any, inputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        return (slots[0] * scalars.weight,)


@lowerings
def test_a_weight_is_asked_for_in_steps_that_reuse_and_compiles_nothing_anew(lowering: str, inner: Any) -> None:
    model, how = build(blocks=1), Weighed()
    expected = Reference(model, Policy(Attentions(), Every(3), Weighed())).trajectory()
    with pab_fx.enable(model, Policy(Attentions(), Every(3), how), inner=inner, lowering=lowering) as pab:
        found = trajectory(model)
        report = pab.report()
    assert [module for module in how.asked if module is not model.blocks[0].attn] == []
    assert len(how.asked) == report.reused == 12
    assert report.graphs == (2 if lowering == "specialize" else 1)
    weights = [0.01 * (i + 1) for i in range(12)]
    assert len(set(weights)) == 12
    assert distance(found, expected) > 0  # the reference asks in steps that compute too


def test_a_graph_that_runs_by_itself_has_nobody_to_ask_for_a_weight() -> None:
    with pytest.raises(ValueError, match=r"scalars\.weight.*pab_fx\.enable"):
        pab_fx.rewrite(fx.symbolic_trace(build()), Policy(Attentions(), Every(3), Weighed()))


def test_a_rule_of_the_users_own_decides_in_a_rewritten_graph() -> None:
    model, policy = build(), Policy(Attentions(), LastSteps(600), Taylor(1))
    reference = Reference(model, policy)
    assert equal(trajectory(pab_fx.rewrite(fx.symbolic_trace(model), policy)), reference.trajectory())
    assert reference.reused > 0


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 6),
    warmup=st.integers(1, 5),
    cooldown=st.integers(0, 4),
    steps=st.integers(1, 30),
)
def test_every_nth_step_computes_between_warmup_and_cooldown(n: int, warmup: int, cooldown: int, steps: int) -> None:
    plan = reused_calls(Every(n, warmup, cooldown), range(steps, 0, -1))
    computes = [i < warmup or (i - warmup) % n == 0 or i >= steps - cooldown for i in range(steps)]
    assert list(plan) == [not compute for compute in computes]


def test_a_cooldown_counts_from_the_end_that_timesteps_tell() -> None:
    model, policy = build(), Policy(Attentions(), Every(3, cooldown=5))
    reference = Reference(model, policy, of=len(TIMESTEPS))
    with pab_fx.enable(model, policy, inner="eager", timesteps=TIMESTEPS):
        assert equal(trajectory(model), reference.trajectory())
    with (
        pab_fx.enable(model, policy, inner="eager"),
        pytest.warns(UserWarning, match="how many steps the generation has is not known"),
    ):
        trajectory(model)


# ------------------------------------------------------------------------------------- forecasts, everywhere


def forecast(order: int, **options: Any) -> PABConfig:
    return PABConfig(spatial_attention_block_skip_range=3, forecast_order=order, **options)


def reference_of(config: PABConfig, model: Model) -> Reference:
    return Reference(model, config.policies()[0])


@pytest.mark.parametrize(
    ("order", "lowering", "regional"),
    [(1, "specialize", True), (1, "cond", False), (2, "specialize", False), (2, "cond", True)],
)
def test_forecasts_with_inductor(order: int, lowering: str, regional: bool) -> None:
    model, config = build(blocks=2 if regional else 1), forecast(order)
    expected = reference_of(config, model).trajectory()
    plain = trajectory(model)
    with pab_fx.enable(model, config, lowering=lowering, regional=regional) as pab:
        assert distance(trajectory(model), expected) < 1e-5  # Inductor fuses, so it rounds otherwise
        assert pab.report().reused > 0
    assert distance(expected, plain) > 1e-4


@lowerings
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_forecasts_with_dynamic_shapes(lowering: str, inner: str) -> None:
    model, plain, config = build(blocks=1), build(blocks=1), forecast(1)
    reference = reference_of(config, model)
    with pab_fx.enable(model, config, inner=inner, lowering=lowering, dynamic=True) as pab:
        for length in (5, 7, 9):
            expected = reference.trajectory(length=length)
            assert distance(trajectory(model, length=length), expected) < 1e-5
            assert distance(expected, trajectory(plain, length=length)) > 1e-4
        assert len(pab.backend.captured) == 1


@lowerings
def test_forecasts_of_contexts_and_sessions_do_not_mix(lowering: str) -> None:
    model, config = build(), forecast(2)
    expected = [reference_of(config, model).trajectory(length=length) for length in (5, 5, 5)]
    with pab_fx.enable(model, config, inner="eager", lowering=lowering) as pab:
        sessions = [pab.session() for _ in range(3)]
        found: list[list[Tensor]] = [[], [], []]
        for step, t in enumerate(TIMESTEPS):
            for i, session in enumerate(sessions):
                with session, pab_fx.cache_context(("cond", "uncond", None)[i]):
                    found[i].append(model(*inputs(step, t)).clone())
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@lowerings
def test_a_generation_that_was_cut_off_leaves_no_difference_behind(lowering: str) -> None:
    model, config = build(), forecast(2)
    expected = reference_of(config, model).trajectory()
    with pab_fx.enable(model, config, inner="eager", lowering=lowering):
        trajectory(model, TIMESTEPS[:9])
        assert equal(trajectory(model), expected)


@lowerings
@pytest.mark.parametrize("options", [{"cache_dtype": "bfloat16"}, {"cache_dtype": "int8"}, {"cache_device": "cpu"}])
def test_forecasts_of_smaller_and_offloaded_caches_stay_near(options: dict[str, Any], lowering: str) -> None:
    model, config = build(), forecast(1)
    expected, plain = reference_of(config, model).trajectory(), trajectory(model)
    with pab_fx.enable(model, config, inner="eager", lowering=lowering, **options) as pab:
        found = trajectory(model)
        assert pab.report().reused > 0
    # eight bits keep 1 part in 254 of the largest element of a token, bfloat16 1 in 256
    assert distance(found, expected) <= (0 if "cache_device" in options else 0.05)
    assert not equal(found, plain)


def test_each_order_keeps_one_more_tensor_in_a_dtype_of_choice() -> None:
    sizes = []
    for config in (forecast(0), forecast(1), forecast(2), forecast(2, forecast_dtype="bfloat16")):
        model = build()
        with pab_fx.enable(model, config, inner="eager") as pab:
            trajectory(model)
            (role,) = pab.report().roles
            sizes.append(role.full_bytes)
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0], 2 * sizes[0]]


def test_distances_count_where_a_window_begins_late_and_steps_are_out_of_turn() -> None:
    """The steps between computed ones are 1, 1, ..., then 3, and 2 where the window ends."""
    model, policy = build(), Policy(Attentions(), SkipRange(3, 240, 560), Taylor(2))
    reference = Reference(model, policy)
    timesteps = (990.0, 800.0, 560.0, 555.0, 400.0, 390.0, 300.0, 250.0, 240.0, 30.0)
    expected = reference.trajectory(timesteps)
    assert reference.reused > 0
    with pab_fx.enable(model, policy, inner="eager"):
        assert equal(trajectory(model, timesteps), expected)


def test_what_is_not_filled_yet_is_never_read() -> None:
    """The first step that reuses knows one output: it reads at order 0."""
    model = build()
    found = []
    for order in (0, 2):
        with pab_fx.enable(model, Policy(Attentions(), Every(2), Taylor(order)), inner="eager"):
            found.append(trajectory(model))
    assert equal(found[0][:2], found[1][:2])
    assert all(bool(output.isfinite().all()) for output in found[1])
    assert not equal(found[0], found[1])


@orders
def test_a_rewritten_and_an_exported_program_forecast_by_themselves(order: int) -> None:
    model, config = build(), forecast(order)
    expected = reference_of(config, model).trajectory()
    x, t = inputs(0, TIMESTEPS[0])
    kwargs = {"hidden_states": x, "timestep": t}
    rewritten = pab_fx.rewrite(torch.export.export(model, (), kwargs).module(), config)
    program = pab_fx.export(model, kwargs, config, timesteps=TIMESTEPS).module()
    two = pab_fx.export(model, kwargs, config, timesteps=TIMESTEPS, contexts=("cond", "uncond")).module()
    for _ in range(2):
        for step, t_now in enumerate(TIMESTEPS):
            x, t = inputs(step, t_now)
            for run in (rewritten, program):
                assert torch.equal(run(hidden_states=x, timestep=t), expected[step])
            for context in (1, 0):
                found = two(hidden_states=x, timestep=t, pab_context=torch.tensor(context))
                assert torch.equal(found, expected[step])


@orders
@pytest.mark.parametrize("traced", ["symbolically", "with dynamic sizes"])
def test_a_rewritten_program_forecasts_at_one_size_after_another(traced: str, order: int) -> None:
    """What is in a slot in the first step of a generation may be of another size."""
    model, config = build(), forecast(order)
    if traced == "symbolically":
        rewritten: Any = pab_fx.rewrite(fx.symbolic_trace(model), config)
    else:
        x, t = inputs(0, TIMESTEPS[0])
        length = {"hidden_states": {1: torch.export.Dim("length", min=2, max=64)}, "timestep": None}
        program = torch.export.export(model, (), {"hidden_states": x, "timestep": t}, dynamic_shapes=length)
        rewritten = pab_fx.rewrite(program.module(), config)
    reference = reference_of(config, model)
    for length in (5, 9, 2, 9):
        found = [rewritten(hidden_states=x, timestep=t) for x, t in map(inputs, range(20), TIMESTEPS, [length] * 20)]
        assert equal(found, reference.trajectory(length=length))
    if traced == "symbolically":  # a batch of one fits one of two, by broadcasting
        for batch in (2, 1):
            found = [rewritten(torch.cat([x] * batch), t) for x, t in (inputs(n, t) for n, t in enumerate(TIMESTEPS))]
            assert all(torch.allclose(a, b) for a, b in zip(found, reference.trajectory(), strict=True))
            assert all(len(each) == batch for each in found)


@pytest.mark.slow
@orders
def test_a_package_of_aotinductor_forecasts_by_itself(order: int, tmp_path: Path) -> None:
    model, config = build(), forecast(order)
    expected = reference_of(config, model).trajectory()
    x, t = inputs(0, TIMESTEPS[0])
    program = pab_fx.export(model, {"hidden_states": x, "timestep": t}, config, timesteps=TIMESTEPS)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for _ in range(2):
        for step, t_now in enumerate(TIMESTEPS):
            x, t = inputs(step, t_now)
            found = package(hidden_states=x, timestep=t)
            torch.testing.assert_close(found, expected[step], atol=1e-5, rtol=1e-5)  # rounds otherwise than eager


@dataclass(frozen=True)
class Wrong(How):
    """Is wrong in one way."""

    way: str

    def slots(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(outputs)

    def update(self, slots: Any, inputs: Any, outputs: Sequence[Tensor], scalars: Scalars) -> tuple[Tensor, ...]:
        ways: dict[str, Any] = {
            "updates its output": lambda: (outputs[0].mul_(2),),
            "keeps nothing": lambda: (),
            "keeps halves": lambda: (outputs[0].half(),),
        }
        return ways.get(self.way, lambda: tuple(outputs))()  # type: ignore[no-any-return]

    def read(self, slots: Sequence[Tensor], inputs: Any, scalars: Scalars) -> tuple[Tensor, ...]:
        ways: dict[str, Any] = {
            "updates its slot": lambda: (slots[0].mul_(2),),
            "reads a mean": lambda: (slots[0].mean(-1, keepdim=True),),
            "reads halves": lambda: (slots[0].half(),),
            "reads None": lambda: None,
            "branches": lambda: tuple(slots) if slots[0].sum() > 0 else (slots[0] * 2,),
            "takes a number": lambda: (slots[0] * slots[0].sum().item(),),
        }
        return ways.get(self.way, lambda: tuple(slots))()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("updates its output", "its update updates a tensor in place"),
        ("keeps nothing", "its update yields 0 tensors in place of 1"),
        ("keeps halves", "its update yields torch.float16"),
        ("updates its slot", "its read updates a tensor in place"),
        ("reads a mean", r"its read yields torch.float32 of shape \[1, 5, 1\] in place of"),
        ("reads halves", "its read yields torch.float16"),
        ("reads None", "its read cannot be traced"),
        ("branches", "its read cannot be traced"),
        ("takes a number", "its read cannot be traced"),
    ],
)
def test_a_how_that_is_wrong_is_named(way: str, message: str) -> None:
    model = build()
    with (
        pab_fx.enable(model, Policy(Attentions(), Every(2), Wrong(way)), inner="eager"),
        pytest.raises(Exception, match=rf"Wrong\(way='{way}'\): {message}"),
    ):
        trajectory(model)


def test_a_rule_and_a_how_that_lack_a_function_are_refused_when_they_are_made() -> None:
    for incomplete in (Rule, How):
        with pytest.raises(TypeError, match=f"abstract class {incomplete.__name__}"):
            incomplete()  # type: ignore[abstract]


def test_a_rule_that_is_wrong_is_named() -> None:
    @dataclass(frozen=True)
    class Says(Rule):
        what: Any

        def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
            return self.what if self.what != "branches" else (step.n > 1 and step.t < 500)

    model = build()
    with pytest.raises(ValueError, match=r"Says\(what='yes'\).*decide must return .* True or False, got 'yes'"):
        Policy(Attentions(), Says("yes"))
    with pytest.raises(TypeError, match=r"decide cannot be traced into a graph.*by & and"):
        pab_fx.rewrite(fx.symbolic_trace(model), Policy(Attentions(), Says("branches")))


# ------------------------------------------------------------------------------------- updates in place


@lowerings
def test_an_output_that_the_model_updates_is_kept_as_the_part_left_it(lowering: str) -> None:
    """`y = attn(x); y += x`: with policies and a `PABConfig`; diffusers' hooks keep the updated tensor."""
    model, config = build(updates=True), PABConfig(spatial_attention_block_skip_range=3)
    reference = reference_of(config, model)
    expected = reference.trajectory()
    with pab_fx.enable(model, config, inner="eager", lowering=lowering) as pab:
        assert equal(trajectory(model), expected)
        assert pab.report().reused == reference.reused > 0
        assert {region.note for region in pab.report().regions if not region.left_alone} == {
            "its output is updated in place afterwards; what is kept is a copy from before"
        }
    rewritten = pab_fx.rewrite(fx.symbolic_trace(model), config)
    assert equal(trajectory(rewritten), expected)
    assert not equal(expected, trajectory(model))


# ------------------------------------------------------------------------------------- the door, files


def test_the_first_policy_that_is_for_a_part_governs_it() -> None:
    model = build()
    policies = [Policy(Attentions(names=("blocks.1.",)), None), Policy(Attentions(), Every(2))]
    with pab_fx.enable(model, policies, inner="eager") as pab:
        trajectory(model)
        left = {region.name: region.left_alone for region in pab.report().regions}
    assert left["blocks.0.attn"] is None
    assert left["blocks.1.attn"] is not None


def test_feed_forwards_go_by_any_rule_and_how() -> None:
    model, policy = build(), Policy(FeedForwards(), Every(2), Taylor(1))
    reference = Reference(model, policy, part="ff")
    with pab_fx.enable(model, policy, inner="eager") as pab:
        assert equal(trajectory(model), reference.trajectory())
        assert [role.role for role in pab.report().roles] == ["mlp"]


def test_policies_are_options_of_the_backend_by_name() -> None:
    policy = Policy(Attentions(), Every(3), Taylor(1))
    model = build()
    expected = Reference(model, policy).trajectory()
    compiled = torch.compile(model, backend="pab", options={"config": policy, "inner": "eager"})
    assert equal(trajectory(compiled), expected)
    assert pab_fx.report(compiled).reused > 0
    assert pab_fx.report(model) == pab_fx.report(compiled)


POLICIES = [
    Policy(Attentions(("spatial", "temporal"), names=("blocks",)), SkipRange(2, 100, 850), Last()),
    Policy(Attentions("cross", identifiers=("attn2",)), None),
    Policy(FeedForwards((0, 3)), AfterTimesteps(((720.0, 2),)), Taylor(2, torch.bfloat16)),
    Policy(FeedForwards(), Every(3, warmup=2, cooldown=1), Taylor(1)),
]


def test_policies_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    pab_fx.save_policies(POLICIES, path)
    assert pab_fx.load_policies(path) == tuple(POLICIES)
    assert json.loads(path.read_text())[3]["how"] == {"kind": "Taylor"}


@pytest.mark.parametrize(
    "text",
    ["", "{}", '[{"where": 1, "when": null}]', '[{"where": {"kind": "Planet"}, "when": null}]', '[{"when": null}]'],
)
def test_a_file_without_policies_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        pab_fx.load_policies(path)


def test_a_rule_of_the_users_own_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LastSteps.*no JSON"):
        pab_fx.save_policies([Policy(Attentions(), LastSteps(1.0))], tmp_path / "own.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("spatial", Every(2)), "where must be"),
        (lambda: Policy(Attentions, Every(2)), "where must be"),
        (lambda: Policy(Attentions(), 2), "when must be"),
        (lambda: Policy(Attentions(), Every(2), 1), "how must be"),
        (lambda: Attentions(()), "roles must be of spatial, temporal, cross, or None"),
        (lambda: Attentions(3), "roles must be of spatial"),
        (lambda: SkipRange(2, 800, 100), "reversed"),
        (lambda: SkipRange(2, "a"), "must be two numbers"),
        (lambda: AfterTimesteps(700), "pairs of a timestep and a count"),
        (lambda: pab_fx.save_policies([PABConfig()], "none.json"), "takes policies"),
        (lambda: Attentions("spacial"), "unknown role 'spacial'"),
        (lambda: Attentions(identifiers=("a",)), "give that role"),
        (lambda: Every(0), "n must be an integer >= 1"),
        (lambda: Taylor(-1), "order must be an integer from 0 to 34"),
        (lambda: Taylor(1, torch.int8), "floating-point dtype"),
        (lambda: PABConfig(forecast_order=-1), "forecast_order"),
        (lambda: PABConfig(forecast_dtype="int3"), "forecast_dtype"),
    ],
)
def test_a_bad_policy_is_refused_before_anything_runs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------- sweeps


def test_a_sweep_over_configs_compiles_each_set_of_reusing_parts_once() -> None:
    model = build()
    with pab_fx.enable(model, Policy(Attentions(), Every(2), Taylor(1)), inner="eager") as pab:
        for n in (2, 3, 4, 5, 2):
            policy = Policy(Attentions(), Every(n), Taylor(1))
            pab.set_config(policy)
            assert equal(trajectory(model), Reference(model, policy).trajectory())
        assert pab.report().graphs == 2
        with pytest.raises(ValueError, match=r"blocks\.0\.attn.*captured anew"):
            pab.set_config(Policy(Attentions(), Every(2), Taylor(2)))


def test_a_config_that_has_to_be_captured_anew_is_refused_and_one_that_matches_nothing_is_told() -> None:
    model = build()
    with pab_fx.enable(model, Policy(Attentions(), Every(2)), inner="eager") as pab:
        trajectory(model)
        for policy in (Policy(FeedForwards(), Every(2)), Policy(Attentions(), Every(2), Taylor(1))):
            with pytest.raises(ValueError, match=r"captured anew, by disable\(\) and enable\(\)"):
                pab.set_config(policy)
        with pytest.warns(UserWarning, match="matches none of the attentions found"):
            pab.set_config(Policy(Attentions(names=("elsewhere",)), Every(2)))


def test_timesteps_that_rise_all_through_a_generation_are_warned_of_and_counted() -> None:
    model = build()
    with pab_fx.enable(model, Policy(Attentions(), Every(2)), inner="eager") as pab:
        with pytest.warns(UserWarning, match="rises to 150 in the middle of a generation"):
            trajectory(model, tuple(reversed(TIMESTEPS)))
        assert pab.report().restarts == len(TIMESTEPS) - 1
        assert pab.report().reused == 0
