"""The demo: the same clips without and with PAB, side by side, with what it cost and what it changed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..enable import enable
from ..policy.config import MLPBroadcast, PABConfig
from ..report.data import RoleReport
from ..report.report import Report
from . import CAPTIONS, ClipPipeline, load_pipeline, one_thread

MLP_TIMESTEPS = (720, 640, 560, 480, 400)
"""Where VideoSys keeps Latte's feed-forwards; its scheduler has these very timesteps, ours has neighbours."""

FORECAST_ORDER = 1
"""The nearest of 0, 1 and 2 to no cache, measured on the demo's model with these ranges."""


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Args:
        prompts: the captions.
        frames: clips without PAB, with caches read as they were kept, and with caches read as forecasts; each
            [B, F, H, W, 3] in 0 to 1.
        steps: denoising steps of a generation.
        seconds: of a generation, without PAB and with forecasts; medians over rounds.
        speedup: the first of these divided by the second.
        spread: the lowest and the highest ratio of a round: a busy machine slows the two down unlike.
        psnr: of the clips as kept and as forecast against those without PAB, in dB, mean over clips.
        ssim: the same for SSIM, mean over frames.
        roles: per role, how often it was computed and reused in one generation.
    """

    prompts: tuple[str, ...]
    frames: tuple[np.ndarray, np.ndarray, np.ndarray]
    steps: int
    seconds: tuple[float, float]
    speedup: float
    spread: tuple[float, float]
    psnr: tuple[float, float]
    ssim: tuple[float, float]
    roles: tuple[RoleReport, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it but the frames, as JSON has it."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "frames"}


def _plain(value: Any) -> Any:
    if isinstance(value, RoleReport):
        return {"role": value.role, "modules": value.modules, "computed": value.computed, "reused": value.reused}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def demo_config(timesteps: Sequence[float], forecast_order: int = 0) -> PABConfig:
    """Latte's preset, its feed-forward timesteps moved to the nearest ones of the generation."""
    kept = tuple(min(timesteps, key=lambda t: abs(t - listed)) for listed in MLP_TIMESTEPS)
    mlp = MLPBroadcast(timesteps=kept, blocks=tuple(range(5)), skip_count=2)
    return PABConfig.preset("latte", mlp=mlp, forecast_order=forecast_order)


@one_thread()
def run_demo(
    steps: int = 50,
    clips: int = 4,
    rounds: int = 3,
    seed: int = 0,
    inner: str = "eager",
    lowering: str = "specialize",
    console: Console | None = None,
) -> Result:
    """Generate clips without and with PAB, in turns and on one thread, and compare them; once also with caches as kept.

    Args:
        steps: denoising steps.
        clips: how many clips, generated as one batch.
        rounds: measured generations of each kind, after one that warms up (and compiles).
        seed: of the captions and the noise.
        inner: the compiler under both: "eager" runs the graphs as they are, "inductor" compiles them.
        lowering: as for `PABBackend`.
        console: where progress is shown; a new one by default.

    Raises:
        ValueError: for a number of steps, clips or rounds below 1, or a backend that is not registered.
    """
    for name, value in (("steps", steps), ("clips", clips), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    plain, kept, broadcasting = load_pipeline(), load_pipeline(), load_pipeline()
    for pipe in (plain, kept, broadcasting):
        pipe.set_progress_bar_config(disable=True)
    plain.scheduler.set_timesteps(steps)
    prompts = tuple(str(caption) for caption in random.Random(seed).sample(CAPTIONS, clips))
    config = demo_config([float(t) for t in plain.scheduler.timesteps], FORECAST_ORDER)
    scheduler = broadcasting.scheduler
    enable(kept, replace(config, forecast_order=0), inner="eager", lowering=lowering)
    pab = enable(broadcasting, config, inner=inner, lowering=lowering, timesteps=lambda: scheduler.timesteps)
    if inner != "eager":
        plain.transformer.compile(backend=inner)
    frames: dict[ClipPipeline, np.ndarray] = {}
    seconds: dict[ClipPipeline, list[float]] = {plain: [], broadcasting: []}
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console()) as progress:
        task = progress.add_task("", total=(2 * (rounds + 1) + 1) * steps)
        progress.update(task, description="once as kept")
        frames[kept], _ = _generate(kept, prompts, steps, seed, lambda: progress.advance(task))
        for turn in range(rounds + 1):
            what = f"round {turn} of {rounds}" if turn else "warming up"
            before = pab.report()
            for pipe, kind in ((plain, "without PAB"), (broadcasting, "with PAB")):
                progress.update(task, description=f"{what}, {kind}")
                frames[pipe], took = _generate(pipe, prompts, steps, seed, lambda: progress.advance(task))
                seconds[pipe] += [took] if turn else []
    ratios = [a / b for a, b in zip(seconds[plain], seconds[broadcasting], strict=True)]
    medians = statistics.median(seconds[plain]), statistics.median(seconds[broadcasting])
    compared = [compare(frames[plain], frames[pipe]) for pipe in (kept, broadcasting)]
    return Result(
        prompts=prompts,
        frames=(frames[plain], frames[kept], frames[broadcasting]),
        steps=steps,
        seconds=medians,
        speedup=medians[0] / medians[1],
        spread=(min(ratios), max(ratios)),
        psnr=(compared[0][0], compared[1][0]),
        ssim=(compared[0][1], compared[1][1]),
        roles=_since(before, pab.report()),
    )


