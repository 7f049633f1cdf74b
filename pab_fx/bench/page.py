"""Results that are kept in a file, from as many runs as it took, and the page that shows all of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..report.marked import table
from .caches import CACHES
from .contenders import CACHE_DIT_AND_COMPILE, HOOKS_AND_COMPILE
from .measure import Spread
from .models import NAMES
from .results import BenchResult, ModelResult, result_of, with_spread

OTHERS = ("eager", "hooks", "cache-dit", HOOKS_AND_COMPILE, CACHE_DIT_AND_COMPILE)
OURS = ("pab_fx specialize", "pab_fx cond", "regional")
BOUND = "lower bound"
TOO_FAR = 1.02
"""Of the lower bound: what is further from it is said below the table."""


def kept(path: Path) -> tuple[BenchResult, ...]:
    """The runs of a file, none if it is not there.

    Raises:
        ValueError: if it holds something else.
    """
    if not path.exists():
        return ()
    try:
        return tuple(result_of(run) for run in json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold results of pab-fx bench: {error}.") from error


def keep(path: Path, runs: Sequence[BenchResult]) -> None:
    """Write runs to a file, in lines of one column each."""
    lines = json.dumps([run.as_json() for run in runs])
    path.write_text(
        lines.replace('{"column"', '\n{"column"').replace('{"model"', '\n{"model"') + "\n", encoding="utf-8"
    )


def joined(runs: Sequence[BenchResult], new: BenchResult) -> tuple[BenchResult, ...]:
    """All runs, where models and policies of the new one replace those of earlier ones."""
    measured = {_key(model) for model in new.models}
    left = (
        dataclasses.replace(run, models=tuple(model for model in run.models if _key(model) not in measured))
        for run in runs
    )
    return (*(run for run in left if run.models), new)


def _key(model: ModelResult) -> tuple[str, str]:
    return model.title, model.policy


def ordered(runs: Sequence[BenchResult]) -> list[ModelResult]:
    """What all runs measured, by policy and model as the command lists them."""
    policies = list(CACHES)
    models = itertools.chain.from_iterable(run.models for run in runs)
    return sorted(models, key=lambda each: (policies.index(each.policy), NAMES.index(each.model)))


def page_of(runs: Sequence[BenchResult]) -> str:
    """The part of the page that is written by the command: for each machine, two tables, and what is slower."""
    machines = itertools.groupby(sorted(runs, key=_machine), _machine)
    return "\n\n".join(itertools.chain.from_iterable(_section(name, list(of)) for name, of in machines))


def _machine(run: BenchResult) -> str:
    return f"{run.machine}; {', '.join(f'{name} {version}' for name, version in run.versions.items())}"


def _section(machine: str, runs: Sequence[BenchResult]) -> Iterator[str]:
    models = ordered(runs)
    yield f"{machine}."
    yield _speeds(models)
    yield "\n".join(["Slower than another, or more than 2 % over the bound:", "", *_slower(models)])
    yield _starts(models)
    yield "\n".join(["The commands:", "", *dict.fromkeys(f"- `{run.command}`" for run in runs)])


def _speeds(models: Sequence[ModelResult]) -> str:
    """How many times faster than `compile` each column is."""
    names = [name for name in (*OTHERS, *OURS, BOUND) if any(model.column(name) for model in models)]
    rows = []
    for model in models:
        ours = model.column(OURS[0])
        of_bound = ours.of_bound if ours else None
        rows.append([*_named(model), *(_speed(model, name) for name in names), with_spread(of_bound, 3)])
    return table(["policy", "model", "computing", *names, "specialize, of the bound"], rows)


def _named(model: ModelResult) -> list[str]:
    partly = model.kinds.get("partly", 0)
    said = f"{model.kinds.get('computing', 0)}{f' + {partly} partly' if partly else ''} of {model.steps}"
    return [model.policy, model.model, said]


def _speed(model: ModelResult, name: str) -> str:
    column = model.column(name)
    if column is None or column.speedup is None:
        return ""
    return with_spread(column.speedup, 2) if name == OURS[0] else f"{column.speedup.median:.2f}"


def _slower(models: Sequence[ModelResult]) -> list[str]:
    """What an engineer would hold against this package, in the words of the tables."""
    found = [
        f"- `{model.policy}`, {model.model}, {column.column}: {what}"
        for model in models
        for column in model.columns
        if column.column in OURS
        for what in _held_against(column.over_hooks, column.over_cache_dit, column.of_bound)
    ]
    return found or ["- nothing"]


def _held_against(hooks: Spread | None, cache_dit: Spread | None, of_bound: Spread | None) -> Iterator[str]:
    for other, spread in ((HOOKS_AND_COMPILE, hooks), (CACHE_DIT_AND_COMPILE, cache_dit)):
        if spread is not None and spread.median < 1:
            yield f"{with_spread(spread, 2)} of the speed of {other}"
    if of_bound is not None and of_bound.median > TOO_FAR:
        yield f"{with_spread(of_bound, 3)} of the bound"


def _starts(models: Sequence[ModelResult]) -> str:
    """Cold starts, as multiples of `compile`'s, and the graphs that Dynamo captured and broke off."""
    names = [name for name in (*OURS, HOOKS_AND_COMPILE, CACHE_DIT_AND_COMPILE) if any(m.column(name) for m in models)]
    rows = []
    for model in models:
        compiled = model.column("compile")
        if compiled is None or not compiled.cold_start:
            continue
        rows.append([*_named(model)[:2], f"{compiled.cold_start:.1f}"])
        for name in names:
            column = model.column(name)
            is_there = column is not None and column.cold_start is not None
            rows[-1].append(
                f"{column.cold_start / compiled.cold_start:.2f}; {column.captures}; {column.breaks}" if is_there else ""  # type: ignore[union-attr, operator]
            )
    return table(["policy", "model", "compile, s", *names], rows)
