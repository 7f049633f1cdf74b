"""What the commands share: where JSON goes, how errors end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output.")
]


def console_for(path: Path | None) -> Console:
    """Where a command prints for people: standard error, where standard output is for JSON."""
    return Console(stderr=is_output(path))


def is_output(path: Path | None) -> bool:
    """Whether JSON goes to standard output."""
    return path is not None and str(path) == "-"


def check_file(path: Path | None, kind: str = "", *suffixes: str) -> None:
    """Refuse a file that could not be written in the end, before anything runs.

    Raises:
        ValueError: for a folder that is not there, or another suffix than those there are of a kind.
    """
    if path is None or is_output(path):
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: {kind} is a {', '.join(suffixes[:-1])} or {suffixes[-1]} file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}.")


def write_json(path: Path | None, result: Any) -> None:
    """Write what a command found, if there is a path for it."""
    if path is None:
        return
    text = json.dumps(result, indent=1) + "\n"
    if is_output(path):
        typer.echo(text, nl=False)
    else:
        path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """End with an error for people to read: exit code 2 for what was asked, 1 for what went wrong."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        missing = getattr(error, "filename", None) if isinstance(error, FileNotFoundError) else None
        said = str(error) if missing is None else f"there is no {missing}."
        Console(stderr=True).print(f"[red]error:[/red] {escape(said)}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ValueError) or missing is not None else 1) from None
