"""Rules that go by how far a tensor has changed, against a plain eager reference."""

from __future__ import annotations

import copy
import json
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import distance, equal
from test_blocks import (
    TIMESTEPS,
    Block,
    Denoiser,
    DiT,
    InPlaceDiT,
    JoinedMMDiT,
    MMDiT,
    build,
    inputs,
    lowerings,
    trajectory,
)
from torch import Tensor, nn

import pab_fx
from pab_fx import Blocks, Change, Every, Last, Model, ModulatedInput, Policy, Residual, Taylor
from pab_fx.policy.when import Progress, Step
from pab_fx.report.report import Report
from pab_fx.testing import replaying

pytestmark = pytest.mark.usefixtures("no_gradients")

FIRST = Change(Blocks(0, 1), threshold=0.1)
RULES = {
    "first block": FIRST,
    "added up": Change(Blocks(0, 1), threshold=0.15, accumulate=True),
    "at most 2 in a row": Change(Blocks(0, 1), threshold=0.3, max_skips=2, warmup=3, cooldown=2),
    "rescaled": Change(Blocks(0, 1), threshold=0.05, accumulate=True, rescale=(2.0, 0.5, 0.0)),
    "the sample": Change(Model(), threshold=0.1),
    "the sample, added up": Change(Model(), threshold=0.2, accumulate=True),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


class Reference:
    """A model whose blocks after the first run or are skipped, by the change of a signal; in plain eager Python."""

    def __init__(self, model: Denoiser, rule: Change) -> None:
        self.model, self.rule, self.reused = copy.deepcopy(model), rule, 0
        self.run, self.blocks = self.model.run, list(self.model.blocks)
        self.model.run = self.partly  # type: ignore[method-assign]
        self.n, self.age, self.change = 0, 1, 0.0
        self.before: Tensor | None = None

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.sample = hidden_states.clone()
        return self.model(hidden_states, timestep, text)

    def head(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        found = self.blocks[0](*streams, embedding)
        return found if isinstance(found, tuple) else (found,)

    def partly(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        after = self.head(streams, embedding)
        now = after[0] - streams[0] if isinstance(self.rule.of, Blocks) else self.sample
        reuse = self.reuses(now)
        if self.rule.accumulate or not reuse:
            self.before = now
        entering = self.model.identity(after)
        if reuse:
            self.reused += 1
            found = tuple(each + added for each, added in zip(entering, self.kept, strict=True))
        else:
            self.model.blocks = nn.ModuleList(self.blocks[isinstance(self.rule.of, (Blocks, Model)) :])
            found = self.run(after, embedding)
            self.kept = [leaves - enters for leaves, enters in zip(found, entering, strict=True)]
        self.n, self.age = self.n + 1, self.age + 1 if reuse else 1
        self.change = self.change if reuse else 0.0
        return found

    def reuses(self, now: Tensor) -> bool:
        rule = self.rule
        may = self.n >= rule.warmup and self.n < len(TIMESTEPS) - rule.cooldown
        if self.before is None or not may or (rule.max_skips is not None and self.age > rule.max_skips):
            return False
        change = float((now - self.before).abs().mean() / self.before.abs().mean())
        if rule.rescale:
            powers = range(len(rule.rescale) - 1, -1, -1)
            change = sum(c * change**power for c, power in zip(rule.rescale, powers, strict=True))
        self.change = change + (self.change if rule.accumulate else 0.0)
        return self.change <= rule.threshold


class ModulatedReference(Reference):
    """All blocks of a `DiT` run or are skipped, by what the first one's attention reads."""

    def head(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        (x,), block = streams, self.blocks[0]
        shift, scale, _ = block.modulation(embedding).unsqueeze(1).chunk(3, dim=-1)
        self.sample = block.norm(x) * (1 + scale) + shift
        return streams


def policy_of(rule: Change) -> Policy:
    return Policy(Blocks() if rule.of == ModulatedInput() else Blocks(1), rule, Residual())


def enabled(model: nn.Module, rule: Change = FIRST, **kwargs: Any) -> Any:
    return pab_fx.enable(model, policy_of(rule), **{"inner": "eager", "timesteps": TIMESTEPS, **kwargs})


@lowerings
@rules
@pytest.mark.parametrize("kind", [DiT, InPlaceDiT, MMDiT, JoinedMMDiT], ids=lambda kind: kind.__name__)
def test_steps_reuse_while_a_signal_changes_little(kind: type[Denoiser], rule: Change, lowering: str) -> None:
    model = build(kind)
    reference, plain = Reference(model, rule), trajectory(model)
    expected = trajectory(reference)
    assert 0 < reference.reused < len(TIMESTEPS) - 1
    with enabled(model, rule, lowering=lowering) as pab:
        found = trajectory(model)
        report = pab.report()
    assert report.reused == reference.reused
    assert equal(found, expected)
    assert distance(found, plain) > 1e-3


@lowerings
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_all_blocks_are_skipped_by_what_the_first_attention_reads(inner: str, lowering: str) -> None:
    """TeaCache: the input of the first attention is computed once more, before the blocks."""
    model = build(DiT)
    rule = Change(ModulatedInput(), threshold=0.15, accumulate=True, cooldown=1, rescale=(1.5, 0.0))
    reference, plain = ModulatedReference(model, rule), trajectory(model)
    expected = trajectory(reference)
    assert 0 < reference.reused < len(TIMESTEPS) - 2
    with enabled(model, rule, lowering=lowering, inner=inner) as pab:
        found = trajectory(model)
        assert pab.report().reused == reference.reused
    assert equal(found, expected) if inner == "eager" else distance(found, expected) < 1e-4  # what Inductor fuses
    assert distance(found, plain) > 1e-3


def test_an_exported_program_measures_what_the_first_attention_reads() -> None:
    model, rule = build(DiT), Change(ModulatedInput(), threshold=0.15, accumulate=True)
    names = ("hidden_states", "timestep", "text")
    given = dict(zip(names, inputs(0, TIMESTEPS[0]), strict=True))
    program = pab_fx.export(model, given, policy_of(rule), timesteps=TIMESTEPS).module()
    reference = ModulatedReference(model, rule)
    expected = trajectory(reference)
    steps = map(inputs, range(len(TIMESTEPS)), TIMESTEPS)
    assert equal([program(**dict(zip(names, step, strict=True))).clone() for step in steps], expected)
    assert 0 < reference.reused < len(TIMESTEPS) - 1


@lowerings
@pytest.mark.parametrize("rule", [FIRST, RULES["added up"]], ids=["first block", "added up"])
def test_inductor_decides_alike(rule: Change, lowering: str) -> None:
    model = build(MMDiT)
    reference = Reference(model, rule)
    expected = trajectory(reference)
    with enabled(model, rule, lowering=lowering, inner="inductor") as pab:
        found = trajectory(model)
        assert pab.report().reused == reference.reused
    assert distance(found, expected) < 1e-4  # rounding of what Inductor fuses


@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")], ids=["one", "two contexts"])
@rules
def test_an_exported_program_decides_by_itself(rule: Change, contexts: Sequence[str]) -> None:
    model = build(MMDiT)
    names = ("hidden_states", "timestep", "text")
    given = dict(zip(names, inputs(0, TIMESTEPS[0]), strict=True))
    program = pab_fx.export(model, given, policy_of(rule), timesteps=TIMESTEPS, contexts=contexts).module()
    references = [Reference(model, rule) for _ in contexts or (None,)]
    for step, t in enumerate(TIMESTEPS):
        for i, reference in enumerate(references):
            x, *others = inputs(step, t)
            x = x * (1 + i * math.sin(step))  # each context changes in its own way
            further = {"pab_context": torch.tensor(i)} if contexts else {}
            expected = reference(x, *others)
            assert torch.equal(program(**dict(zip(names, (x, *others), strict=True)), **further), expected)
    assert all(0 < reference.reused < len(TIMESTEPS) - 1 for reference in references)


def test_a_rewritten_graph_decides_by_itself() -> None:
    class Traced(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return self.model(hidden_states, timestep, text)

    model = build(DiT)
    given = torch.export.export(model, inputs(0, TIMESTEPS[0]), strict=False).module()
    graph = pab_fx.rewrite(given, policy_of(FIRST), model=model)
    reference = Reference(model, FIRST)
    assert all(torch.equal(graph(*inputs(i, t)), reference(*inputs(i, t)).clone()) for i, t in enumerate(TIMESTEPS))
    assert reference.reused > 0


def test_branches_of_guidance_have_signals_of_their_own(inner: Any) -> None:
    model = build(DiT)
    references = {"cond": Reference(model, FIRST), "uncond": Reference(model, FIRST)}
    with enabled(model, inner=inner):
        for step, t in enumerate(TIMESTEPS):
            for name, scale in (("cond", 1.0), ("uncond", 1 + math.sin(step))):
                x, *others = inputs(step, t)
                with pab_fx.cache_context(name):
                    assert torch.equal(model(scale * x, *others), references[name](scale * x, *others))
    reused = [reference.reused for reference in references.values()]
    assert reused[0] != reused[1]
    assert all(reused)


def test_branches_of_guidance_may_share_the_decision_of_the_first() -> None:
    """The second one changes much, and reuses all the same, its own residual."""
    model = build(DiT)
    alone = Reference(model, FIRST)
    expected = trajectory(alone)
    with enabled(model, replace(FIRST, share_decision=True)) as pab:
        found, kept = [], []
        for step, t in enumerate(TIMESTEPS):
            x, *others = inputs(step, t)
            for name, scale in (("cond", 1.0), ("uncond", 1 + step)):
                with pab_fx.cache_context(name):
                    (found if name == "cond" else kept).append(model(scale * x, *others).clone())
        report = pab.report()
    assert equal(found, expected)
    assert report.reused == 2 * alone.reused
    assert report.numbers_read == len(TIMESTEPS) - 1
    assert not equal(kept, found)


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_report_says_what_each_decision_was_by(accumulate: bool) -> None:
    model = build(MMDiT)
    rule = replace(FIRST, accumulate=accumulate)
    with enabled(model, rule) as pab:
        trajectory(model)
        report = pab.report()
    assert len(report.decisions) == report.numbers_read
    assert sum(each.reused for each in report.decisions) == report.reused > 0
    for each in report.decisions:
        assert (each.measured <= rule.threshold) is each.reused
        assert (each.threshold, each.context, each.timestep in TIMESTEPS) == (rule.threshold, "", True)
    assert f"the last {len(report.decisions)} decisions by" in str(report)
    assert Report.of_json(json.loads(json.dumps(report.as_json()))) == report


def test_requests_in_turns_and_generations_that_were_cut_off_are_each_as_if_alone(inner: Any) -> None:
    model = build(MMDiT)
    expected = trajectory(Reference(model, FIRST))
    with enabled(model, inner=inner) as pab:
        trajectory(model, TIMESTEPS[:5])
        assert equal(trajectory(model), expected)
        sessions = [pab.session(), pab.session()]
        found: list[list[Tensor]] = [[], []]
        for step, t in enumerate(TIMESTEPS):
            for i, session in enumerate(sessions):
                with session:
                    found[i].append(model(*inputs(step, t)).clone())
        assert all(equal(each, expected) for each in found)


def test_threads_with_requests_of_their_own_decide_apart() -> None:
    model = build(DiT)
    references = {scale: Reference(model, FIRST) for scale in (1.0, 3.0)}
    expected = {
        scale: [reference(scale * x, *others) for x, *others in map(inputs, range(len(TIMESTEPS)), TIMESTEPS)]
        for scale, reference in references.items()
    }
    found: dict[float, list[Tensor]] = {}
    with enabled(model) as pab:
        trajectory(model)  # compiled before

        def run(scale: float) -> None:
            with torch.no_grad(), pab.session():
                steps = map(inputs, range(len(TIMESTEPS)), TIMESTEPS)
                found[scale] = [model(scale * x, *others).clone() for x, *others in steps]

        threads = [threading.Thread(target=run, args=(scale,)) for scale in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(equal(found[scale], expected[scale]) for scale in expected)
    assert all(0 < reference.reused < len(TIMESTEPS) - 1 for reference in references.values())


@lowerings
def test_sizes_may_change_between_generations(lowering: str, inner: Any) -> None:
    model = build(MMDiT)
    with enabled(model, lowering=lowering, inner=inner):
        for shape in ({"tokens": 6}, {"tokens": 4, "batch": 1}, {"tokens": 6}):
            expected = trajectory(Reference(model_of(model), FIRST), **shape)
            assert equal(trajectory(model, **shape), expected)


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"lowering": "cond"}], ids=str)
def test_other_sizes_begin_a_generation_even_where_the_timestep_does_not_rise(options: dict[str, Any]) -> None:
    """What is kept of a signal has the old size then."""
    model = build(DiT)
    first = [inputs(step, t) for step, t in enumerate(TIMESTEPS[:6])]
    then = [inputs(step, t / 3, tokens=10) for step, t in enumerate(TIMESTEPS)]
    references = [Reference(model, FIRST), Reference(model, FIRST)]
    expected = [ref(*step).clone() for ref, steps in zip(references, (first, then), strict=True) for step in steps]
    with enabled(model, timesteps=None, **options) as pab:
        assert equal([model(*step).clone() for step in (*first, *then)], expected)
        assert pab.report().reused == sum(reference.reused for reference in references)
    assert all(reference.reused for reference in references)


def model_of(model: nn.Module) -> Denoiser:
    """The same weights without anything that is enabled."""
    plain = build(type(model))  # type: ignore[arg-type]
    plain.load_state_dict(model.state_dict())
    return plain


def test_what_the_caller_updates_in_place_is_remembered_as_it_was() -> None:
    """As sglang PR 33827: what was kept by reference came to be what it is compared with, and each change a NaN."""
    rule = RULES["the sample, added up"]
    model = build(DiT)
    expected = trajectory(Reference(model, rule))
    with enabled(model, rule) as pab:
        found, latents = [], inputs(0, TIMESTEPS[0])[0]
        for step, t in enumerate(TIMESTEPS):
            x, *others = inputs(step, t)
            latents.copy_(x)  # a sampler's step in place: the same tensor in each step
            found.append(model(latents, *others).clone())
        assert pab.report().reused > 0
    assert equal(found, expected)


class OverwritingBlock(Block):
    """Updates the tensor that it is given in place."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x += self.attn(self.norm(x) + embedding.unsqueeze(1))
        x += self.ff(self.norm(x))
        return x


class OverwritingDiT(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = OverwritingBlock()


def test_a_block_that_overwrites_what_it_is_given_is_no_signal_and_it_is_said() -> None:
    """As sglang PR 33827: the residual of such a block was 0, the change a NaN, and nothing was ever reused."""
    model = build(OverwritingDiT)
    plain = trajectory(model)
    with enabled(model) as pab:
        with pytest.warns(UserWarning, match="computed in every step"):
            assert equal(trajectory(model), plain)
        (region,) = pab.report().regions
    assert "update the tensor that they are given in place" in str(region.left_alone)
    with enabled(model, RULES["the sample"]) as pab:
        assert not equal(trajectory(model), plain)
        assert pab.report().reused > 0


@lowerings
@pytest.mark.parametrize("rule", [FIRST, RULES["added up"]], ids=["first block", "added up"])
def test_cuda_graphs_leave_the_cache_on(rule: Change, lowering: str) -> None:
    """As sglang issue 34177: with them the cache was off, and nobody was told. They are simulated here."""
    model = build(MMDiT)
    reference = Reference(model, rule)
    expected = [trajectory(reference), trajectory(Reference(model, rule))]
    with enabled(model, rule, lowering=lowering, inner=replaying) as pab:
        found = [trajectory(model), trajectory(model)]
        assert pab.report().reused == 2 * reference.reused > 0
    assert all(map(equal, found, expected))


def test_a_step_that_a_mask_decides_reads_no_number_and_others_read_one() -> None:
    rule = Change(Blocks(0, 1), threshold=1e9, warmup=4, cooldown=3)
    with enabled(model := build(DiT), rule) as pab:
        trajectory(model)
        report = pab.report()
    assert report.numbers_read == len(TIMESTEPS) - 7 == report.reused
    assert "waits for one number" in str(report)


@lowerings
def test_there_is_one_captured_graph_and_no_recompile(lowering: str) -> None:
    """cache-dit issue 76: to decide by a number breaks the graph, and what is compiled is slower for it."""
    torch._dynamo.utils.counters.clear()
    with enabled(model := build(MMDiT), lowering=lowering) as pab:
        trajectory(model)
        report = pab.report()
    assert len(report.captured) == 1
    assert report.graphs == {"specialize": 3, "cond": 2}[lowering]  # a head, and one or two of the rest
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "options",
    [{"regional": True}, {"cache_device": "cpu"}, {"step_invariants": False}, {"regional": True, "lowering": "cond"}],
    ids=str,
)
def test_options_of_enable_decide_alike(options: dict[str, Any]) -> None:
    model = build(DiT)
    expected = trajectory(Reference(model, FIRST))
    with enabled(model, **options):
        assert equal(trajectory(model), expected)


def test_smaller_caches_take_the_same_decisions() -> None:
    model = build(DiT)
    reference = Reference(model, FIRST)
    expected = trajectory(reference)
    with enabled(model, cache_dtype="int8") as pab:
        found = trajectory(model)
        assert pab.report().reused == reference.reused
    assert 0 < distance(found, expected) < 0.05  # 8 bits of a residual of about 1


@lowerings
def test_dynamic_shapes_are_captured_once(lowering: str) -> None:
    model = build(MMDiT)
    sizes = ({"tokens": 6}, {"tokens": 10}, {"tokens": 8})
    expected = [trajectory(Reference(model, FIRST), **shape) for shape in sizes]
    with enabled(model, lowering=lowering, dynamic=True) as pab:
        found = [trajectory(model, **shape) for shape in sizes]
        assert len(pab.report().captured) == 1
    assert all(map(equal, found, expected))


def test_a_model_that_is_compiled_already_is_compiled_again() -> None:
    model = build(DiT)
    expected = trajectory(Reference(model, FIRST))
    model.compile(backend="eager")
    with enabled(model):
        assert equal(trajectory(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [FIRST, RULES["added up"]], ids=["first block", "added up"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_model_of_quantised_weights_decides_as_it_does_in_eager(inner: str, rule: Change) -> None:
    """By torchao, to int8, weights only; cache-dit issue 1089: with a cache and a compiler they failed."""
    quantization = pytest.importorskip("torchao.quantization")
    model = build(DiT)
    full = trajectory(Reference(model, rule))
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    reference = Reference(model, rule)
    expected = trajectory(reference)
    assert not equal(expected, full)
    with enabled(model, rule, inner=inner) as pab:
        found = trajectory(model)
        assert pab.report().reused == reference.reused
    assert 0 < reference.reused < len(TIMESTEPS) - 1
    assert equal(found, expected) if inner == "eager" else distance(found, expected) < 1e-4


@pytest.mark.slow
def test_a_packaged_program_decides_by_itself(tmp_path: Any) -> None:
    """By AOTInductor; the sum of changes is among its state."""
    model, rule = build(MMDiT), RULES["added up"]
    names = ("hidden_states", "timestep", "text")
    given = dict(zip(names, inputs(0, TIMESTEPS[0]), strict=True))
    program = pab_fx.export(model, given, policy_of(rule), timesteps=TIMESTEPS)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    reference = Reference(model, rule)
    for _ in range(2):
        expected = trajectory(Reference(model, rule))
        found = [package(**dict(zip(names, inputs(step, t), strict=True))).clone() for step, t in enumerate(TIMESTEPS)]
        assert distance(found, expected) < 1e-4  # rounding of what Inductor fuses
    trajectory(reference)
    assert 0 < reference.reused < len(TIMESTEPS) - 1


def test_an_autocast_around_the_blocks_holds_on_both_sides_of_the_cut() -> None:
    class Autocast(DiT):
        def run(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                (x,) = super().run(streams, embedding)
                return (x.float(),)

    model, rule = build(Autocast), Change(Blocks(0, 1), threshold=0.0, max_skips=1)
    plain = trajectory(model)
    with enabled(model, rule):
        assert equal(trajectory(model), plain)
    with enabled(model, replace(rule, threshold=1e9)) as pab:
        found = trajectory(model)
        assert pab.report().reused == len(TIMESTEPS) // 2
    assert equal(found[::2], plain[::2])
    assert not equal(found, plain)


def test_warmup_compiles_what_a_signal_may_ask_for() -> None:
    model = build(DiT)
    with enabled(model) as pab:
        model(*inputs(0, TIMESTEPS[0]))
        pab.warmup()
        before = pab.report().graphs
        trajectory(model)
        assert pab.report().reused > 0
        assert pab.report().graphs == before == 3


def test_another_threshold_needs_no_capture_and_another_signal_is_refused() -> None:
    model = build(DiT)
    with enabled(model) as pab:
        trajectory(model)
        other = Change(Blocks(0, 1), threshold=0.3, max_skips=2)
        reference = Reference(model, other)
        expected = trajectory(reference)
        pab.set_config(policy_of(other))
        assert equal(trajectory(model), expected)
        with pytest.raises(ValueError, match="captured anew"):
            pab.set_config(policy_of(Change(Model(), threshold=0.3)))


def test_numbers_that_are_not_finite_compute_and_it_is_said_once() -> None:
    model = build(DiT)
    computed = []
    with enabled(model, replace(FIRST, threshold=1e9)) as pab, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step, t in enumerate(TIMESTEPS):
            x, *others = inputs(step, t)
            model(x * (math.nan if step in (4, 5, 6) else 1), *others)
            computed.append(pab.backend.runtime.counts["blocks", False])
    told = [str(each.message) for each in said if "nan" in str(each.message)]
    assert len(told) == 1
    assert "such a step computes" in told[0]
    steps = [step for step, before in enumerate([0, *computed[:-1]]) if computed[step] > before]
    assert steps == [0, 4, 5, 6, 7]  # what 7 is measured against is nan


def test_nothing_changed_is_no_change_at_all() -> None:
    """0 / 0 where the signal is constant and zero."""
    assert float(FIRST.measured(torch.zeros(3), torch.zeros(3))) == 0.0
    assert float(FIRST.measured(torch.ones(3), torch.zeros(3))) == math.inf
    assert math.isnan(float(FIRST.measured(torch.tensor([math.nan]), torch.ones(1))))
    model = build(DiT)
    with enabled(model, Change(Model(), threshold=0.0)) as pab:
        given = inputs(0, 1000.0)
        for t in TIMESTEPS:
            model(torch.zeros_like(given[0]), torch.full((2,), t), given[2])
        assert pab.report().reused == len(TIMESTEPS) - 1


def test_two_thresholds_on_one_signal_are_each_measured_against_steps_of_their_own() -> None:
    parts = [Policy(Blocks(1, 2), FIRST, Residual()), Policy(Blocks(2), replace(FIRST, threshold=0.3), Residual())]
    reused = []
    for policies in (parts[:1], parts[1:], parts):
        with pab_fx.enable(model := build(DiT), policies, inner="eager", timesteps=TIMESTEPS) as pab:
            trajectory(model)
            reused.append(pab.report().reused)
    assert 0 < reused[0] < reused[1]
    assert reused[2] == reused[0] + reused[1]


def test_the_last_blocks_may_compute_in_every_step() -> None:
    """DBCache's F1B1: the residual is that of what lies between."""

    class EndingReference(Reference):
        def __init__(self, model: Denoiser, rule: Change) -> None:
            super().__init__(model, rule)
            self.last = self.blocks.pop()

        def partly(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
            return (self.last(*super().partly(streams, embedding), embedding),)

    model = build(DiT)
    reference = EndingReference(model, FIRST)
    expected = trajectory(reference)
    policy = Policy(Blocks(1, -1), FIRST, Residual())
    with pab_fx.enable(model, policy, inner="eager", timesteps=TIMESTEPS) as pab:
        assert equal(trajectory(model), expected)
        assert pab.report().reused == reference.reused > 0


def test_forecasts_and_other_policies_go_by_signals_too() -> None:
    model = build(DiT)
    policies = [Policy(Blocks(1, 2), FIRST, Taylor(1, of=Residual())), Policy(Blocks(2), Every(3), Last())]
    with pab_fx.enable(model, policies, inner="eager", timesteps=TIMESTEPS) as pab:
        trajectory(model)
        assert {region.name for region in pab.report().regions} == {"blocks(1, 2)", "blocks(2, None)"}
        assert pab.report().reused > len(TIMESTEPS) // 2


def test_the_report_shows_what_a_signal_decides() -> None:
    with enabled(model := build(DiT)) as pab:
        trajectory(model)
        said = str(pab.report())
    assert "? ? ?" in said
    assert "while blocks(0, 1) changes by at most 0.1" in said


@pytest.mark.parametrize("rule", [replace(FIRST, warmup=2), RULES["added up"]], ids=["first block", "added up"])
@pytest.mark.parametrize("cache_device", [None, "cpu"])
def test_the_report_counts_the_signal_among_the_caches_and_it_goes_with_them(rule: Change, cache_device: Any) -> None:
    model = build(DiT)
    tensor = 2 * 6 * 8 * 4  # of the stream: a batch of 2, 6 tokens, 8 channels, 4 bytes
    with enabled(model, rule, cache_device=cache_device) as pab:
        for step, t in enumerate(TIMESTEPS):
            for name in ("cond", "uncond"):
                with pab_fx.cache_context(name):
                    model(*inputs(step, t))
            (role,) = pab.report().roles
            kept = 2 * tensor * (rule.warmup - 1 <= step < len(TIMESTEPS) - 1)  # the residual and the signal
            assert [(each.context, each.cache_bytes) for each in role.contexts] == [("cond", kept), ("uncond", kept)]
            assert role.modules == 1
        (region,) = pab.report().regions
        assert role.full_bytes == 2 * region.cache_bytes == 4 * tensor


def test_a_model_without_the_signal_is_left_alone_and_it_is_said() -> None:
    model = build(DiT)
    with pab_fx.enable(model, Policy(Blocks(), Change(Blocks(7, 8), 0.1), Residual()), inner="eager") as pab:
        with pytest.warns(UserWarning, match="computed in every step"):
            trajectory(model)
        (region,) = pab.report().regions
    assert "nothing that its rule could look at" in str(region.left_alone)


def test_blocks_that_hold_their_own_signal_are_left_alone_and_it_is_said() -> None:
    model = build(DiT)
    with pab_fx.enable(model, Policy(Blocks(), FIRST, Residual()), inner="eager") as pab:
        with pytest.warns(UserWarning, match="computed in every step"):
            trajectory(model)
        (region,) = pab.report().regions
    assert "begins before blocks(0, 1), which decides, is known" in str(region.left_alone)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"of": "blocks"}, "of must be Blocks"),
        ({"threshold": -0.1}, "threshold must be a number >= 0"),
        ({"threshold": math.nan}, "threshold must be a number >= 0"),
        ({"accumulate": 1}, "accumulate"),
        ({"share_decision": None}, "share_decision"),
        ({"warmup": 0}, "warmup must be an integer >= 1"),
        ({"cooldown": -1}, "cooldown must be an integer >= 0"),
        ({"max_skips": 0}, "max_skips must be an integer >= 1"),
        ({"rescale": ("a",)}, "rescale must be the numbers of a polynomial"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Change(**fields)


def test_a_rule_goes_into_a_file_and_back(tmp_path: Any) -> None:
    policies = tuple(policy_of(rule) for rule in (*RULES.values(), Change(ModulatedInput(), 0.2, share_decision=True)))
    pab_fx.save_policies(policies, tmp_path / "rules.json")
    assert pab_fx.load_policies(tmp_path / "rules.json") == policies


def test_a_rule_of_the_users_own_measures_what_it_likes() -> None:
    class Largest(Change):
        """The largest change of any element."""

        def measured(self, now: Tensor, before: Tensor) -> Tensor:
            return (now - before).abs().amax()

    rule = Largest(Blocks(0, 1), threshold=0.2)
    assert rule.decide(Step(3, 500.0), Progress(1, 600.0), 0.1)
    with enabled(model := build(DiT), rule) as pab:
        trajectory(model)
        assert 0 < pab.report().reused < len(TIMESTEPS) - 1
