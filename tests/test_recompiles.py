"""What Dynamo compiles for one model counts against no other's limit; where a limit is reached, that is said."""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_state import TIMESTEPS, Tiny, inputs

import pab_fx
from pab_fx import PABConfig

CONFIG = PABConfig(spatial_attention_block_skip_range=2)
LIMIT, MANY = 2, 4

pytestmark = pytest.mark.usefixtures("no_gradients")


def generate(model: Callable[..., Any], length: int = 5) -> None:
    for number, t in enumerate(TIMESTEPS):
        model(**inputs(number, t, length=length))


def nothing() -> None:
    pass


@pytest.fixture
def low_limit() -> Iterator[None]:
    """Of recompiles, so that a few models are many."""
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


breaks = pytest.mark.parametrize("between", [None, nothing], ids=["whole", "with breaks"])


@breaks
@pytest.mark.usefixtures("low_limit")
def test_each_of_many_models_of_a_class_is_broadcast(between: Callable[[], None] | None) -> None:
    for seed in range(MANY):
        model = Tiny(seed, between)
        pab = pab_fx.enable(model, CONFIG, inner="eager")
        generate(model)
        assert pab.report().reused == 2 * 3, f"model {seed}"


@breaks
@pytest.mark.usefixtures("low_limit")
def test_each_of_many_settings_of_a_model_is_broadcast(between: Callable[[], None] | None) -> None:
    model = Tiny(between=between)
    for low in range(100, 100 + MANY):
        window = PABConfig(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(low, 800))
        with pab_fx.enable(model, window, inner="eager") as pab:
            generate(model)
            assert pab.report().reused == 2 * 3, f"window from {low}"


@pytest.fixture
def two() -> tuple[tuple[Tiny, pab_fx.PAB], ...]:
    """Two models of one class that are compiled for each shape anew."""
    models = Tiny(0), Tiny(1)
    return tuple((model, pab_fx.enable(model, CONFIG, inner="eager", dynamic=False)) for model in models)


def reach_the_limit(model: Tiny) -> None:
    """With `recompile_limit=LIMIT`."""
    generate(model, length=5)
    generate(model, length=6)
    with pytest.warns(UserWarning, match=r"Tiny runs without broadcasting now.*_dynamo\.config\.recompile_limit"):
        generate(model, length=7)


def test_a_model_that_reaches_the_limit_says_so(two: tuple[tuple[Tiny, pab_fx.PAB], ...]) -> None:
    (model, pab), _ = two
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        reach_the_limit(model)
    assert "torch._dynamo.config.recompile_limit" in str(pab.report())


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch counts by class"
)
def test_a_model_that_reaches_the_limit_takes_nothing_from_others(two: tuple[tuple[Tiny, pab_fx.PAB], ...]) -> None:
    (model, _), (other, pab) = two
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        reach_the_limit(model)
        generate(other)
    assert pab.report().reused == 2 * 3


def test_the_denoisers_of_a_pipeline_are_compiled_once() -> None:
    pipe = types.SimpleNamespace(transformer=Tiny(0), transformer_2=Tiny(1))
    pab = pab_fx.enable(pipe, CONFIG, inner="eager")
    generate(pipe.transformer)
    generate(pipe.transformer_2)
    assert len(pab.backend.graphs) == 1
    assert pab.report().reused == 2 * 2 * 3


@pytest.mark.parametrize("cause", ["limit", "switched off"])
def test_a_model_that_dynamo_compiles_nothing_of_says_so(cause: str) -> None:
    first, second = Tiny(0), Tiny(1)
    pab_fx.enable(first, CONFIG, inner="eager")
    generate(first)
    pab = pab_fx.enable(second, CONFIG, inner="eager")
    limits = {"recompile_limit": 1, "accumulated_recompile_limit": 1} if cause == "limit" else {}
    stance = "force_eager" if cause == "switched off" else "default"
    with (
        torch._dynamo.config.patch(**limits),
        torch.compiler.set_stance(stance),
        pytest.warns(UserWarning, match="compiled nothing of Tiny") as seen,
    ):
        generate(second)
    assert len(seen) == 1
    assert "torch._dynamo.config.recompile_limit" in str(pab.report())
    assert "nothing that the config is for was found" not in str(pab.report())
