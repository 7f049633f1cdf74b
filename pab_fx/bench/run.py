"""Run the benchmark: model by model, all columns in turns."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from ._torch import quiet_recompile_limit
from .apart import CountingCompiler, Inner
from .caches import CACHES, Plan
from .contenders import Setting, does_the_same
from .measure import Clock, Trajectory
from .models import BenchModel, model_of, timesteps_of
from .race import Race, Say
from .results import BenchResult, ModelResult, machine_of, versions
from .settings import Settings
from .timing import timing_of

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far outputs that are equal but for rounding may be from each other, by the dtype of the weights.

Three times the distance of `compile` from eager, where that is more: depth and width decide it too.
"""


def run_bench(settings: Settings, say: Say = lambda text: None) -> BenchResult:
    """Time all models of the settings under all of their policies, one after the other.

    In a process of its own call `keep_freed_memory()` first, as the command does.

    Args:
        settings: what to run.
        say: is told what happens.

    Raises:
        BenchError: if outputs are not the reference's, or something else is reused than the schedule says.
    """
    device = torch.device(settings.device)
    results = []
    for name, policy in itertools.product(settings.models, settings.policies):
        said = partial(_say_of, say, f"{name}, {policy}")
        results.append(run_model(model_of(name, settings.size), policy, settings, said))
        gc.collect()  # models hold each other in cycles, and the next one needs their memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return BenchResult(settings.command, machine_of(device), versions(), tuple(results))


def _say_of(say: Say, name: str, text: str) -> None:
    say(f"{name}: {text}")


def run_model(model: BenchModel, policy: str, settings: Settings, say: Say) -> ModelResult:
    """Time one model under one step cache, which is a name of `CACHES`.

    Raises:
        BenchError: as `run_bench`.
        ValueError: if the policy reuses nothing in this model in so many steps.
    """
    torch.compiler.reset()
    device, clock = torch.device(settings.device), Clock()
    say("building")
    network = model.build(device)
    steps = settings.steps or model.steps
    cache = CACHES[policy](model, settings.pab, steps, clock)
    timesteps = timesteps_of(steps, cache.spacing)
    plan = Plan.of(network, cache.config, timesteps)
    if not any(plan.reused):
        raise ValueError(f"{model.name}: the policy reuses nothing in {steps} steps.")
    inputs = model.inputs(timesteps, device)
    setting = Setting(network, cache, timesteps, plan, inputs, settings.compiler, settings.tell_timesteps)
    trajectory = Trajectory(timesteps, inputs, clock, timing_of(device))
    warm_up(settings.compiler, device)
    race = Race(setting, trajectory, settings, TOLERANCES[model.dtype], say)
    columns = [column for column in settings.columns if does_the_same(column, cache)]
    with quiet_recompile_limit():
        race.enter(columns)
        race.take_turns(columns)
    return ModelResult(
        model=model.name,
        title=model.title,
        cls=type(network).__name__,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        steps=steps,
        policy=policy,
        broadcast=plan.said,
        kinds=dict(Counter(plan.kinds)),
        columns=tuple(race.result(column) for column in columns if column in race.entrants),
        tolerance=race.tolerance,
        notes=tuple(race.notes),
        failed=tuple(race.failed),
    )


def warm_up(inner: Inner, device: torch.device) -> None:
    """Compile something small: what the first compilation of a process does once is no contender's cold start."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(scaled_dot_product_attention(x, x, x).sin(), (8,))

    with torch.no_grad():
        torch.compile(attention, backend=CountingCompiler(inner))(torch.ones(1, 2, 4, 8, device=device))
