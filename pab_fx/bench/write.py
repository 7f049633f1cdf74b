"""Show a result and write it to files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .chart import check_chart, save_chart
from .results import BenchResult, caption_of, markdown_of, tables_of


def check_paths(chart: Path | None, tables: Path | None) -> None:
    """Refuse files that could not be written, before anything runs.

    Raises:
        ValueError: for a folder that is not there, or as `check_chart`.
    """
    if tables is not None and not tables.absolute().parent.is_dir():
        raise ValueError(f"cannot write {tables}: there is no folder {tables.parent}.")
    if chart is not None:
        check_chart(chart)


def show(result: BenchResult, console: Console) -> None:
    """Print the tables."""
    for model in result.models:
        console.print(f"{caption_of(model)}.", highlight=False)
        for table in tables_of(model):
            console.print(table)
        for note in model.notes:
            console.print(f"{note}.", highlight=False)


def write(result: BenchResult, chart: Path | None, tables: Path | None) -> None:
    """Write the chart, and the tables in Markdown, each where there is a path for it."""
    if chart is not None:
        save_chart(result, chart)
    if tables is not None:
        tables.write_text(markdown_of(result))
