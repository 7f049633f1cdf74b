"""What holds for every test."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.guards
from sweeps import CASES_BY_DEFAULT

from pab_fx.testing import replaying

# Dynamo measures the guards of each frame for a log that nobody reads here, and flushes a cache for that: 30 ms a time.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Further cases of a sweep are slow tests."""
    found: Counter[tuple[str, str]] = Counter()
    for item in items:
        name = item.name.partition("[")[0]
        if name in CASES_BY_DEFAULT and item.get_closest_marker("slow") is None:
            found[str(item.path), name] += 1
            if found[str(item.path), name] > CASES_BY_DEFAULT[name]:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """There are fewer collections of garbage, and they need not go through what was imported.

    Dynamo makes so many objects that a fifth of the time went into collections (22 s in place of 28 for 16 models).
    """
    _collect_and_freeze()
    gc.set_threshold(100_000, 50, 1000)


def _collect_and_freeze() -> None:
    """What is no garbage now stays, and no collection goes through it again."""
    gc.collect()
    gc.freeze()


_tests = itertools.count(1)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Handing tensors as small as the tests' to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, and no recompile budget spent, by the test before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    if next(_tests) % 50 == 0:  # of what tests leave behind: a test that collects garbage would go through all of it
        _collect_and_freeze()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For a module: `pytestmark = pytest.mark.usefixtures("no_gradients")`."""
    with torch.no_grad():
        yield


@pytest.fixture(params=["eager", "replaying"])
def inner(request: pytest.FixtureRequest) -> Any:
    """What runs the graphs: as they are, or as CUDA graphs run, of which the next call overwrites the outputs."""
    return {"eager": "eager", "replaying": replaying}[request.param]


@pytest.fixture
def tiny_pipeline() -> Callable[[Path], None]:
    """Writes a pipeline of diffusers that is called with class labels."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    def write(folder: Path) -> None:
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=1,
            sample_size=4,
            num_embeds_ada_norm=1000,
            out_channels=8,
        )
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)

    return write
