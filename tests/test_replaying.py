"""`pab_fx.testing.replaying` does to a graph's caller what a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pab_fx import PABBackend
from pab_fx.run.holding import Static
from pab_fx.testing import Replayed, replaying

pytestmark = pytest.mark.usefixtures("no_gradients")


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[Replayed]]:
    """The function, and what became of its graphs."""
    graphs: list[Replayed] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Replayed:
        graphs.append(replaying(gm, example_inputs))
        return graphs[-1]

    return torch.compile(function, backend=compiler, **options), graphs


def test_the_next_call_of_another_graph_leaves_nan_in_what_a_graph_returned() -> None:
    (double, _), (half, _) = compiled(lambda x: 2 * x), compiled(lambda x: x / 2)
    doubled = double(torch.ones(2))
    assert doubled.tolist() == [2, 2]
    assert half(torch.ones(2)).tolist() == [0.5, 0.5]
    assert doubled.isnan().all()


def test_a_graph_returns_the_same_tensor_at_the_same_version_in_each_call() -> None:
    double, graphs = compiled(lambda x: 2 * x)
    first = double(torch.ones(2))
    address, version = first.data_ptr(), first._version
    again = double(torch.zeros(2))
    assert again is first
    assert (again.data_ptr(), again._version) == (address, version)
    assert first.tolist() == [0, 0]
    assert [graph.recordings for graph in graphs] == [1]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int64, 2**63 - 1),
        (torch.uint8, 255),
        (torch.bool, False),
        (torch.bfloat16, None),
        (torch.complex64, None),
    ],
)
def test_what_is_overwritten_is_no_likely_value(dtype: torch.dtype, expected: Any) -> None:
    (copy, _), (other, _) = compiled(lambda x: x.clone()), compiled(lambda x: x + 1)
    found = copy(torch.ones(2, dtype=dtype))
    assert found.tolist() == [1, 1]
    other(torch.ones(2))
    assert found.isnan().all() if expected is None else found.tolist() == [expected] * 2


def test_what_a_graph_returned_holds_while_one_call_runs_further_graphs() -> None:
    def broken(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plus = x + 1
        torch._dynamo.graph_break()
        return plus, plus * 2

    run, graphs = compiled(broken)
    for start in (0.0, 5.0):
        assert [each.item() for each in run(torch.tensor(start))] == [start + 1, 2 * start + 2]
    assert len(graphs) == 2


def test_a_graph_that_runs_twice_in_one_call_overwrites_nothing() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    block = Block()

    def twice(x: torch.Tensor) -> torch.Tensor:
        first = block(x)
        return first, block(first)

    run, _ = compiled(twice)
    for start in (0.0, 5.0):
        assert [each.item() for each in run(torch.tensor(start))] == [start + 1, start + 2]


def test_a_step_that_is_marked_by_hand_begins_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.cudagraph_trees import MarkStepBox

    monkeypatch.setattr(MarkStepBox, "mark_step_counter", 0)
    (double, _), (half, _) = compiled(lambda x: 2 * x), compiled(lambda x: x / 2)
    torch.compiler.cudagraph_mark_step_begin()
    doubled = double(torch.ones(2))
    half(torch.ones(2))
    assert doubled.tolist() == [2, 2]
    torch.compiler.cudagraph_mark_step_begin()
    half(torch.ones(2))
    assert doubled.isnan().all()


def test_parameters_are_read_where_they_lie_and_recorded_again_elsewhere() -> None:
    linear = nn.Linear(2, 2)
    run, graphs = compiled(linear)
    for _ in range(2):
        x = torch.randn(1, 2)
        assert torch.equal(run(x), linear(x))
    (graph,) = graphs
    assert (len(graph.static), graph.recordings) == (2, 1)
    linear.weight.mul_(2)
    assert torch.equal(run(x), linear(x))
    assert graph.recordings == 1
    linear.weight.data = torch.randn(2, 2)
    assert torch.equal(run(x), linear(x))
    assert graph.recordings == 2


def test_a_tensor_that_is_marked_static_is_read_where_it_lies() -> None:
    run, graphs = compiled(lambda x, y: x + y)
    marked = torch.ones(2)
    torch._dynamo.mark_static_address(marked, guard=False)
    for i in range(3):
        assert run(marked, torch.full((2,), float(i))).tolist() == [1 + i] * 2
    assert [(len(graph.static), graph.recordings) for graph in graphs] == [(1, 1)]


def test_what_lies_in_an_input_is_returned_as_a_part_of_it_and_updates_reach_it() -> None:
    def update(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.add_(1)
        return x[1:], x * 2

    run, _ = compiled(update)
    for base in (torch.zeros(4), torch.zeros(8)[::2]):
        part, doubled = run(base)
        assert base.tolist() == [1] * 4
        assert doubled.tolist() == [2] * 4
        assert part.data_ptr() == base[1:].data_ptr()


def test_outputs_that_share_memory_still_do() -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sums = x + x
        return sums, sums[1:], sums.expand(2, 4), sums.view(torch.int32)

    run, _ = compiled(views)
    for _ in range(2):
        sums, *others = run(torch.ones(4))
        assert all(each.any() for each in others)
        sums.zero_()
        assert not any(each.any() for each in others)


def test_what_a_condition_yields_may_lie_otherwise_in_each_call() -> None:
    class Either(nn.Module):
        def forward(self, x: torch.Tensor, is_turned: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x.T.contiguous().T if is_turned else x.repeat(1, 2)[:, :3],)

    run, x = replaying(Either(), ()), torch.randn(2, 3)  # type: ignore[arg-type]
    for is_turned in (True, False, True):
        (found,) = run(x, torch.tensor(is_turned))
        assert torch.equal(found, x)
        assert found.stride() == ((1, 2) if is_turned else (6, 1))


def test_expanded_and_inference_tensors_are_taken_and_returned_in_each_mode() -> None:
    run, _ = compiled(lambda x: x.sum(0))
    for _ in range(2):
        with torch.inference_mode():
            assert run(torch.ones(1, 3).expand(2, 3)).tolist() == [2, 2, 2]
        assert run(torch.ones(1, 3).expand(2, 3)).tolist() == [2, 2, 2]


def test_sizes_that_change_are_recorded_each() -> None:
    run, graphs = compiled(lambda x: x * 2, dynamic=True)
    for length in (3, 5, 3):
        assert run(torch.ones(length)).tolist() == [2] * length
    assert [graph.recordings for graph in graphs] == [2]


def test_with_gradients_the_graph_runs_as_it_is() -> None:
    run, graphs = compiled(lambda x: (x * 2).sum())
    x = torch.ones(2, requires_grad=True)
    with torch.enable_grad():
        run(x).backward()
    assert x.grad.tolist() == [2, 2]
    assert [graph.recordings for graph in graphs] == [0]


def test_a_compiler_that_says_it_records_graphs_is_treated_as_one_that_does() -> None:
    def recording(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return gm.forward

    assert isinstance(PABBackend(inner=replaying).runtime.holder, Static)
    assert PABBackend(inner=recording).runtime.holder is None
    recording.records_graphs = True  # type: ignore[attr-defined]
    assert isinstance(PABBackend(inner=recording).runtime.holder, Static)
