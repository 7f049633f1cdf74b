"""Quality as numbers: what a cache changes in the samples of the demo's models, and what they still show.

    python examples/measure_quality.py --calibrated runs/clips/*.json --update docs/quality.md
    python examples/measure_quality.py --model pictures --calibrated runs/pictures/*.json --update docs/quality.md
    python examples/measure_quality.py --table forecasts --captions 24 --update docs/quality.md
    python examples/measure_quality.py --table parts --captions 8 --update docs/quality.md
    python examples/measure_quality.py --table parts --captions 8 --model pictures --intervals 2 3

Each caption is sampled once without a cache and once with each config, from the same noise, with inner="eager": every
method as it was published, and what was calibrated. Two runs in fewer steps are yardsticks. In the table "forecasts",
each config of PAB reads its caches as they were kept and as forecasts; in the table "parts", attentions, feed-forwards,
blocks and the model compute in every n-th step. The metrics are scikit-image's; none has learned weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from diffusers import TaylorSeerCacheConfig
from quality_sheet import Column, picture
from rich.console import Console
from rich.progress import track
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

import pab_fx
from pab_fx import (
    Attentions,
    Blocks,
    Every,
    FeedForwards,
    Hermite,
    How,
    Last,
    Magnitude,
    Model,
    PABConfig,
    Policy,
    Residual,
    Taylor,
)
from pab_fx.demo import PIPELINES, clips, load_pipeline, pictures
from pab_fx.demo.run import demo_config
from pab_fx.policy.when import reused_calls
from pab_fx.report.marked import table, update
from pab_fx.report.report import Report

MODELS: dict[str, Any] = {"clips": clips, "pictures": pictures}
STEPS = {"clips": 50, "pictures": 28}
PARTS = {"clips": ("colour", "direction", "shape"), "pictures": ("first", "relation", "second")}
ORDERS = {"as kept": 0, "forecast, order 1": 1, "forecast, order 2": 2}
HOWS: dict[str, Callable[[How], How]] = {
    "as kept": lambda of: of,
    "order 1": lambda of: Taylor(1, of=of),
    "order 2": lambda of: Taylor(2, of=of),
    "Hermite, order 2": lambda of: Hermite(2, of=of),
}
"""Of the outputs, or of what is added to the inputs."""
PARTS_OF_MODEL = {
    "attentions": (Attentions(), Last()),
    "feed-forwards": (FeedForwards(), Last()),
    "blocks": (Blocks(), Residual()),
    "model": (Model(), Residual()),
}
console = Console(stderr=True)


# ---------------------------------------------------------------------------------------------------- metrics


def ssim(reference: np.ndarray, clip: np.ndarray) -> float:
    """Mean over frames."""
    pairs = zip(reference, clip, strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs]))


def colour_difference(reference: np.ndarray, clip: np.ndarray) -> float:
    """CIEDE2000, mean over pixels: about 1 is what an eye just sees."""
    return float(deltaE_ciede2000(rgb2lab(reference), rgb2lab(clip)).mean())


def motion_nrmse(reference: np.ndarray, clip: np.ndarray) -> float:
    """NRMSE of what changes from frame to frame."""
    return float(normalized_root_mse(np.diff(reference, axis=0), np.diff(clip, axis=0)))


@dataclass(frozen=True)
class Metric:
    """A number of a clip, [F, H, W, 3] in 0 to 1, against the same clip without PAB.

    Args:
        name: as a table heads it.
        measure: takes the reference and the clip.
        digits: behind the point.
        more_is_nearer: whether a higher number is a nearer clip.
        frames: how many frames it takes at least.
    """

    name: str
    measure: Callable[[np.ndarray, np.ndarray], float]
    digits: int
    more_is_nearer: bool = False
    frames: int = 1

    def worst(self, values: Sequence[float], share: float) -> float:
        """The number that `share` of the clips do not reach: a percentile from the bad end, 0 for the worst."""
        return float(np.percentile(values, 100 * (share if self.more_is_nearer else 1 - share)))


METRICS = (
    Metric("PSNR, dB", lambda a, b: float(peak_signal_noise_ratio(a, b, data_range=1.0)), 1, more_is_nearer=True),
    Metric("SSIM", ssim, 4, more_is_nearer=True),
    Metric("NRMSE", lambda a, b: float(normalized_root_mse(a, b)), 4),
    Metric("CIEDE2000", colour_difference, 2),
    Metric("motion NRMSE", motion_nrmse, 4, frames=2),
)


# --------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Way:
    """A way to make the clips: with a config, or without PAB; in all steps, or in fewer."""

    name: str
    config: Any
    steps: int


@dataclass(frozen=True)
class Ran:
    """Clips, [N, F, H, W, 3] in 0 to 1, and what they cost; see `Found`."""

    clips: np.ndarray
    reused: dict[str, float]
    operations: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a way gave.

    Args:
        way: it.
        clips: [N, F, H, W, 3] in 0 to 1; pictures are clips of one frame.
        reused: the share of all calls of attentions, and of feed-forwards, that reused.
        operations: the share of the floating-point operations that is left.
        seconds: of the processor, per caption.
        right: how many clips have each part of the caption, and all three.
        metrics: of each clip against the reference, by name; empty for the reference.
    """

    way: Way
    clips: np.ndarray
    reused: dict[str, float]
    operations: float
    seconds: float
    right: dict[str, int]
    metrics: dict[str, list[float]]

    def as_json(self) -> dict[str, Any]:
        """All of it but the clips."""
        spread = {
            metric.name: {
                "mean": float(np.mean(values)),
                "worst twentieth": metric.worst(values, 0.05),
                "worst": metric.worst(values, 0.0),
            }
            for metric in METRICS
            if (values := self.metrics.get(metric.name))
        }
        name = {"config": self.way.name, "steps": self.way.steps, "clips": len(self.clips)}
        costs = {"operations": self.operations, "seconds": self.seconds}
        return {**name, "reused": self.reused, **costs, "right": self.right, "metrics": spread}


