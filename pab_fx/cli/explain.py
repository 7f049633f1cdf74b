"""`pab-fx explain`: what is broadcast of a model, why, when, and what that saves."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, check_file, console_for, is_output, refused, write_json


def explain(
    name: Annotated[
        str,
        typer.Argument(help="demo; cogvideox, latte, flux or wan, as pab-fx bench has them; or a pipeline's folder."),
    ] = "demo",
    config: Annotated[
        str | None,
        typer.Option(
            help="cogvideox, latte, open-sora; a JSON file as PABConfig.save writes it; or like "
            "spatial=2,cross=6 (also window=100:800). Default: the model's own, for a folder spatial=2."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of a generation.")] = 20,
    rounds: Annotated[int, typer.Option(min=0, help="How often the step is timed; 0 for no times.")] = 3,
    graph: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the graph before and after.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, with the drawing in it.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write Markdown; - is standard output.")] = None,
    json: Json = None,
) -> None:
    """Show what is broadcast of a model: which attentions, why, when, and what a reusing step is spared.

    The model runs one step, uncompiled, a few times. Nothing is downloaded.
    """
    from ..explain import explain as explained
    from ..explain.subject import config_by, subject_of
    from ..policy.config import PABConfig

    with refused():
        for path in (graph, html, markdown, json):
            check_file(path)
        if is_output(markdown) and is_output(json):
            raise ValueError("--markdown - and --json - would both go to standard output: give one of them a file.")
        console = console_for(markdown if is_output(markdown) else json)
        wanted = None if config is None else config_by(config)
        with console.status(f"loading {name}"):
            subject = subject_of(name, steps)
        wanted = subject.config if wanted is None else wanted
        if isinstance(wanted, PABConfig):
            told = subject.config.current_timestep_callback
            wanted = dataclasses.replace(wanted, current_timestep_callback=told)
        with console.status(f"running a step of {name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report has them
            report = explained(subject.model, subject.kwargs, wanted, steps=steps, rounds=rounds)
        for path, text in ((graph, report.svg), (html, report.html), (markdown, report.markdown)):
            if path is not None and is_output(path):
                typer.echo(text(), nl=False)
            elif path is not None:
                path.write_text(text(), encoding="utf-8")
    console.print(report if console.is_terminal else str(report), soft_wrap=not console.is_terminal, markup=False)
    write_json(json, report.as_json())
