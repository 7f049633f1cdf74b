"""What the benchmark reports: plain data, as JSON and as tables."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from rich import box
from rich.table import Column, Table

from ..report.marked import table
from ..report.units import counted
from .measure import Spread

SCHEMA = 1
"""Of the JSON; grows when a field changes its meaning or goes."""


@dataclass(frozen=True)
class ColumnResult:
    """What one contender did.

    Args:
        column: its name.
        seconds: of each round's generation.
        generation: seconds of a generation.
        speedup: over `compile` in the same round; `None` without that column.
        over_hooks: speed-up over "hooks + compile" in the same round; `None` without that column.
        over_cache_dit: speed-up over "cache-dit + compile" in the same round; `None` without that column.
        of_bound: time as a multiple of the lower bound's in the same round; `None` without that column.
        step_seconds: of a step, by what the schedule reuses in it: "computing" (nothing), "partly", "reusing" (all).
        cold_start: seconds of the first generation, with empty caches, less the median one; `None` if nothing compiles.
        captures: graphs that Dynamo captured, over all generations.
        graphs: graphs that the inner compiler was given.
        late_captures: those of `captures` after the first generation.
        breaks: how often Dynamo broke off a graph, over all generations.
        peak_bytes: held at once in a generation, less the weights.
        distance: relative L2 distance of all outputs from those of the hooks, or where none do the same of `pab_fx` run
            eagerly; `None` for the bound, whose outputs mean nothing.
        reused: calls of parts that were answered from a cache in a generation.
    """

    column: str
    seconds: tuple[float, ...]
    generation: Spread
    speedup: Spread | None
    over_hooks: Spread | None
    over_cache_dit: Spread | None
    of_bound: Spread | None
    step_seconds: Mapping[str, float]
    cold_start: float | None
    captures: int
    graphs: int
    late_captures: int
    breaks: int
    peak_bytes: int
    distance: float | None
    reused: int


@dataclass(frozen=True)
class ModelResult:
    """All columns of one model.

    Args:
        model: its name.
        title: what it is, for people.
        cls: its class in diffusers.
        parameters: how many numbers its weights are.
        dtype: of its weights.
        steps: of a generation.
        policy: its name.
        broadcast: what it says, for people.
        kinds: how many steps are "computing", "partly" and "reusing".
        columns: in the order in which they ran.
        tolerance: how far from the reference's outputs was taken for rounding.
        notes: what was left out, and why.
        failed: columns that were left out because they raised an error.
    """

    model: str
    title: str
    cls: str
    parameters: int
    dtype: str
    steps: int
    policy: str
    broadcast: str
    kinds: Mapping[str, int]
    columns: tuple[ColumnResult, ...]
    tolerance: float
    notes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def column(self, name: str) -> ColumnResult | None:
        """A column by its name, `None` if it did not run."""
        return next((each for each in self.columns if each.column == name), None)


@dataclass(frozen=True)
class BenchResult:
    """A run of the benchmark.

    Args:
        command: that was given.
        machine: processor or GPU, and how many cores.
        versions: of what matters.
        models: one after the other.
    """

    command: str
    machine: str
    versions: Mapping[str, str]
    models: tuple[ModelResult, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the version of its form under `schema`."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def result_of(data: Mapping[str, Any]) -> BenchResult:
    """What `BenchResult.as_json` wrote, as it was.

    Raises:
        ValueError: for another version of its form.
    """
    if data.get("schema") != SCHEMA:
        raise ValueError(f"results of schema {data.get('schema')} cannot be read, only those of {SCHEMA}.")
    models = (_model_of(each) for each in data["models"])
    return BenchResult(data["command"], data["machine"], data["versions"], tuple(models))


def _model_of(data: Mapping[str, Any]) -> ModelResult:
    columns = tuple(ColumnResult(**{name: _read(value) for name, value in each.items()}) for each in data["columns"])
    return ModelResult(
        **{**data, "columns": columns} | {name: tuple(data.get(name, ())) for name in ("notes", "failed")}
    )


def _read(value: Any) -> Any:
    """A field of a column: spreads are objects, and lists were tuples."""
    if isinstance(value, Mapping) and set(value) == {each.name for each in dataclasses.fields(Spread)}:
        return Spread(**value)
    return tuple(value) if isinstance(value, list) else value


def machine_of(device: torch.device) -> str:
    """What it runs on.

    Example:
        >>> "thread" in machine_of(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {counted(threads, 'thread')}"


def versions() -> dict[str, str]:
    """Of torch, diffusers and Python, and of cache-dit where it is installed."""
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["cache-dit"] = importlib.metadata.version("cache-dit")
    return found


PARTS = (
    ("generation, s", "over compile", "of the bound"),
    ("over hooks + compile", "over cache-dit + compile", "MiB", "distance"),
    ("computing, ms", "partly, ms", "reusing, ms", "cold start, s", "captured", "breaks", "compiled"),
)
"""Columns of a table, in parts that fit into a terminal."""

NARROW = {
    "over hooks + compile": "over hooks\n+ compile",
    "over cache-dit + compile": "over cache-dit\n+ compile",
    "computing, ms": "comput-\ning, ms",
    "partly, ms": "partly,\nms",
    "reusing, ms": "reusing,\nms",
    "cold start, s": "cold\nstart, s",
    "captured": "cap-\ntured",
    "compiled": "com-\npiled",
    "distance": "dis-\ntance",
}
"""Headers in a terminal."""


def rows_of(result: ModelResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a model's table; what no row says has no column."""
    header = ("", *itertools.chain.from_iterable(PARTS))
    rows = [_row(column) for column in result.columns]
    shown = [i for i, name in enumerate(header) if not name or any(row[i] for row in rows)]
    return tuple(header[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]


def _row(column: ColumnResult) -> tuple[str, ...]:
    steps = [column.step_seconds.get(kind) for kind in ("computing", "partly", "reusing")]
    late = f" ({column.late_captures} late)" if column.late_captures else ""
    return (
        column.column,
        f"{column.generation.median:.2f}",
        with_spread(column.speedup, 2),
        with_spread(column.of_bound, 3),
        with_spread(column.over_hooks, 2),
        with_spread(column.over_cache_dit, 2),
        f"{column.peak_bytes / 2**20:.1f}",
        "" if column.distance is None else f"{column.distance:.0e}",
        *("" if seconds is None else f"{1000 * seconds:.0f}" for seconds in steps),
        "" if column.cold_start is None else f"{column.cold_start:.1f}",
        f"{column.captures}{late}",
        str(column.breaks),
        str(column.graphs),
    )


def with_spread(spread: Spread | None, digits: int) -> str:
    """A median with the lowest and the highest value; "" for none."""
    if spread is None:
        return ""
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def caption_of(result: ModelResult) -> str:
    """What was run, in a sentence."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in result.kinds.items())
    rounds = max((len(column.seconds) for column in result.columns), default=0)
    return (
        f"{result.policy} on {result.title}: {result.parameters / 1e6:.1f} M parameters, {result.dtype}, "
        f"{result.steps} steps ({kinds}), {result.broadcast}; {counted(rounds, 'round')}"
    )


def tables_of(result: ModelResult) -> list[Table]:
    """The table of a model for a terminal, in parts, since a terminal is narrow."""
    header, rows = rows_of(result)
    tables = []
    for part in PARTS:
        shown = [i for i, name in enumerate(header) if name in part]
        heads = (Column(NARROW.get(header[i], header[i]), justify="right", no_wrap=True) for i in shown)
        drawn = Table(Column(min_width=10), *heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for row in rows:
            drawn.add_row(row[0], *(row[i] for i in shown))
        tables.append(drawn)
    return tables


def markdown_of(result: BenchResult) -> str:
    """All tables in Markdown, under the command and the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [f"`{result.command}` on {result.machine}; {versions}."]
    for model in result.models:
        header, rows = rows_of(model)
        parts += [f"{caption_of(model)}.", table(header, rows), *(f"{note}." for note in model.notes)]
    return "\n\n".join(parts) + "\n"
