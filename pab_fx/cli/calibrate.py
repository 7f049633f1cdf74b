"""`pab-fx calibrate`: the setting that is fastest within an error budget."""

from __future__ import annotations

import contextlib
import json as json_
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, check_file, console_for, refused, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..calibrate import Calibration


def calibrate(
    budget: Annotated[
        str,
        typer.Argument(
            help="'psnr>=35' (dB), 'relative_l2<=0.05', or both with a comma between; or a setting to be no worse "
            "than: cogvideox, latte, open-sora, or a JSON file as PABConfig.save writes it."
        ),
    ],
    pipeline: Annotated[str, typer.Option(help="demo, or a pipeline's folder or name, for diffusers.")] = "demo",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt on each line. Default, for the demo: captions of its.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many of the prompts. Default: 12 captions, or all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's own.")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another argument of the pipeline's call, in JSON; repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in one generation.")] = 1,
    seed: Annotated[int, typer.Option(help="The i-th prompt starts from the noise of seed + i.")] = 0,
    segments: Annotated[int, typer.Option(min=1, help="Stretches of steps between which windows begin and end.")] = 5,
    layer_groups: Annotated[int, typer.Option(min=1, help="Groups of a role's layers with rules of their own.")] = 1,
    tries: Annotated[int, typer.Option(min=1, help="How many settings are generated with at most.")] = 8,
    margin: Annotated[float, typer.Option(min=0, help="Standard errors kept in reserve for other prompts.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=0, help="Timed generations with and without the proposal.")] = 3,
    inner: Annotated[str, typer.Option(help="Compiler while calibrating: eager, inductor, ...")] = "eager",
    device: Annotated[str | None, typer.Option(help="Where the pipeline runs. Default: where it is loaded.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of its weights, such as bfloat16.")] = None,
    folder: Annotated[Path, typer.Option("--folder", "-o", help="Results, and what a later run goes on with.")] = Path(
        "calibration"
    ),
    json: Json = None,
) -> None:
    """Find the ranges and windows that are fastest within an error budget, and write them as a config.

    Generates without PAB, with single roles within single stretches of steps, and with the most promising settings.
    Writes config.json (for PABConfig.load), changes.png, roles.png and pareto.png into the folder. What is finished is
    kept there: the same command goes on after an interruption, and another budget takes only what it needs.
    """
    from .. import calibrate as calibrated
    from ..demo import one_thread

    console = console_for(json)
    with _resumable(folder), refused(), one_thread() if pipeline == "demo" else contextlib.nullcontext():
        check_file(json)
        limit = _limit_of(budget)
        arguments = {**_arguments_of(call or ()), **({} if steps is None else {"num_inference_steps": steps})}
        texts = _prompts_of(prompts, pipeline, count, seed)
        with console.status(f"loading {pipeline}"):
            pipe = _loaded(pipeline, device, dtype)
        found = calibrated(
            pipe,
            texts,
            limit,
            call=arguments,
            folder=folder,
            seed=seed,
            batch=batch,
            margin=margin,
            segments=segments,
            layer_groups=layer_groups,
            tries=tries,
            rounds=rounds,
            inner=inner,
            console=console,
        )
    console.print(_probes_of(found))
    console.print(_table_of(found))
    console.print(f"budget: {found.budget}, kept with {margin:g} standard errors in reserve")
    console.print(f"The setting, for PABConfig.load: {found.folder / 'config.json'}", soft_wrap=True)
    write_json(json, found.as_json())


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say how to go on after an interruption; ends with 130, as a shell counts it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped: what is finished is in {folder}; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


def _limit_of(budget: str) -> Any:
    """A budget, or the setting to be no worse than."""
    from ..calibrate import Budget
    from ..explain.subject import config_by
    from ..policy.config import PRESETS

    return config_by(budget) if budget in PRESETS or budget.endswith(".json") else Budget.of(budget)


def _arguments_of(given: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`height=480` as a number, and so on; what is no JSON is text.

    Raises:
        ValueError: for one without a name or a value.
    """
    arguments: dict[str, Any] = {}
    for each in given:
        name, is_given, value = each.partition("=")
        if not is_given or not name.isidentifier():
            raise ValueError(f"--call {each!r}: write NAME=VALUE, such as height=480.")
        try:
            arguments[name] = json_.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _prompts_of(path: Path | None, pipeline: str, count: int | None, seed: int) -> list[str]:
    """The lines of a file, or captions of the demo's model.

    Raises:
        ValueError: without a file for another pipeline, or for one without prompts.
        OSError: if it cannot be read.
    """
    if path is None:
        if pipeline != "demo":
            raise ValueError("--prompts is missing: a file with a prompt on each line, of the kind that is to be used.")
        from ..demo import CAPTIONS

        return [str(caption) for caption in random.Random(seed).sample(CAPTIONS, min(count or 12, len(CAPTIONS)))]
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in lines if line][:count]
    if not texts:
        raise ValueError(f"{path} holds no prompt: write one on each line.")
    return texts


def _loaded(pipeline: str, device: str | None, dtype: str | None) -> Any:
    """The pipeline.

    Raises:
        ValueError: for a dtype that torch has not.
        OSError: as diffusers, if there is no such pipeline.
    """
    import torch
    from diffusers import DiffusionPipeline

    from ..demo import load_pipeline

    found = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype {dtype!r} is none of torch's: float32, bfloat16 or float16.")
    options = {} if found is None else {"torch_dtype": found}
    pipe = load_pipeline(**options) if pipeline == "demo" else DiffusionPipeline.from_pretrained(pipeline, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def _probes_of(found: Calibration) -> Table:
    """Where reuse does harm, and what it saves."""
    from rich.table import Column, Table

    title = "PSNR, dB, where one role alone reuses every second step within one window"
    heads = (*(f"{high:g} to {low:g}" for low, high in found.windows), "of a step's time")
    table = Table("", *(Column(head, justify="right") for head in heads), title=title, title_justify="left")
    for label, psnrs in found.probes.items():
        table.add_row(label, *(f"{psnr:.1f}" for psnr in psnrs), f"{found.shares[label]:.0%}")
    return table


def _table_of(found: Calibration) -> Table:
    """The proposal beside what it was compared with."""
    from rich.table import Column, Table

    heads = ("PSNR, dB", "relative L2", "speed-up, predicted", "measured", "graphs")
    title = f"{len(found.proposal.differences)} prompts, means"
    table = Table("", *(Column(head, justify="right") for head in heads), title=title, title_justify="left")
    for outcome in (*found.compared, found.proposal):
        is_proposal = outcome is found.proposal
        table.add_row(
            "proposal" if is_proposal else outcome.label,
            f"{outcome.psnr(found.peak):.2f}",
            f"{outcome.relative_l2:.4f}",
            f"{outcome.speedup:.2f}x",
            f"{found.measured_speedup:.2f}x" if is_proposal and found.measured_speedup is not None else "",
            str(outcome.graphs),
            style="bold" if is_proposal else None,
        )
    return table
