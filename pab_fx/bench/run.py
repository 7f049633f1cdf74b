"""Run the benchmark: model by model, all columns in turns, the one that spoils the others at the end."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch.nn.functional import scaled_dot_product_attention

from ..diffusers.configs import ranges_of
from ..policy.when import SkipRange
from ._torch import default_recompile_limit, recompile_limit
from .contenders import HOOKS_AND_COMPILE, CountingCompiler, Plan, Setting
from .measure import Clock, Trajectory
from .models import BenchModel, diffusers_config, model_of, timesteps_of
from .race import Race, Say
from .results import BenchResult, ColumnResult, ModelResult, machine_of, versions
from .settings import Settings

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far outputs that are equal but for rounding may be from each other, by the dtype of the weights.

Three times the distance of `compile` from eager, where that is more: depth and width decide it too.
"""


def run_bench(settings: Settings, say: Say = lambda text: None) -> BenchResult:
    """Time all models of the settings, one after the other.

    In a process of its own call `keep_freed_memory()` first, as the command does.

    Args:
        settings: what to run.
        say: is told what happens.

    Raises:
        BenchError: if outputs are not the hooks', or something else is reused than the schedule says.
    """
    device = torch.device(settings.device)
    results = []
    for name in settings.models:
        results.append(run_model(model_of(name, settings.size), settings, partial(_say_of, say, name)))
        gc.collect()  # models hold each other in cycles, and the next one needs their memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return BenchResult(settings.command, machine_of(device), versions(), tuple(results))


def _say_of(say: Say, name: str, text: str) -> None:
    say(f"{name}: {text}")


def run_model(model: BenchModel, settings: Settings, say: Say) -> ModelResult:
    """Time one model.

    Raises:
        BenchError: as `run_bench`.
        ValueError: if the config reuses nothing in this model in so many steps.
    """
    torch.compiler.reset()
    device, clock = torch.device(settings.device), Clock()
    say("building")
    network = model.build(device)
    timesteps = timesteps_of(settings.steps or model.steps)
    config = diffusers_config(settings.pab or model.pab, clock)
    plan = Plan.of(network, config, timesteps)
    if not plan.reused:
        raise ValueError(f"{model.name}: the config reuses nothing in {len(timesteps)} steps.")
    inputs = model.inputs(timesteps, device)
    setting = Setting(network, config, timesteps, plan, inputs, settings.inner, settings.tell_timesteps)
    trajectory = Trajectory(timesteps, inputs, clock, device)
    warm_up(settings.inner, device)
    race = Race(setting, trajectory, settings, TOLERANCES[model.dtype], say)
    columns = [*run_alike(race), *run_hooks_and_compile(race)]
    return ModelResult(
        model=model.name,
        title=model.title,
        cls=type(network).__name__,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        steps=len(timesteps),
        broadcast=describe(config, plan),
        kinds=dict(Counter(plan.kinds)),
        columns=tuple(columns),
        tolerance=race.tolerance,
        notes=tuple(race.notes),
    )


def run_alike(race: Race) -> list[ColumnResult]:
    """All columns but the last. Dynamo counts what they compile together; the limit is not what is measured here."""
    columns = [column for column in race.settings.columns if column != HOOKS_AND_COMPILE]
    with recompile_limit(64):
        race.enter(columns)
        race.take_turns(columns)
    columns = [column for column in columns if column in race.entrants]
    compiled, bound = (race.seconds(column) for column in ("compile", "lower bound"))
    return [race.result(column, compiled, bound) for column in columns]


def run_hooks_and_compile(race: Race) -> list[ColumnResult]:
    """Hooks under `torch.compile`, in turns with `compile` alone, which runs on as it was compiled.

    The limit is Dynamo's own, on top of what the others have compiled: these hooks have it for themselves.
    """
    if HOOKS_AND_COMPILE not in race.settings.columns:
        return []
    both = [column for column in ("compile",) if column in race.entrants] + [HOOKS_AND_COMPILE]
    with recompile_limit(default_recompile_limit() + sum(each.captures for each in race.entrants.values())):
        race.enter([HOOKS_AND_COMPILE])
        race.take_turns(both)
    if HOOKS_AND_COMPILE not in race.entrants:
        return []
    return [race.result(HOOKS_AND_COMPILE, race.seconds("compile"), ())]


def warm_up(inner: str, device: torch.device) -> None:
    """Compile something small: what the first compilation of a process does once is no contender's cold start."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(scaled_dot_product_attention(x, x, x).sin(), (8,))

    with torch.no_grad():
        torch.compile(attention, backend=CountingCompiler(inner))(torch.ones(1, 2, 4, 8, device=device))


def describe(config: PyramidAttentionBroadcastConfig, plan: Plan) -> str:
    """What a config broadcasts in a model, for people."""
    windows = {role: getattr(config, f"{role}_attention_timestep_skip_range") for role in plan.reuses}
    rules = {role: SkipRange(ranges_of(config)[role], *window) for role, window in windows.items()}
    return ", ".join(f"{role} {rule.describe().removeprefix('computed ')}" for role, rule in rules.items())
