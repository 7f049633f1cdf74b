"""Signals that a function of the user's makes of tensors that the graph has, against a plain eager reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import distance, equal
from test_blocks import TIMESTEPS, DiT, build, inputs, lowerings, trajectory
from test_change import ModulatedReference
from torch import Tensor

import pab_fx
from pab_fx import Blocks, Change, Computed, Model, ModulatedInput, Output, Policy, Residual, Sigma

pytestmark = pytest.mark.usefixtures("no_gradients")


def coarse(sample: Tensor) -> Tensor:
    """Pairs of channels, averaged; a shape that no tensor of the model has."""
    return sample.unflatten(-1, (-1, 2)).mean(-1)


@dataclass(frozen=True)
class Weighted:
    """Of two tensors and the noise level, with a field of its own."""

    by: float

    def __call__(self, sample: Tensor, read: Tensor, sigma: Tensor) -> Tensor:
        if read.dim() != 3:  # a function may look at shapes
            raise TypeError(f"tokens are expected, got {read.shape}")
        return sample.mean() * (1 - sigma) + self.by * sigma * read.abs()


class Reference(ModulatedReference):
    """All blocks run or are skipped, by what the function makes of tensors."""

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.given, self.sigma = hidden_states.clone(), timestep[0] / 1000
        return self.model(hidden_states, timestep, text)

    def head(self, streams: tuple[Tensor, ...], embedding: Tensor) -> tuple[Tensor, ...]:
        found = super().head(streams, embedding)
        if Output("blocks.0.norm") in self.rule.of.of:
            self.sample = self.blocks[0].norm(streams[0])
        tensors = (self.given, self.sample, self.sigma)[: 1 if self.rule.of.function is coarse else 3]
        self.sample = self.rule.of.function(*tensors)
        return found


RULES = {
    "of the sample": Change(Computed(coarse), threshold=0.1, accumulate=True),
    "of several tensors": Change(Computed(Weighted(0.5), (Model(), ModulatedInput(), Sigma())), threshold=0.2),
    "of a module": Change(Computed(Weighted(0.5), (Model(), Output("blocks.0.norm"), Sigma())), threshold=0.2),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def policy_of(rule: Change) -> Policy:
    return Policy(Blocks(), rule, Residual())


def expected_of(model: Any, rule: Change) -> tuple[list[Tensor], int]:
    reference = Reference(model, rule)
    expected = trajectory(reference)
    assert 0 < reference.reused < len(TIMESTEPS) - 1
    return expected, reference.reused


@lowerings
@rules
def test_a_function_of_the_users_makes_the_signal(rule: Change, lowering: str) -> None:
    model = build(DiT)
    (expected, reused), plain = expected_of(model, rule), trajectory(model)
    with pab_fx.enable(model, policy_of(rule), inner="eager", timesteps=TIMESTEPS, lowering=lowering) as pab:
        found = trajectory(model)
        report = pab.report()
    assert report.reused == reused
    assert equal(found, expected)
    assert distance(found, plain) > 1e-3


def test_inductor_decides_alike() -> None:
    model, rule = build(DiT), RULES["of several tensors"]
    expected, _ = expected_of(model, rule)
    with pab_fx.enable(model, policy_of(rule), timesteps=TIMESTEPS):
        assert distance(trajectory(model), expected) < 1e-4  # rounding of what Inductor fuses


@rules
def test_an_exported_program_takes_the_noise_level_from_its_timesteps(rule: Change) -> None:
    model = build(DiT)
    expected, _ = expected_of(model, rule)
    names = ("hidden_states", "timestep", "text")
    given = dict(zip(names, inputs(0, TIMESTEPS[0]), strict=True))
    program = pab_fx.export(model, given, policy_of(rule), timesteps=TIMESTEPS).module()
    assert equal(trajectory(lambda *args: program(**dict(zip(names, args, strict=True)))), expected)


def test_the_noise_level_is_what_the_loop_says() -> None:
    """A scheduler's timesteps may be rounded; a cache context says what they stand for."""
    model, rule = build(DiT), RULES["of several tensors"]
    expected, reused = expected_of(model, rule)
    with pab_fx.enable(model, policy_of(rule), inner="eager", timesteps=TIMESTEPS) as pab:
        for step, (t, each) in enumerate(zip(TIMESTEPS, expected, strict=True)):
            with pab_fx.cache_context("cond", sigma=torch.tensor(t / 1000)):
                assert torch.equal(model(*inputs(step, t)), each)
        assert pab.report().reused == reused
        pab.reset()
        for step, t in enumerate(TIMESTEPS):
            with pab_fx.cache_context("cond", sigma=0.5**step):  # at other levels it decides otherwise
                model(*inputs(step, t))
        assert pab.report().reused != 2 * reused


def test_the_last_steps_compute_where_a_loop_says_how_many_there_are() -> None:
    model, rule = build(DiT), Change(Model(), threshold=100.0, cooldown=3)
    with pab_fx.enable(model, policy_of(rule), inner="eager") as pab:
        for step, t in enumerate(TIMESTEPS):
            with pab_fx.cache_context("cond", steps=len(TIMESTEPS)):
                model(*inputs(step, t))
        assert pab.report().reused == len(TIMESTEPS) - 1 - 3


def test_a_function_that_cannot_be_computed_is_refused_and_named() -> None:
    model = build(DiT)
    wrong = Change(Computed(Weighted(0.5), (Model(), Sigma(), Sigma())), threshold=0.2)
    pab_fx.enable(model, policy_of(wrong), inner="eager", timesteps=TIMESTEPS)
    with pytest.raises(Exception, match=r"Weighted.*tokens are expected"):
        model(*inputs(0, TIMESTEPS[0]))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda sample: 3.0, "yields float"),
        (lambda sample: sample > 0, "yields torch.bool"),
        (lambda sample: sample[:0], "without elements"),
    ],
)
def test_what_is_no_tensor_that_can_change_is_no_signal(function: Any, said: str) -> None:
    model = build(DiT)
    pab_fx.enable(model, policy_of(Change(Computed(function), threshold=0.2)), inner="eager", timesteps=TIMESTEPS)
    with pytest.raises(Exception, match=f"cannot be computed.*{said}"):
        model(*inputs(0, TIMESTEPS[0]))


@pytest.mark.parametrize("told", [{"sigma": 14.0}, {"sigma": "x"}, {"steps": -1}, {"steps": 2.5}], ids=str)
def test_a_cache_context_that_is_told_nonsense_says_so(told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"cache_context: {next(iter(told))}"), pab_fx.cache_context("cond", **told):
        pass


def test_a_module_that_the_model_lacks_leaves_it_alone_and_it_is_said() -> None:
    model, rule = build(DiT), Change(Computed(coarse, Output("blocks.9.norm")), threshold=0.2)
    plain = trajectory(model)
    with pab_fx.enable(model, policy_of(rule), inner="eager", timesteps=TIMESTEPS) as pab:
        assert equal(trajectory(model), plain)
        assert "nothing that its rule could look at" in str(pab.report())


def test_what_is_no_function_or_no_tensor_is_refused() -> None:
    for given in (3, [coarse]):
        with pytest.raises(ValueError, match="Computed: function"):
            Computed(given)  # type: ignore[arg-type]
    for of in ((), None, 3, Sigma(), "blocks.0.norm", (Model(), 3)):
        with pytest.raises(ValueError, match="Computed: of"):
            Computed(coarse, of)
    with pytest.raises(ValueError, match="has no JSON"):
        pab_fx.save_policies(policy_of(RULES["of the sample"]), "never-written.json")
