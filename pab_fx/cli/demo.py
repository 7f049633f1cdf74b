"""`pab-fx demo`: the same clips without and with PAB."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, check_file, console_for, refused, write_json


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The animation: a .gif or .mp4 file.")] = Path(
        "pab_demo.gif"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a generation.")] = 50,
    clips: Annotated[int, typer.Option(min=1, max=96, help="How many clips, in one batch.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Measured generations of each kind.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the captions and the noise.")] = 0,
    inner: Annotated[str, typer.Option(help="Compiler under both: eager, inductor, ...")] = "eager",
    lowering: Annotated[str, typer.Option(help="specialize or cond.")] = "specialize",
    json: Json = None,
) -> None:
    """Generate the same clips without and with PAB with a small trained video model, and compare them."""
    from ..demo.run import run_demo, save_animation, table_of

    console = console_for(json)
    with refused():
        check_file(output, "the animation", ".gif", ".mp4")
        if output.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
            raise ValueError(f"cannot write {output}: pip install imageio-ffmpeg, or write a .gif.")
        check_file(json)
        result = run_demo(steps, clips, rounds, seed, inner, lowering, console)
        save_animation(result, output)
    console.print(table_of(result))
    console.print(f"The clips, side by side: {output}", soft_wrap=True)
    write_json(json, result.as_json())
