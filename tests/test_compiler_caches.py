"""The compiler's caches take our graphs: another process that is given what one has compiled compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from pab_fx._torch import cached, cond_op
from pab_fx.passes.strides import in_order

TESTS = Path(__file__).parent
PROCESS = """
import json, sys, torch, zoo
from torch._dynamo.utils import counters
from pab_fx import Attentions, Blocks, Every, Policy, Residual, Taylor, enable

lowering, policy, artifacts = sys.argv[1:]
if policy == "pab":
    policies = Policy(Attentions(), Every(2))
else:
    policies = Policy(Blocks(), Every(2), Taylor(1, of=Residual()))
entry = zoo.BY_NAME["WanTransformer3DModel"].of_one_block()
model = entry.build()
try:
    with open(artifacts, "rb") as file:
        torch.compiler.load_cache_artifacts(file.read())
except FileNotFoundError:
    pass
with torch.no_grad(), enable(model, policies, lowering=lowering):
    outputs = [model(**entry.step(t, 0))[0].double() for t in (900, 700, 500)]
made = torch.compiler.save_cache_artifacts()
if made is not None:
    with open(artifacts, "wb") as file:
        file.write(made[0])
counted = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps([counted, [float(each.abs().sum()) for each in outputs]]))
"""


def run(tmp_path: Path, name: str, *arguments: str) -> tuple[dict[str, int], list[float]]:
    """What a process has counted and computed, with a cache of its own on disk."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, *arguments, str(tmp_path / "artifacts")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    found: Any = json.loads(finished.stdout.splitlines()[-1])
    return found[0], found[1]


@pytest.mark.parametrize(
    ("lowering", "policy"), [("cond", "pab"), pytest.param("specialize", "blocks", marks=pytest.mark.slow)]
)
def test_a_process_that_is_given_what_another_has_compiled_compiles_nothing(
    lowering: str, policy: str, tmp_path: Path
) -> None:
    """`torch.compiler.save_cache_artifacts` and `load_cache_artifacts`; each process has an empty cache on disk."""
    cold, expected = run(tmp_path, "cold", lowering, policy)
    warm, found = run(tmp_path, "warm", lowering, policy)
    assert cold["fxgraph_cache_miss"] == cold["autograd_cache_miss"] == cold["autograd_cache_saved"]
    assert warm["autograd_cache_hit"] == cold["autograd_cache_miss"]
    for counted in (cold, warm):
        assert "fxgraph_cache_bypass" not in counted
        assert "autograd_cache_bypass" not in counted
    assert "fxgraph_cache_miss" not in warm
    assert "autograd_cache_miss" not in warm
    assert found == expected
    assert len(set(found)) == 3


def test_the_key_has_the_source_of_our_functions_and_is_the_same_next_time() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(in_order, (x, (0, 1))))
    config = torch._inductor.config
    before = dict(config.unsafe_marked_cacheable_functions)
    marks = []
    for gm in (fx.GraphModule({}, graph), fx.GraphModule({}, graph), fx.symbolic_trace(torch.nn.ReLU())):
        with cached(gm):
            marks.append(dict(config.unsafe_marked_cacheable_functions))
    ours, again, plain = marks
    assert ours == again
    assert ours["pab_fx.passes.strides.in_order"] == ours["torch.ops.higher_order.cond"]
    assert set(plain) - set(before) == {f"{cond_op.__module__}.{cond_op.__name__}"}
    assert plain["torch.ops.higher_order.cond"] != ours["torch.ops.higher_order.cond"]  # other modules' source
    assert config.unsafe_marked_cacheable_functions == before
