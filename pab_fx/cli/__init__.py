"""The command line: `pab-fx`, or `python -m pab_fx`; a file for each command."""

from __future__ import annotations

import typer

from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .doctor import doctor
from .explain import explain

app = typer.Typer(
    help="Pyramid Attention Broadcast as a torch.compile graph transformation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, explain, calibrate, doctor, bench):
    app.command()(command)


@app.callback()
def _commands() -> None:
    """Pyramid Attention Broadcast as a torch.compile graph transformation."""


def main() -> None:
    """Entry point of the console script."""
    app()
