"""The zoo runs, covers diffusers' `CacheMixin` classes, and shows it when an attention is broadcast."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import diffusers.models
import pytest
import torch
import zoo
from diffusers import CacheMixin

TIMESTEPS = (900, 700, 600, 500, 300, 50)


entries = pytest.mark.parametrize("entry", zoo.ZOO, ids=lambda entry: entry.name)


def cache_mixin_classes() -> Iterator[str]:
    """Names of the model classes of the installed diffusers that mix in `CacheMixin`."""
    for module_info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        if module_info.name.endswith("_flax"):
            continue
        module = importlib.import_module(module_info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module_info.name and issubclass(cls, CacheMixin) and cls is not CacheMixin:
                yield name


def test_every_class_with_cache_mixin_is_in_the_zoo() -> None:
    missing = set(cache_mixin_classes()) - {entry.class_name for entry in zoo.ZOO}
    assert not missing, f"add an entry to tests/zoo for {sorted(missing)}"


@entries
def test_a_step_is_finite_and_depends_on_seed_only(entry: zoo.Entry) -> None:
    output = zoo.call(entry, entry.build(), t=500, seed=0)
    again = zoo.call(entry, entry.build(), t=500, seed=0)
    other = zoo.call(entry, entry.build(), t=500, seed=1)
    assert output
    for tensor, same, different in zip(output, again, other, strict=True):
        assert tensor.isfinite().all()
        assert torch.equal(tensor, same)
        assert not torch.equal(tensor, different)


@pytest.mark.slow
@entries
def test_broadcast_attention_shows_in_the_output(entry: zoo.Entry) -> None:
    model, clock = entry.build(), zoo.Clock()
    oracle = zoo.hooked(model, zoo.diffusers_config(clock))
    assert zoo.hooked_modules(oracle)

    plain = zoo.trajectory(entry, model, TIMESTEPS)
    broadcast = zoo.trajectory(entry, oracle, TIMESTEPS, clock)

    # 900 is outside the window and finds no cache; at 700 every role reuses; 50 is outside again.
    assert distance(plain[0], broadcast[0]) == 0
    assert distance(plain[1], broadcast[1]) > 0.05
    assert distance(plain[-1], broadcast[-1]) == 0


@pytest.mark.slow
@entries
def test_every_role_shows_in_the_output(entry: zoo.Entry) -> None:
    model = entry.build()
    plain = zoo.trajectory(entry, model, TIMESTEPS[:2])
    for ranges in ((2, None, None), (None, 2, None), (None, None, 2)):
        clock = zoo.Clock()
        oracle = zoo.hooked(model, zoo.diffusers_config(clock, ranges))
        if zoo.hooked_modules(oracle):
            assert distance(plain[1], zoo.trajectory(entry, oracle, TIMESTEPS[:2], clock)[1]) > 0.01


def distance(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> float:
    """The largest absolute difference between two outputs."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))
