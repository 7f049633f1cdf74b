"""What updates a tensor in place is found, whoever wrote it: an operator of the user's own, a Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_policies import TIMESTEPS, Attention, build, inputs
from torch import Tensor, fx, nn

import pab_fx
from pab_fx import Attentions, Every, Policy
from pab_fx.graph.effects import is_removable, updated
from pab_fx.policy.when import reused_calls

pytestmark = pytest.mark.usefixtures("no_gradients")


@torch.library.custom_op("pab_fx_tests::scale_", mutates_args={"x"})
def scale(by: float, x: Tensor) -> None:
    x.mul_(by)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "the function": lambda x: scale(2.0, x),
    "the operator": lambda x: torch.ops.pab_fx_tests.scale_(2.0, x),
    "by keyword": lambda x: torch.ops.pab_fx_tests.scale_(x=x, by=2.0),
    "its overload": lambda x: torch.ops.pab_fx_tests.scale_.default(2.0, x),
    "one of aten's": lambda x: torch.ops.aten.mul_(x, 2.0),
}


class Scaled(nn.Module):
    """An attention, of which the model updates the output."""

    def __init__(self, attn: Attention, update: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.attn, self._update = attn, update

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.attn(hidden_states * (1 + timestep / 1000))
        self._update(y)
        return hidden_states + y


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("way", WAYS)
def test_an_operator_of_the_users_own_that_updates_an_output_leaves_what_is_kept_alone(way: str, lowering: str) -> None:
    attn = build().blocks[0].attn
    model = Scaled(attn, WAYS[way]).eval()
    kept, expected = torch.empty(0), []
    for n, (t, reuses) in enumerate(zip(TIMESTEPS, reused_calls(Every(3), TIMESTEPS), strict=True)):
        x, timestep = inputs(n, t)
        kept = kept if reuses else attn(x * (1 + timestep / 1000))
        expected.append(x + kept * 2)
    with pab_fx.enable(model, Policy(Attentions(), Every(3)), inner="eager", lowering=lowering) as pab:
        found = [model(*inputs(n, t)).clone() for n, t in enumerate(TIMESTEPS)]
        assert pab.report().reused > 0
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[2], model(*inputs(2, TIMESTEPS[2])))


def test_an_operator_with_a_variant_that_writes_to_out_updates_nothing_without_it() -> None:
    """`torch.ops.aten.max(x, y)`: of `max.unary_out(x, *, out)` the second argument is `out`."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert updated(graph.call_function(torch.ops.aten.max, (x, y))) == ()
    assert updated(graph.call_function(torch.ops.aten.max, (x,), {"out": y})) == (y,)


def test_a_triton_kernel_updates_what_it_is_given() -> None:
    """A launch as Dynamo records it. What a kernel writes to is read from its code; from this one nothing can be."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["example_value"] = torch.zeros(2)
    launch = graph.call_function(
        triton_kernel_wrapper_mutation,
        kwargs={
            "kernel_idx": kernel_side_table.add_kernel(math),  # type: ignore[arg-type]
            "constant_args_idx": kernel_side_table.add_constant_args({}),
            "grid": [(1,)],
            "tma_descriptor_metadata": {},
            "kwargs": {"out_ptr": x, "in_ptr": y},
        },
    )
    graph.output(x)
    assert updated(launch) == (x, y)
    assert not is_removable(launch)
