"""`pab-fx bench`: generations under hooks, torch.compile and pab_fx, in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, check_file, console_for, refused, write_json


def bench(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="cogvideox, latte, flux or wan; repeatable. All.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the real sizes in bf16.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Timed generations of each column.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a generation. 20; fewer on cuda.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Which, with commas between, of eager, hooks, cache-dit, compile, compile-regional, specialize, "
            "each-step, cond, regional, bound, cache-dit-compile, both (hooks + compile). All."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="The step cache: pab, blocks, taylorseer, magcache, firstblock, dbcache, dbcache-taylorseer, "
            "easycache; repeatable. PAB."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Of pab: cogvideox, latte, open-sora, or like spatial=2,cross=6 (also window=100:800)."),
    ] = None,
    inner: Annotated[str, typer.Option(help="The compiler of all columns: inductor, eager, ...")] = "inductor",
    mode: Annotated[
        str | None, typer.Option(help="Inductor's: max-autotune-no-cudagraphs, reduce-overhead, ...")
    ] = None,
    plan: Annotated[bool, typer.Option(help="Tell pab_fx the timesteps, as a pipeline's scheduler does.")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Time for a model; what does not fit is left out. 8 on cuda, else no limit.")
    ] = None,
    json: Json = None,
    chart: Annotated[Path | None, typer.Option(help="Write a bar chart: .png, .svg or .pdf.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables in Markdown.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Add to the results in this JSON file; the same models and policies are replaced."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="A Markdown page whose tables show all of --results; a chart beside it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: shows that it runs, and no more.")] = False,
) -> None:
    """Time generations under hooks, cache-dit, torch.compile and pab_fx, in turns, and how near the bound they are."""
    from ..bench.chart import SUFFIXES, save_chart, save_overview
    from ..bench.contenders import is_ours
    from ..bench.heap import keep_freed_memory
    from ..bench.page import joined, keep, kept, ordered, page_of
    from ..bench.results import caption_of, markdown_of, tables_of
    from ..bench.run import run_bench
    from ..bench.settings import Settings, columns_of, config_of
    from ..report import marked

    console = console_for(json)
    with refused():
        check_file(json)
        check_file(markdown)
        check_file(results)
        if page is not None and results is None:
            raise ValueError("--page shows what --results has: give both.")
        if page is not None:
            marked.check(page, "bench")
        earlier = () if results is None else kept(results)
        if chart is not None:
            check_file(chart, "the chart", *SUFFIXES)
        if minutes is None and device == "cuda":
            minutes = 8.0  # real models take long to compile
        settings = Settings(
            models=tuple(dict.fromkeys(model or Settings.models)),
            columns=Settings.columns if columns is None else columns_of(columns),
            device=device,
            size="quick" if quick else device,
            rounds=rounds,
            steps=steps,
            policies=tuple(dict.fromkeys(policy or Settings.policies)),
            pab=None if config is None else config_of(config),
            inner=inner,
            mode=mode,
            tell_timesteps=plan,
            minutes=minutes,
            command=_command_of(context, "json", "chart", "markdown", "results", "page"),
        )
        keep_freed_memory()
        with console.status("") as status:  # which shows nothing but in a terminal
            result = run_bench(settings, status.update if console.is_terminal else _log)
    for measured in result.models:
        console.print(f"{caption_of(measured)}.", highlight=False)
        for table in tables_of(measured):
            console.print(table)
        for note in measured.notes:
            console.print(f"{note}.", highlight=False)
    if chart is not None:
        save_chart(result, chart)
    if markdown is not None:
        markdown.write_text(markdown_of(result))
    write_json(json, result.as_json())
    if results is not None:
        runs = joined(earlier, result)
        keep(results, runs)
        if page is not None:
            marked.update(page, "bench", page_of(runs))
            save_overview(ordered(runs), page.with_suffix(".png"))
    if any(is_ours(column) for measured in result.models for column in measured.failed):
        raise typer.Exit(1)


def _log(text: str) -> None:
    typer.echo(text, err=True)


def _command_of(context: typer.Context, *left_out: str) -> str:
    """The command as it was given, less some options: without them it measures the same."""
    parts = ["python -m pab_fx", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.params.get(name)
        source = context.get_parameter_source(name)
        if name in left_out or source is None or source.name != "COMMANDLINE":
            continue
        for value in given if isinstance(given, (list, tuple)) else [given]:
            option = parameter.opts[0] if value is not False else parameter.secondary_opts[0]
            parts.append(option if isinstance(value, bool) else f"{option} {value}")
    return " ".join(parts)
