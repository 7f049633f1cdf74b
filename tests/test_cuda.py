"""The short version for a GPU: `pytest -m cuda` there; everywhere else the same with simulated CUDA graphs on a CPU.

Every how and rule, both lowerings, `mode="reduce-overhead"`, offloaded caches, two sessions, streams of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from reference import distance
from test_blocks import TIMESTEPS, JoinedMMDiT, build, inputs, lowerings
from torch import Tensor, nn
from typer.testing import CliRunner

import pab_fx
from pab_fx import (
    AfterTimesteps,
    Attentions,
    Blocks,
    Change,
    Every,
    FeedForwards,
    Hermite,
    Magnitude,
    Model,
    ModulatedInput,
    Policy,
    RatedResidual,
    Residual,
    SkipRange,
    Steps,
    Taylor,
)
from pab_fx.cli import app
from pab_fx.testing import replaying

pytestmark = pytest.mark.usefixtures("no_gradients")

RATIOS = [1.0 + 0.02 * math.sin(3 * i) for i in range(len(TIMESTEPS))]
POLICIES = {
    "PAB": [Policy(Attentions(), SkipRange(2, 100, 900))],
    "attentions, order 2": [Policy(Attentions(), Every(3), Taylor(2))],
    "attentions, Hermite": [Policy(Attentions(), Every(3), Hermite(2))],
    "feed-forwards": [Policy(FeedForwards(), AfterTimesteps(((760, 2), (440, 3))))],
    "blocks": [Policy(Blocks(), Every(3, warmup=2), Residual())],
    "blocks, listed": [Policy(Blocks(), Steps((0, 1, 4, 8, 12), of=13), Taylor(1, of=Residual()))],
    "blocks, by ratios": [Policy(Blocks(), Magnitude(RATIOS, threshold=0.06), Residual())],
    "the model": [Policy(Model(), Every(2))],
    "nested": [Policy(Blocks(), Every(3), Residual()), Policy(Attentions(), SkipRange(2, 0, 1000))],
    "first block": [Policy(Blocks(1), Change(Blocks(0, 1), threshold=0.3), Residual())],
    "modulated input": [Policy(Blocks(), Change(ModulatedInput(), threshold=0.3, accumulate=True), Residual())],
    "by rate": [Policy(Model(), Change(Model(), threshold=3.0, by_rate=True, warmup=2), RatedResidual())],
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


class Place(NamedTuple):
    """Where it runs, and under what."""

    device: str
    options: dict[str, Any]


on_a_gpu = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
)
PLACES = {
    "simulated": pytest.param(Place("cpu", {"inner": replaying})),
    "default": pytest.param(Place("cuda", {}), marks=on_a_gpu),
    "reduce-overhead": pytest.param(Place("cuda", {"mode": "reduce-overhead"}), marks=on_a_gpu),
}


@pytest.fixture(params=PLACES.values(), ids=PLACES.keys())
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    yield request.param
    torch.compiler.reset()


def made(place: Place) -> nn.Module:
    return build(JoinedMMDiT).to(place.device)


def step(model: Any, place: Place, n: int, t: float, **shape: Any) -> Tensor:
    output: Tensor = model(*(each.to(place.device) for each in inputs(n, t, **shape)))
    return output.cpu().clone()


def generation(model: Any, place: Place, **shape: Any) -> list[Tensor]:
    return [step(model, place, n, t, **shape) for n, t in enumerate(TIMESTEPS)]


def plain(**shape: Any) -> list[Tensor]:
    return [build(JoinedMMDiT)(*inputs(n, t, **shape)) for n, t in enumerate(TIMESTEPS)]


def expected_of(policy: Sequence[Policy], **shape: Any) -> list[Tensor]:
    """On a CPU, without a compiler: what the other tests compare with plain eager references."""
    with pab_fx.enable(model := build(JoinedMMDiT), list(policy), inner="eager"):
        return generation(model, Place("cpu", {}), **shape)


@lowerings
@policies
def test_every_how_and_rule_gives_what_it_gives_on_a_cpu(policy: list[Policy], lowering: str, place: Place) -> None:
    expected = expected_of(policy)
    with pab_fx.enable(model := made(place), policy, lowering=lowering, **place.options) as pab:
        for _ in range(2):  # a second generation reads what the first one left in memory, if anything does
            found = generation(model, place)
        assert pab.report().reused > 0
    assert distance(found, expected) < 1e-4  # another device's kernels, in float32
    assert distance(found, plain()) > 1e-3


@pytest.mark.parametrize("options", [{"cache_device": "cpu"}, {"cache_dtype": "int8"}], ids=str)
def test_caches_elsewhere_and_smaller_ones_hold_the_same(options: dict[str, Any], place: Place) -> None:
    policy = POLICIES["blocks"]
    with pab_fx.enable(model := made(place), policy, **options, **place.options) as pab:
        found = generation(model, place)
        assert pab.report().reused > 0
    # int8 keeps 1 part in 127 of the largest of a token
    assert distance(found, expected_of(policy)) < (1e-4 if "cache_device" in options else 2e-2)


@policies
def test_two_sessions_in_turns_are_each_as_if_alone(policy: list[Policy], place: Place) -> None:
    sizes = [{"batch": 2}, {"batch": 3}]
    with pab_fx.enable(model := made(place), policy, **place.options) as pab:
        sessions, found = [pab.session() for _ in sizes], [[] for _ in sizes]  # type: ignore[var-annotated]
        for n, t in enumerate(TIMESTEPS):
            for session, outputs, shape in zip(sessions, found, sizes, strict=True):
                with session:
                    outputs.append(step(model, place, n, t, **shape))
        assert pab.report().reused > 0
    for outputs, shape in zip(found, sizes, strict=True):
        assert distance(outputs, expected_of(policy, **shape)) < 1e-4


@policies
def test_streams_of_ones_own_wait_for_what_is_kept(policy: list[Policy], place: Place) -> None:
    """A stream for each step; as anywhere in PyTorch, the caller has each wait for the one before."""
    streams = [torch.cuda.Stream() for _ in TIMESTEPS] if place.device == "cuda" else []
    with pab_fx.enable(model := made(place), policy, cache_device="cpu", **place.options) as pab:
        found = []
        for n, t in enumerate(TIMESTEPS):
            if streams:
                streams[n].wait_stream(streams[n - 1] if n else torch.cuda.current_stream())
            with torch.cuda.stream(streams[n]) if streams else nullcontext():
                found.append(step(model, place, n, t))
        assert pab.report().reused > 0
    assert distance(found, expected_of(policy)) < 1e-4


def test_other_sizes_are_recorded_beside_the_first(place: Place) -> None:
    policy = POLICIES["blocks"]
    with pab_fx.enable(model := made(place), policy, **place.options) as pab:
        for tokens in (6, 8, 6):
            before = pab.report().reused
            assert distance(generation(model, place, tokens=tokens), expected_of(policy, tokens=tokens)) < 1e-4
            assert pab.report().reused > before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["pab", "blocks", "firstblock"])
def test_the_benchmark_runs(policy: str) -> None:
    shown = CliRunner().invoke(app, ["bench", "--device", "cuda", "--quick", "--rounds", "1", "--policy", policy])
    assert shown.exit_code == 0, shown.output
