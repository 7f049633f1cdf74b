"""The compiler's caches take our graphs: another process that is given what one has compiled compiles nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import fx
from torch._dynamo.utils import counters

import pab_fx
from pab_fx import Attentions, Change, Every, Model, Policy, Residual, Taylor
from pab_fx._torch.inductor import cached
from pab_fx.diffusers.sea_cache import Filtered
from pab_fx.passes.strides import in_order

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("lowering", [pytest.param("specialize", marks=pytest.mark.slow), "cond"])
def test_a_graph_that_was_compiled_is_taken_from_the_caches_on_disk(
    lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process finds there, this one finds after a reset: it captures again, and compiles nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch.compiler.reset()
        counters.clear()
        model = zoo.BY_NAME["WanTransformer3DModel"].of_one_block()
        built, policy = model.build(), Policy(Attentions(), Every(2), Taylor(1))
        with torch.no_grad(), pab_fx.enable(built, policy, lowering=lowering) as pab:
            outputs = [built(**model.step(t, 0))[0].clone() for t in (900, 700, 500)]
            assert pab.report().reused > 0
        found.append((dict(counters["inductor"]), dict(counters["aot_autograd"]), outputs))
    (cold, cold_autograd, expected), (warm, warm_autograd, outputs) = found
    assert cold["fxgraph_cache_miss"] == cold_autograd["autograd_cache_saved"] == warm_autograd["autograd_cache_hit"]
    for counted in (cold, warm, cold_autograd, warm_autograd):
        assert not any(name.endswith("bypass") for name in counted)
    assert "fxgraph_cache_miss" not in warm
    assert "autograd_cache_miss" not in warm_autograd
    assert all(map(torch.equal, outputs, expected))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.slow
@pytest.mark.parametrize(("lowering", "policy"), [("cond", "attentions"), ("specialize", "blocks")])
def test_a_process_that_is_given_what_another_has_compiled_compiles_nothing(lowering: str, policy: str) -> None:
    """The example ends with an error if it compiles something, or computes something else."""
    asked = ["--size", "quick", "--policy", policy, "--ways", lowering]
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "second_process.py"), *asked]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert shown.returncode == 0, shown.stderr
    *_, row = shown.stdout.splitlines()
    name, _, _, _, graphs = row.strip("| ").split(" | ")
    assert name == lowering
    assert int(graphs) >= 1


def marks_of(*calls: tuple[Any, ...]) -> set[str]:
    """What is marked, beside `cond`, while a graph of these calls is compiled."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(function, (x, *more)) for function, *more in calls])
    config = torch._inductor.config
    before = dict(config.unsafe_marked_cacheable_functions)
    with cached(fx.GraphModule({}, graph)):
        marked = dict(config.unsafe_marked_cacheable_functions)
    assert config.unsafe_marked_cacheable_functions == before
    assert len({marked[name] for name in set(marked) - set(before)}) == 1  # a digest of the source
    return set(marked) - set(before) - {"torch.ops.higher_order.cond"}


def test_functions_of_ours_are_marked_for_the_caches_and_no_others() -> None:
    assert marks_of((torch.relu,)) == set()
    assert marks_of((in_order, (0, 1)), (torch.relu,)) == {"pab_fx.passes.strides.in_order"}


def test_what_holds_a_value_is_not_marked_since_its_name_does_not_tell_it() -> None:
    """Two filters of different powers have one name: with one key, one would get what was compiled for the other."""
    assert marks_of((Filtered(3.0).__call__,), (lambda x: x,)) == set()


def test_a_head_that_measures_a_signal_is_taken_from_the_caches_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    policy = Policy(Model(), Change(Model(), 1e6), Residual())
    counters.clear()
    entry = zoo.BY_NAME["WanTransformer3DModel"].of_one_block()
    model = entry.build()
    with torch.no_grad(), pab_fx.enable(model, policy) as pab:
        for t in (900, 700):
            model(**entry.step(t, 0))
        assert pab.report().reused > 0
    assert counters["aot_autograd"]["autograd_cache_saved"] == counters["aot_autograd"]["total"] > 1
    assert not any(name.endswith("bypass") for name in (*counters["inductor"], *counters["aot_autograd"]))
