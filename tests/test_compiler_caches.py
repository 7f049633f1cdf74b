"""The compiler's caches take our graphs: another process that is given what one has compiled compiles nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from pab_fx._torch import cached, cond_op
from pab_fx.passes.strides import in_order

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("lowering", "policy"), [("cond", "attentions"), pytest.param("specialize", "blocks", marks=pytest.mark.slow)]
)
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
