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

    from ..calibrate import Calibration, Outcome


def calibrate(
    budget: Annotated[
        str,
        typer.Argument(
            help="'psnr>=42' (dB), 'relative_l2<=0.05', or both with a comma between; or 'speedup>=3'; or a setting to "
            "be no worse than: a preset's name, or a JSON file as PABConfig.save or save_policies writes it."
        ),
    ],
    pipeline: Annotated[str, typer.Option(help="demo or pictures, or a pipeline's folder or name.")] = "demo",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt on each line. Default, for the demo: captions of its.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="How many of the prompts. Default: 16 captions, or all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's own.")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another argument of the pipeline's call, in JSON; repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in one generation.")] = 1,
    seed: Annotated[int, typer.Option(help="The i-th prompt starts from the noise of seed + i.")] = 0,
    effort: Annotated[
        str, typer.Option(help="low, medium or high: at most 15, 40 or 150 generations of each prompt.")
    ] = "medium",
    parts: Annotated[str, typer.Option(help="Of what is chosen.")] = "attentions,blocks,model",
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="SETTING", help="Another setting to show beside it, as for a budget; repeatable."),
    ] = None,
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
    """Find what to reuse, how to read it and in which steps: as fast as an error budget allows.

    Generates each prompt without a cache, and with the most promising settings. Half of the prompts are held out of
    the search, and decide. Writes policies.json (for pab_fx.load_policies), front.png, changes.png and roles.png into
    the folder. What is finished is kept there: the same command goes on after an interruption, and another budget
    takes only what it needs.
    """
    from .. import calibrate as calibrated
    from ..demo import one_thread
    from ..explain.subject import config_by

    console = console_for(json)
    with _resumable(folder), refused(), one_thread() if pipeline in ("demo", "pictures") else contextlib.nullcontext():
        check_file(json)
        limit, others = _limit_of(budget), {each: config_by(each) for each in compare or ()}
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
            effort=effort,
            parts=[part.strip() for part in parts.split(",")],
            compare=others,
            rounds=rounds,
            inner=inner,
            console=console,
        )
    console.print(_table_of(found))
    for policy in found.policies:
        console.print(f"{type(policy.where).__name__}: {policy.describe()}", soft_wrap=True)
    kept = "by count of operations" if found.budget.speedup else f"with {margin:g} standard errors in reserve"
    console.print(f"budget: {found.budget}, kept {kept}")
    console.print(f"The setting, for pab_fx.load_policies: {found.folder / 'policies.json'}", soft_wrap=True)
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
    from ..policy.presets import PUBLISHED

    is_setting = budget in PRESETS or budget in PUBLISHED or budget.endswith(".json")
    return config_by(budget) if is_setting else Budget.of(budget)


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
        from ..demo import clips, pictures

        known = {"demo": clips.CAPTIONS, "pictures": pictures.CAPTIONS}.get(pipeline)
        if known is None:
            raise ValueError("--prompts is missing: a file with a prompt on each line, of the kind that is to be used.")
        return [str(caption) for caption in random.Random(seed).sample(known, min(count or 16, len(known)))]
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in lines if line][:count]
    if not texts:
        raise ValueError(f"{path} holds no prompt: write one on each line.")
    return texts


def _loaded(pipeline: str, device: str | None, dtype: str | None) -> Any:
    """The pipeline.

    Raises:
        ValueError: for a dtype that torch has not, or a device that is not there.
        OSError: as diffusers, if there is no such pipeline.
    """
    import torch
    from diffusers import DiffusionPipeline

    from ..demo import load_pipeline

    found = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype {dtype!r} is none of torch's: float32, bfloat16 or float16.")
    options = {} if found is None else {"torch_dtype": found}
    own = {"demo": "clips", "pictures": "pictures"}.get(pipeline)
    pipe = load_pipeline(own, **options) if own else DiffusionPipeline.from_pretrained(pipeline, **options)
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe if device is None else pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # an assertion is what a torch without CUDA raises
        raise ValueError(f"--device {device!r} cannot be used here: {error}") from None


def _table_of(found: Calibration) -> Table:
    """The proposal on both halves of the prompts, beside what it was compared with."""
    from rich.table import Column, Table

    heads = ("PSNR, dB", "relative L2", "operations left", "speed-up by operations", "measured")
    title = f"means over prompts, {len(found.proposal.differences)} of them held out of the search"
    table = Table("", *(Column(head, justify="right") for head in heads), title=title, title_justify="left")
    rows: list[tuple[str, Outcome, str, str | None]] = [(each.label, each, "", None) for each in found.compared]
    measured = "" if found.measured_speedup is None else f"{found.measured_speedup:.2f}x"
    rows.append(("proposal, prompts searched with", found.searched, "", None))
    rows.append(("proposal, prompts held out", found.proposal, measured, "bold"))
    for label, outcome, time, style in rows:
        table.add_row(
            label,
            f"{outcome.psnr(found.peak):.2f}",
            f"{outcome.relative_l2:.4f}",
            f"{outcome.operations:.3f}",
            f"{outcome.speedup:.2f}x",
            time,
            style=style,
        )
    return table