def _generate(
    pipe: ClipPipeline, prompts: Sequence[str], steps: int, seed: int, advance: Callable[[], None]
) -> tuple[np.ndarray, float]:
    """Clips [B, F, H, W, 3] in 0 to 1 and the seconds they took."""

    def on_step_end(pipe: ClipPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        advance()
        return tensors

    start = time.perf_counter()
    output: Any = pipe(
        list(prompts),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=on_step_end,
    )
    return np.clip(output.frames, 0, 1), time.perf_counter() - start


def compare(reference: np.ndarray, clips: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (mean over clips) and SSIM (mean over frames) of `clips` against `reference`, [B, F, H, W, 3]."""
    psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(reference, clips, strict=True)]
    ssim = [
        structural_similarity(a, b, data_range=1.0, channel_axis=-1)
        for clip, other in zip(reference, clips, strict=True)
        for a, b in zip(clip, other, strict=True)
    ]
    return float(np.mean(psnr)), float(np.mean(ssim))


def _since(before: Report, after: Report) -> tuple[RoleReport, ...]:
    """The counts of `after` less those of `before`: of the generation between them."""
    counts = {role.role: (role.computed, role.reused) for role in before.roles}
    return tuple(
        replace(role, computed=role.computed - counts[role.role][0], reused=role.reused - counts[role.role][1])
        for role in after.roles
    )


def save_animation(result: Result, path: Path, scale: int = 5, fps: int = 6) -> None:
    """Write the clips side by side, without PAB, as kept and as forecast, as GIF or MP4 by the path's suffix."""
    pictures = [_picture(result, frame, scale) for frame in range(result.frames[0].shape[1])]
    if path.suffix.lower() == ".gif":
        imageio.imwrite(path, pictures, duration=1000 / fps, loop=0)
    else:
        imageio.imwrite(path, np.stack(pictures * 4), fps=fps, plugin="FFMPEG")


def _picture(result: Result, frame: int, scale: int) -> np.ndarray:
    """One frame of the animation, [H, W, 3] uint8: three clips a caption, two captions a row, the caption above."""
    size, gap, text = result.frames[0].shape[2] * scale, 8, 18
    group, per_row = 3 * size + 4 * gap, min(2, len(result.prompts))
    rows = -(-len(result.prompts) // per_row)
    sheet = Image.new("RGB", (per_row * group, text + rows * (size + text + gap)), (24, 24, 28))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    heads = (
        "without PAB",
        *(f"{how}, {psnr:.1f} dB" for how, psnr in zip(("as kept", "forecast"), result.psnr, strict=True)),
    )
    for i, prompt in enumerate(result.prompts):
        left, top = gap + i % per_row * group, text + i // per_row * (size + text + gap)
        pen.text((left, top + 1), prompt, fill=(190, 190, 200), font=font)
        for clips, head in zip(result.frames, heads, strict=True):
            if i < per_row:
                pen.text((left, 2), head, fill=(255, 255, 255), font=font)
            pixels = Image.fromarray((clips[i][frame] * 255).round().astype(np.uint8))
            sheet.paste(pixels.resize((size, size), Image.Resampling.NEAREST), (left, top + text))
            left += size + gap
    return np.asarray(sheet)


def table_of(result: Result) -> Table:
    """The result as a table for a terminal."""
    heads = (Column(head, justify="right") for head in ("without PAB", "PAB, as kept", "PAB, forecast"))
    table = Table("", *heads, title=f"{len(result.prompts)} clips, {result.steps} steps", title_justify="left")
    for role in result.roles:
        calls = role.computed + role.reused
        reused = f"{role.reused} ({role.reused / calls:.0%})"
        table.add_row(f"{role.role}: reused of {calls} calls", "0", reused, reused)
    table.add_row("PSNR to without", "", *(f"{psnr:.1f} dB" for psnr in result.psnr))
    table.add_row("SSIM to without", "", *(f"{ssim:.3f}" for ssim in result.ssim))
    table.add_row("seconds", f"{result.seconds[0]:.2f}", "", f"{result.seconds[1]:.2f}")
    low, high = result.spread
    table.add_row("speed-up (by round)", "1.00x", "", f"{result.speedup:.2f}x ({low:.2f} to {high:.2f})")
    return table
