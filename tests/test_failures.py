"""What goes wrong around PAB ends in a clear error or a right result: compilers, passes, processes, Dynamo itself."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx

import pab_fx
from pab_fx import PABBackend, PABConfig

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
ENTRY = zoo.BY_NAME["WanTransformer3DModel"].of_one_block()
RANGES = (2, None, 4)
CONFIG = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4)
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


pytestmark = pytest.mark.usefixtures("no_gradients")


def oracle(timesteps: Sequence[float] = TIMESTEPS) -> list[Tensor]:
    """What diffusers' hooks make of a generation; with an input of its own at each timestep."""
    clock = zoo.Clock()
    model = zoo.hooked(ENTRY.build(), zoo.diffusers_config(clock, RANGES))
    return steps(model, timesteps, clock)


def steps(model: Callable[..., Any], timesteps: Sequence[float], clock: zoo.Clock | None = None) -> list[Tensor]:
    outputs = []
    for t in timesteps:
        if clock is not None:
            clock.t = t
        outputs.append(zoo.call(ENTRY, model, t, int(t))[0].clone())
    return outputs


def plain(timesteps: Sequence[float] = TIMESTEPS) -> list[Tensor]:
    return steps(ENTRY.build(), timesteps)


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


class Failing:
    """An inner compiler whose n-th compilation, or n-th run of a graph, fails.

    Args:
        error: what it raises.
        compilation: the one that raises, from 1.
        run: the one that raises, from 1.
    """

    def __init__(self, error: BaseException, compilation: int = 0, run: int = 0) -> None:
        self.error, self.compilation, self.run = error, compilation, run
        self.compiled = self.ran = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compiled += 1
        if self.compiled == self.compilation:
            raise self.error

        def run(*args: Any) -> Any:
            self.ran += 1
            if self.ran == self.run:
                raise self.error
            return gm.forward(*args)

        return run


# ------------------------------------------------------------------------------------- the inner compiler


@pytest.mark.parametrize(("lowering", "number"), [("cond", 1), ("specialize", 1), ("specialize", 2), ("specialize", 3)])
def test_a_compiler_that_raises_once_is_heard_and_the_next_generation_is_right(lowering: str, number: int) -> None:
    inner = Failing(RuntimeError("no kernel for this"), compilation=number)
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner=inner, lowering=lowering) as pab:
        with pytest.raises(Exception, match="no kernel for this"):
            steps(model, TIMESTEPS)
        assert same(steps(model, TIMESTEPS), oracle())
        assert pab.report().reused > 0
    assert not same(oracle(), plain())


@lowerings
@pytest.mark.parametrize("number", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5))])
def test_a_graph_that_runs_out_of_memory_once_leaves_nothing_behind(number: int, lowering: str) -> None:
    inner = Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), run=number)
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner=inner, lowering=lowering) as pab:
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
            steps(model, TIMESTEPS)
        assert sum(role.cache_bytes for role in pab.report().roles) == 0
        assert pab.report().once.kept_bytes == 0
        assert same(steps(model, TIMESTEPS), oracle())
        assert pab.report().reused > 0


def drops_the_last(outputs: Any) -> Any:
    return outputs[:-1]


def only_the_first(outputs: Any) -> Any:
    return outputs[0]


def halves_the_last(outputs: Any) -> Any:
    return (*outputs[:-1], outputs[-1].half())


def halves_the_first(outputs: Any) -> Any:
    return (outputs[0].half(), *outputs[1:])


def cuts_the_last(outputs: Any) -> Any:
    return (*outputs[:-1], outputs[-1][:, :1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (drops_the_last, r"a compiled graph returned \d+ values in place of \d+: the inner compiler"),
        (only_the_first, r"a compiled graph returned a Tensor in place of \d+ values"),
        (halves_the_first, r"a compiled graph returned \(torch.float16, .* for an output of \(torch.float32"),
        (halves_the_last, r"a compiled graph returned \(torch.float16, .* for a \w+ cache of \(torch.float32"),
        (cuts_the_last, r"a compiled graph returned \(torch.float32, .* for a \w+ cache of \(torch.float32"),
    ],
)
def test_a_compiler_whose_graph_returns_something_else_once_is_blamed(wrong: Any, message: str) -> None:
    ran: list[int] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            outputs = gm.forward(*args)
            return wrong(outputs) if len(ran) == 1 else outputs

        return run

    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner=inner, step_invariants=False) as pab:
        with pytest.raises(RuntimeError, match=message):
            steps(model, TIMESTEPS)
        assert same(steps(model, TIMESTEPS), oracle())
        assert pab.report().reused > 0