def ways(pipe: Any, steps: int, calibrated: Sequence[Path] = ()) -> list[Way]:
    """Without a cache, every method at its published default, what was calibrated, and fewer steps without a cache."""
    fewer = [max(1, round(steps * share)) for share in (0.8, 0.5)]
    found = {**configs(pipe, steps), **defaults(pipe, steps)}
    found |= {f"calibrated: {path.stem}": pab_fx.load_policies(path) for path in calibrated}
    return [
        Way("without a cache", None, steps),
        *(Way(name, config, steps) for name, config in found.items()),
        *(Way(f"without a cache, {count} steps", None, count) for count in fewer),
    ]


def defaults(pipe: Any, steps: int) -> dict[str, Any]:
    """Other methods, as their authors or diffusers set them where nothing else is said."""
    name = next(name for name, kind in PIPELINES.items() if isinstance(pipe, kind))
    prompts = [str(caption) for caption in MODELS[name].CAPTIONS[:4]]
    ratios = pab_fx.magnitude_ratios(pipe, lambda: pipe(prompts, num_inference_steps=steps), steps)
    return {
        "TaylorSeer": TaylorSeerCacheConfig(),
        "MagCache": Policy(Blocks(), Magnitude(ratios), Residual()),
        "first block": pab_fx.preset("first-block"),
        "EasyCache": pab_fx.preset("easycache-wan"),
    }


def configs(pipe: Any, steps: int) -> dict[str, PABConfig]:
    """The default and the presets, which read their caches as they were kept."""
    pipe.scheduler.set_timesteps(steps)
    latte = demo_config([float(t) for t in pipe.scheduler.timesteps])
    presets = {name: PABConfig.preset(name) for name in ("cogvideox", "latte", "open-sora")}
    return {"default": PABConfig(), **presets, "latte": latte}


def forecasts(pipe: Any, steps: int) -> list[Way]:
    """Without PAB, and for every order every config, and every attention in every 3rd step."""
    orders = [
        [
            *(Way(name, replace(config, forecast_order=order), steps) for name, config in configs(pipe, steps).items()),
            Way("every attention, every 3rd step", Policy(Attentions(), Every(3), Taylor(order)), steps),
        ]
        for order in ORDERS.values()
    ]
    return [Way("without PAB", None, steps), *(way for same in zip(*orders, strict=True) for way in same)]


def parts(pipe: Any, steps: int, intervals: Sequence[int] = (2, 3, 4, 6)) -> list[Way]:
    """Without a cache; for every part, interval and how; and without a cache in as many steps as compute."""
    every = [Every(n) for n in intervals]
    computed = [reused_calls(rule, range(steps, 0, -1)).count(False) for rule in every]
    return [
        Way("without a cache", None, steps),
        *(
            Way(f"{name}, 1 step of {rule.n}", Policy(where, rule, how(of)), steps)
            for name, (where, of) in PARTS_OF_MODEL.items()
            for rule in every
            for how in HOWS.values()
        ),
        *(Way(f"without a cache, {count} steps", None, count) for count in computed),
    ]


