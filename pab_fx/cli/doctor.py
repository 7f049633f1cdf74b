"""`pab-fx doctor`: does it work here, and what would be broadcast of a model?"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from .common import Json, check_file, console_for, refused, write_json

if TYPE_CHECKING:
    from ..explain.subject import Subject

MARKS = {True: ("ok  ", "green"), False: ("FAIL", "bold red"), None: ("-   ", "dim")}


def doctor(
    name: Annotated[
        str | None,
        typer.Argument(help="demo, cogvideox, latte, flux, wan, or a pipeline's folder: what is broadcast of it."),
    ] = None,
    inner: Annotated[str, typer.Option(help="The compiler to try: inductor, eager, ...")] = "inductor",
    json: Json = None,
) -> None:
    """Check versions, devices and compilers, and a short generation against diffusers' hooks.

    Takes half a minute, and ends with code 1 if something fails.
    """
    from ..doctor import checks
    from ..explain.subject import subject_of

    console = console_for(json)
    with refused():
        check_file(json)
        subject = None if name is None else subject_of(name)
        done = []
        with console.status("looking around") as status:
            for check in checks(inner):
                done.append(check)
                mark, colour = MARKS[check.ok]
                line = Text.assemble((mark, colour), "  ", (f"{check.name:<20}", "bold"), check.found)
                console.print(line, soft_wrap=True)
                status.update(f"after {check.name}")
        found = {} if name is None or subject is None else _of_model(name, subject, console)
    failed = sum(check.ok is False for check in done)
    console.print(f"[bold red]{failed} of the checks failed" if failed else "[green]all is well", highlight=False)
    write_json(json, {"ok": not failed, "checks": list(map(asdict, done)), **found})
    raise typer.Exit(1 if failed else 0)


def _of_model(name: str, subject: Subject, console: Console) -> dict[str, object]:
    """Show what a config with a range for every role would broadcast of a model, and return it for JSON."""
    from ..explain import explain
    from ..policy.config import PABConfig
    from ..report.groups import grouped

    ranges = PABConfig(2, 2, 2, current_timestep_callback=subject.config.current_timestep_callback)
    with console.status(f"capturing {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = explain(subject.model, subject.kwargs, ranges, rounds=0)
    groups = grouped(report.regions)
    if not groups:
        console.print(f"{name}: no attention was found in it")
    for group in groups:
        mark, colour = MARKS[group.left_alone is None]
        said = f"{group.first.role}: {group.why}" if group.left_alone is None else f"left alone: {group.left_alone}"
        count = f" x {len(group.regions)}" if len(group.regions) > 1 else ""
        line = Text.assemble((mark, colour), "  ", (f"{group.name}{count}  ", "bold"), said)
        console.print(line, soft_wrap=True)
    return {"model": name, "regions": report.as_json()["regions"]}
