"""What two threads compile at a time is what each of them would compile alone."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_state import TIMESTEPS, Tiny, inputs
from torch._inductor import inductor_prims, ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

import pab_fx
from pab_fx import PABConfig
from pab_fx._torch.inductor import conditions_let_go_of_operands, conditions_take_operands_as_they_lie

pytestmark = pytest.mark.usefixtures("no_gradients")


def patched() -> tuple[Any, ...]:
    """What the two contexts change of Inductor."""
    from torch._inductor.lowering import lowerings

    return (
        getattr(PythonWrapperCodegen, "codegen_conditional", None),
        getattr(getattr(ir, "Conditional", None), "create", None),
        lowerings[inductor_prims.force_stride_order],
    )


IS_PATCHED = hasattr(PythonWrapperCodegen, "codegen_conditional")
"""torch 2.14 has switches in the place of conditions, which are left as they are."""


@pytest.mark.parametrize("context", [conditions_let_go_of_operands, conditions_take_operands_as_they_lie])
def test_inductor_is_as_it_was_after_two_threads_have_compiled(
    context: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    before, inside, go_on = patched(), threading.Event(), threading.Event()

    def second() -> None:
        with context():
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=second)
    with context():
        assert (patched() != before) == IS_PATCHED
        thread.start()
        inside.wait(0.2)  # where it is let in before the first leaves
    go_on.set()
    thread.join()
    assert patched() == before


def test_a_graph_that_two_threads_need_at_a_time_is_compiled_once() -> None:
    compiled: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if compiled:  # as it takes its time, the other thread comes
            threading.Event().wait(0.2)
        compiled.append(gm)
        return gm

    def serve(pab: pab_fx.PAB, wait: Callable[[], Any]) -> None:
        with pab.session(), torch.no_grad():
            found = []
            for number, t in enumerate(TIMESTEPS):
                wait()
                found.append(model(**inputs(number, t)))
            outputs.append(found)

    needed = []
    for count in (1, 2):
        compiled.clear()
        model, outputs = Tiny(), []
        config = PABConfig(spatial_attention_block_skip_range=2)
        with pab_fx.enable(model, config, inner=inner, step_invariants=False) as pab:
            model(**inputs(0, 900))
            wait = functools.partial(threading.Barrier(count).wait, 60)
            threads = [threading.Thread(target=serve, args=(pab, wait)) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert pab.report().reused == count * 2 * 3
        assert all(map(torch.equal, outputs[0], outputs[-1]))
        needed.append(len(compiled))
    assert needed[0] == needed[1]
