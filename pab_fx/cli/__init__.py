"""The command line: `pab-fx`, or `python -m pab_fx`; a file for each command."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .doctor import doctor
from .explain import explain

app = typer.Typer(
    help="Step caches of diffusion transformers, as a torch.compile graph transformation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, explain, calibrate, doctor, bench):
    app.command()(command)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pab-fx {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Step caches of diffusion transformers, as a torch.compile graph transformation."""


def main() -> None:
    """Entry point of the console script."""
    app()