def sample(pipe: Any, captions: Sequence[Any], steps: int, batch: int, seed: int, what: str) -> np.ndarray:
    """One clip for each caption, [N, F, H, W, 3] in 0 to 1, a picture as one frame; each has a seed of its own."""
    made: list[Any] = []
    for start in track(range(0, len(captions), batch), description=f"{what:<24}", console=console):
        some = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        prompts = [str(caption) for caption in some]
        made.append(pipe(prompts, num_inference_steps=steps, generator=generators, return_dict=False)[0])
    pixels = np.concatenate(made)
    return pixels if pixels.ndim == 5 else pixels[:, None]


def run(way: Way, pipe: Any, captions: Sequence[Any], batch: int, seed: int, steps: int) -> Ran:
    """The clips of a way, and what they cost, in steps of which the reference has so many."""
    if way.config is None:
        start = time.process_time()
        clips = sample(pipe, captions, way.steps, batch, seed, way.name)
        seconds = (time.process_time() - start) / len(captions)
        return Ran(clips, {"attentions": 0.0, "feed-forwards": 0.0}, way.steps / steps, seconds)
    with pab_fx.enable(pipe, way.config, inner="eager") as pab:
        sample(pipe, captions[:1], 3, batch, seed, f"{way.name}, compiled")
        before, start = pab.report(), time.process_time()
        clips = sample(pipe, captions, way.steps, batch, seed, way.name)
        seconds = (time.process_time() - start) / len(captions)
        report = pab.report()
    calls = way.steps * -(-len(captions) // batch)
    return Ran(clips, shares(report, calls, pipe), left(before, report, calls), seconds)


def left(before: Report, after: Report, steps: int) -> float:
    """The share of the floating-point operations that is left in so many steps between two reports."""
    spared = 0.0
    for role in after.roles:
        reused = role.reused - sum(each.reused for each in before.roles if each.role == role.role)
        regions = [each for each in after.regions if each.role == role.role and each.left_alone is None]
        spared += sum(each.flops_share or 0.0 for each in regions) * reused / (max(len(regions), 1) * steps)
    return 1 - spared


def shares(report: Report, calls: int, pipe: Any) -> dict[str, float]:
    """Of all calls of attentions and of feed-forwards, the share that reused; each module is called `calls` times."""
    attentions = {region.name for region in report.regions if region.role != "mlp"}
    feed_forwards = [name for name, _ in pipe.transformer.named_modules() if name.endswith((".ff", ".ff_context"))]
    found = {role.role: role.reused / (calls * len(attentions)) for role in report.roles if role.role != "mlp"}
    mlp = sum(role.reused for role in report.roles if role.role == "mlp") / (calls * len(feed_forwards))
    return {"attentions": sum(found.values()), "feed-forwards": mlp, **found}


def right(model: str, clips: np.ndarray, captions: Sequence[Any]) -> dict[str, int]:
    """How many clips show what their caption says, by the model's judge: it measures pixels and knows no model."""
    pixels = clips if model == "clips" else clips[:, 0]
    pairs = [(MODELS[model].recognise(2 * each - 1), c) for each, c in zip(pixels, captions, strict=True)]
    found = {
        part: sum(s is not None and getattr(s, part) == getattr(c, part) for s, c in pairs) for part in PARTS[model]
    }
    return {**found, "all three": sum(s == c for s, c in pairs)}


def measure(
    ways_of: Callable[[Any, int], list[Way]],
    captions: Sequence[Any],
    steps: int,
    batch: int,
    seed: int,
    model: str = "clips",
) -> list[Found]:
    """Sample in every way, and compare with the first one."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    found: list[Found] = []
    for way in ways_of(pipe, steps):
        ran = run(way, pipe, captions, batch, seed, steps)
        metrics = {
            metric.name: [metric.measure(a, b) for a, b in zip(found[0].clips, ran.clips, strict=True)]
            for metric in METRICS
            if found and ran.clips.shape[1] >= metric.frames
        }
        shown = right(model, ran.clips, captions)
        found.append(Found(way, ran.clips, ran.reused, ran.operations, ran.seconds, shown, metrics))
    return found


# ---------------------------------------------------------------------------------------------------- showing


def tables(found: Sequence[Found]) -> str:
    """How far each way's clips are from those without a cache, what they show, and what they cost, in Markdown."""
    number, seconds = len(found[0].clips), found[0].seconds
    rows = [
        (
            each.way.name,
            *(_cell(metric, each.metrics[metric.name]) if each.metrics else "" for metric in METRICS[:2]),
            f"{each.right['all three']} of {number}",
            f"{each.operations:.2f}",
            f"{each.seconds / seconds:.2f}",
        )
        for each in found
    ]
    heads = ("", *(metric.name for metric in METRICS[:2]), "captions right", "operations left", "time")
    return table(heads, rows)


def table_of_hows(found: Sequence[Found], hows: Sequence[str]) -> str:
    """PSNR to the clips of the first way, the mean and the worst: a row for each config, a column for each how.

    A way without a cache has one column.
    """
    psnr, number = METRICS[0], len(found[0].clips)
    rows = []
    cached = [each for each in found if each.way.config is not None]
    groups = [cached[i : i + len(hows)] for i in range(0, len(cached), len(hows))]
    for same in [*groups, *([each] for each in found[1:] if each.way.config is None)]:
        values = [each.metrics[psnr.name] for each in same]
        cells = [f"{np.mean(some):.1f} ({psnr.worst(some, 0.0):.1f})" for some in values]
        right = min(each.right["all three"] for each in same)
        reused = same[0].reused["attentions"] or same[0].reused["feed-forwards"]
        cells += [""] * (len(hows) - len(cells))
        rows.append((same[0].way.name, f"{reused:.1%}" if reused else "", *cells, f"{right} of {number}"))
    return table(("PSNR, dB", "calls reused", *hows, "all three, at least"), rows)


TABLES: dict[str, tuple[Callable[[Any, int], list[Way]], Callable[[Sequence[Found]], str]]] = {
    "quality": (ways, tables),
    "forecasts": (forecasts, partial(table_of_hows, hows=tuple(ORDERS))),
    "parts": (parts, partial(table_of_hows, hows=tuple(HOWS))),
}


def _cell(metric: Metric, values: Sequence[float]) -> str:
    """Mean, and in brackets the worst twentieth and the worst."""
    numbers = (np.mean(values), metric.worst(values, 0.05), metric.worst(values, 0.0))
    mean, twentieth, worst = (f"{number:.{metric.digits}f}" for number in numbers)
    return f"{mean} ({twentieth}, {worst})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="clips")
    parser.add_argument("--captions", type=int, default=96, help="of clips, 96 is each caption once")
    parser.add_argument("--steps", type=int, help=f"by default {STEPS}")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2_000_000)
    parser.add_argument("--table", choices=TABLES, default="quality", help="which ways are compared")
    parser.add_argument("--intervals", type=int, nargs="+", metavar="N", help="of parts: compute in one step of N")
    parser.add_argument("--calibrated", type=Path, nargs="+", default=[], metavar="FILE", help="policies, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG: the same frames in each way")
    parser.add_argument("--update", type=Path, metavar="FILE", help="a Markdown file whose tables are replaced")
    args = parser.parse_args(arguments)
    if args.model != "clips" and args.table == "forecasts":
        parser.error(f"--model {args.model} has no --table forecasts")
    if args.calibrated and args.table != "quality":
        parser.error("--calibrated is for --table quality")
    if args.intervals and args.table != "parts":
        parser.error("--intervals is for --table parts")
    known = MODELS[args.model].CAPTIONS
    captions = [known[i % len(known)] for i in range(args.captions)]
    ways_of, write = TABLES[args.table]
    if args.calibrated:
        ways_of = partial(ways_of, calibrated=args.calibrated)
    if args.intervals:
        ways_of = partial(ways_of, intervals=args.intervals)
    found = measure(ways_of, captions, args.steps or STEPS[args.model], args.batch, args.seed, args.model)
    written = write(found)
    print(written)
    if args.json:
        args.json.write_text(json.dumps([each.as_json() for each in found], indent=1) + "\n", encoding="utf-8")
    if args.picture:
        psnr = METRICS[0].name
        columns = [
            Column(each.way.name, each.clips, each.metrics.get(psnr), each.way.config is not None) for each in found
        ]
        imageio.imwrite(args.picture, picture(columns, captions))
    if args.update:
        update(args.update, args.table if args.model == "clips" else f"{args.model} {args.table}", written)


if __name__ == "__main__":
    main()
