"""An engine that calls `torch.compile` itself, with a backend that its user has set for all of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from reference import equal
from test_blocks import TIMESTEPS, DiT, build, inputs, trajectory
from torch import Tensor, nn

import pab_fx
from pab_fx import Attentions, Blocks, Every, Policy, Residual, SkipRange

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not hasattr(torch.compiler, "set_default_backend"), reason="torch.compiler.set_default_backend is of torch 2.14"
    ),
]


class Engine:
    """A serving engine's loop: it loads a model, compiles it, and knows nothing of caches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = torch.compile(model)

    def generate(self, timesteps: Sequence[float] = TIMESTEPS) -> list[Tensor]:
        return [self.compiled(*inputs(n, t)).clone() for n, t in enumerate(timesteps)]


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


POLICIES = [Policy(Blocks(), Every(3), Residual()), Policy(Attentions(), SkipRange(2, 100, 900))]


@pytest.mark.parametrize("policy", POLICIES, ids=["blocks", "PAB"])
def test_an_engine_that_compiles_by_itself_is_given_the_cache(policy: Policy) -> None:
    with pab_fx.enable(enabled := build(DiT), policy, inner="eager"):
        expected = trajectory(enabled)
    torch.compiler.set_default_backend(pab_fx.PABBackend(policy, inner="eager"))
    engine = Engine(build(DiT))
    for _ in range(2):  # requests one after the other: a rising timestep begins a generation
        assert equal(engine.generate(), expected)
    assert pab_fx.report(engine.model).reused > 0
    assert not equal(expected, trajectory(build(DiT)))


def test_by_its_name_it_is_the_default_config(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled.append(gm)
        return gm.forward

    monkeypatch.setattr("pab_fx.options.lookup_backend", lambda name: inner)
    torch.compiler.set_default_backend("pab")
    engine = Engine(build(DiT))
    found = engine.generate()
    assert compiled
    assert pab_fx.report(engine.model).reused > 0
    assert not equal(found, trajectory(build(DiT)))