def test_errors_that_dynamo_is_told_to_suppress_leave_the_model_as_it_is() -> None:
    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise RuntimeError("no kernel for this")

    with torch._dynamo.config.patch(suppress_errors=True):
        compiled = torch.compile(ENTRY.build(), backend=PABBackend(CONFIG, inner=inner))
        assert same(steps(compiled, TIMESTEPS), plain())
        torch.compiler.reset()
        once = Failing(RuntimeError("no kernel for this"), compilation=1)  # then what the model calls is compiled
        compiled = torch.compile(ENTRY.build(), backend=PABBackend(CONFIG, inner=once))
        assert same(steps(compiled, TIMESTEPS), oracle())


# --------------------------------------------------------------------------------------------- Dynamo


@lowerings
def test_a_reset_of_dynamo_in_the_middle_begins_a_generation(lowering: str) -> None:
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner="eager", lowering=lowering) as pab:
        found = steps(model, TIMESTEPS[:4])
        torch.compiler.reset()
        found += steps(model, TIMESTEPS[4:])
        assert pab.report().reused > 0
    assert same(found, oracle(TIMESTEPS[:4]) + oracle(TIMESTEPS[4:]))


@lowerings
def test_steps_that_run_eagerly_by_a_stance_are_plain_and_those_after_begin_anew(lowering: str) -> None:
    model = ENTRY.build()
    with (
        pab_fx.enable(model, CONFIG, inner="eager", lowering=lowering),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that it runs without broadcasting
        found = steps(model, TIMESTEPS[:3])
        with torch.compiler.set_stance("force_eager"):
            found += steps(model, TIMESTEPS[3:4])
        found += steps(model, TIMESTEPS[4:])
    assert same(found, oracle(TIMESTEPS[:3]) + plain(TIMESTEPS[3:4]) + oracle(TIMESTEPS[4:]))


@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile"])
def test_a_compiled_generation_needs_no_recompilation_that_a_stance_forbids(stance: str) -> None:
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner="eager") as pab:
        steps(model, TIMESTEPS[:1])
        pab.reset()
        with torch.compiler.set_stance(stance):
            assert same(steps(model, TIMESTEPS), oracle())
        assert pab.report().reused > 0


# ----------------------------------------------------------------------------------------- processes

SCRIPT = """
import sys, time, torch, pab_fx, zoo
from torch._dynamo.utils import counters
from pab_fx import PABConfig

config = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4)
entry = zoo.BY_NAME["WanTransformer3DModel"].of_one_block()
model = entry.build()
pab = pab_fx.enable(model, config, lowering=sys.argv[1])
print("started", flush=True)
outputs = [zoo.call(entry, model, t, int(t))[0].clone() for t in (900, 700, 600, 500)]
assert pab.report().reused > 0
torch.save(outputs, sys.argv[2])
print("hits", counters["inductor"]["fxgraph_cache_hit"], flush=True)
"""


def process(folder: Path, lowering: str) -> "subprocess.Popen[str]":
    here = Path(__file__).parent
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths}
    command = [sys.executable, str(script), lowering, str(folder / "outputs.pt")]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(folder: Path, lowering: str) -> tuple[list[Tensor], int]:
    """The outputs of a process, and how many graphs it found in Inductor's cache on disk."""
    running = process(folder, lowering)
    output, errors = running.communicate(timeout=600)
    assert running.returncode == 0, errors
    outputs: list[Tensor] = torch.load(folder / "outputs.pt")
    return outputs, int(output.rpartition("hits ")[2])


@pytest.mark.slow
@lowerings
def test_graphs_from_the_cache_of_another_process_are_right(tmp_path: Path, lowering: str) -> None:
    """Of a graph with conditions Inductor (2.13) keeps the kernels only: `torch.cond` is not cacheable."""
    first, hits = finished(tmp_path, lowering)
    second, later_hits = finished(tmp_path, lowering)
    assert (hits, later_hits > 0) == (0, lowering == "specialize")
    assert same(first, second)
    for left, right in zip(first, oracle((900, 700, 600, 500)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)  # as Inductor's kernels round


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 8])
def test_a_process_killed_while_it_compiles_leaves_a_cache_that_serves_the_next_one(
    tmp_path: Path, seconds: float
) -> None:
    running = process(tmp_path, "specialize")
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    time.sleep(seconds)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    outputs, _ = finished(tmp_path, "specialize")
    for left, right in zip(outputs, oracle((900, 700, 600, 500)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)  # as Inductor's kernels round
