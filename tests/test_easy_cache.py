"""EasyCache: the change of the model's output, predicted from that of its input, against a plain eager reference."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import distance, equal
from test_blocks import TIMESTEPS, Denoiser, DiT, InPlaceDiT, MMDiT, build, inputs, lowerings, trajectory
from torch import Tensor

import pab_fx
from pab_fx import Change, Last, Model, Policy, RatedResidual, Residual, Taylor

pytestmark = pytest.mark.usefixtures("no_gradients")

RULE = Change(Model(), threshold=0.3, accumulate=True, warmup=2, cooldown=1, share_decision=True, by_rate=True)
POLICY = Policy(Model(), RULE, RatedResidual())


class Reference:
    """What `easycache_generate.py` of github.com/H-EmbodVis/EasyCache does, for one branch of guidance."""

    def __init__(self, model: Denoiser, rule: Change = RULE) -> None:
        self.model, self.rule, self.computed = copy.deepcopy(model), rule, []
        self.n, self.error = 0, 0.0
        self.k: Any = None
        self.sample_before: Any = None

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        sample, due = sample.clone(), self.rule.warmup <= self.n < len(TIMESTEPS) - self.rule.cooldown
        reuse = due and self.k is not None
        if reuse:
            change = (sample - self.sample_before).abs().mean() / self.output.abs().mean()
            self.error += float(self.k * change)
            reuse = self.error <= self.rule.threshold
        self.error = self.error if reuse else 0.0
        self.sample_before = sample
        self.n += 1
        return sample + self.added if reuse else self.compute(sample, timestep, text)

    def compute(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        output = self.model(sample.clone(), timestep, text)
        if self.computed:
            self.k = (output - self.output).abs().mean() / (sample - self.sample).abs().mean()
        self.sample, self.output, self.added = sample, output, output - sample
        self.computed.append(self.n - 1)
        return output


def enabled(model: Denoiser, policy: Policy = POLICY, **kwargs: Any) -> Any:
    return pab_fx.enable(model, policy, **{"inner": "eager", "timesteps": TIMESTEPS, **kwargs})


def held_against(model: Denoiser, **kwargs: Any) -> None:
    reference, plain = Reference(model), trajectory(model)
    expected = trajectory(reference)
    gaps = {b - a for a, b in itertools.pairwise(reference.computed[1:])}
    assert len(gaps) > 1  # the threshold decides, by no regular list of steps
    with enabled(model, **kwargs) as pab:
        found = [trajectory(model) for _ in range(2)]
        report = pab.report()
    assert report.reused == 2 * (len(TIMESTEPS) - len(reference.computed))
    for each in found:  # the second generation is as the first: what was counted and kept is forgotten
        assert equal(each, expected) if kwargs.get("inner") is None else distance(each, expected) < 1e-4
    assert distance(found[0], plain) > 1e-3


@lowerings
@pytest.mark.parametrize("kind", [DiT, InPlaceDiT, MMDiT], ids=lambda kind: kind.__name__)
def test_the_model_is_skipped_while_its_output_is_predicted_to_change_little(
    kind: type[Denoiser], lowering: str
) -> None:
    held_against(build(kind), lowering=lowering)


@lowerings
@pytest.mark.parametrize("inner", ["inductor", pab_fx.testing.replaying], ids=["inductor", "replaying"])
def test_compilers_decide_alike(inner: Any, lowering: str) -> None:
    """Others' EasyCache changes nothing under torch.compile: ComfyUI issue 14795."""
    held_against(build(DiT), inner=inner, lowering=lowering)


@pytest.mark.parametrize("options", [{"cache_dtype": torch.int8}, {"cache_device": "cpu"}], ids=["int8", "offloaded"])
def test_the_rate_is_kept_as_it_is_where_caches_are_smaller_or_elsewhere(options: dict[str, Any]) -> None:
    model = build(DiT)
    reference = Reference(model)
    trajectory(reference)
    with enabled(model, **options) as pab:
        trajectory(model)
        assert pab.report().reused == len(TIMESTEPS) - len(reference.computed)


@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")], ids=["one context", "two contexts"])
def test_an_exported_program_predicts_by_itself(contexts: tuple[str, ...]) -> None:
    model = build(DiT)
    expected = trajectory(Reference(model))
    given = dict(zip(("hidden_states", "timestep", "text"), inputs(0, TIMESTEPS[0]), strict=True))
    policy = replace(POLICY, when=replace(RULE, share_decision=False))
    program = pab_fx.export(model, given, policy, timesteps=TIMESTEPS, contexts=contexts).module()
    further = [{"pab_context": torch.tensor(i)} for i in range(len(contexts))] or [{}]

    def run(*args: Any) -> Tensor:
        found = [program(**dict(zip(given, args, strict=True)), **each) for each in further]
        assert all(equal(each, found[0]) for each in found)
        return found[0]

    assert equal(trajectory(run), expected)


def test_a_constant_sample_predicts_no_change_and_one_that_is_not_finite_computes() -> None:
    model = build(DiT)
    sample, *_ = inputs(0, TIMESTEPS[0])
    with enabled(model) as pab:
        with pytest.warns(UserWarning, match="is nan: such a step computes"):
            trajectory(lambda _, timestep, text: model(sample, timestep, text))
        assert pab.report().reused == 0  # the output changes and the sample does not: the rate is infinite


def test_a_rule_by_rate_asks_for_a_how_that_keeps_one_and_two_steps_that_compute() -> None:
    for how in (Last(), Residual(), Taylor(1, of=Residual())):
        with pytest.raises(ValueError, match="RatedResidual"):
            Policy(Model(), RULE, how)
    with pytest.raises(ValueError, match="warmup"):
        Change(Model(), by_rate=True)
    assert RatedResidual().describe() == "as a residual, with its rate"
    said = "reused while the changes of the output, as the sample predicts, add up to at most 0.3"
    assert RULE.describe() == said


def test_it_goes_into_a_file_and_back(tmp_path: Any) -> None:
    pab_fx.save_policies(POLICY, tmp_path / "easy.json")
    assert pab_fx.load_policies(tmp_path / "easy.json") == (POLICY,)
