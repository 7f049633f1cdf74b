"""Is what calibration finds faster and nearer than everything else, on prompts that it has not seen?

    python examples/prove_calibration.py --folder runs/clips --picture docs/front.png --update docs/tuning.md
    python examples/prove_calibration.py --model pictures --folder runs/pictures --picture docs/front-pictures.png

Calibrates a trained model of the demo for three budgets. Then samples other captions, from other seeds, with each
proposal, with every single method at several settings, with the presets, and in fewer steps. Each proposal has to keep
its budget on those, with at most so many operations, and to be nearer than every single method at as many operations.
Prints a table in Markdown, draws speed-up against error, and ends with an error if it is not so. What is finished is
kept in the folder: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

import pab_fx
from pab_fx import (
    Attentions,
    Blocks,
    Change,
    Every,
    FeedForwards,
    How,
    Last,
    Magnitude,
    Model,
    PABConfig,
    Policy,
    RatedResidual,
    Residual,
    Rule,
    Taylor,
)
from pab_fx.calibrate.files import Folder
from pab_fx.calibrate.laboratory import Laboratory
from pab_fx.calibrate.plots import strips
from pab_fx.calibrate.result import Calibration
from pab_fx.calibrate.samples import Difference, batches_of
from pab_fx.calibrate.trials import Trials
from pab_fx.demo import CAPTIONS, load_pipeline, pictures
from pab_fx.demo.run import demo_config
from pab_fx.report.marked import table as markdown
from pab_fx.report.marked import update
from pab_fx.report.palette import bare, pyplot

SEEN, UNSEEN = 100, 3_000_000
"""Seeds of the first caption of each kind."""
LIMITS = {42: 0.3, 50: 0.4, 60: 0.53}
"""For a PSNR in dB the share of the operations that may be left, of the clips' model."""
STEPS = {"clips": 50, "pictures": 28}
PRESETS = ("cogvideox", "latte", "open-sora")


@dataclass(frozen=True)
class Point:
    """What a setting comes to on unseen captions: mean PSNR in dB, and the share of operations that is left."""

    name: str
    psnr: float
    operations: float


def main() -> None:
    """Calibrate, compare, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=STEPS, default="clips")
    parser.add_argument("--folder", type=Path, default=Path("runs/clips"))
    parser.add_argument("--captions", type=int, default=24, help="that the calibration sees")
    parser.add_argument("--unseen", type=int, default=24, help="other captions, that are compared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--effort", default="medium")
    parser.add_argument("--margin", type=float, default=0.5, help="standard errors in reserve")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(LIMITS))
    parser.add_argument("--picture", type=Path, help="speed-up against error, as PNG")
    parser.add_argument("--update", type=Path, help="a Markdown file whose table is replaced")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = CAPTIONS if args.model == "clips" else pictures.CAPTIONS
    captions = [str(known[i]) for i in np.random.default_rng(0).permutation(len(known))]
    seen, unseen = captions[: args.captions], captions[args.captions :][: args.unseen]
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    found = {budget: calibrated(pipe, seen, budget, args) for budget in args.budgets}
    curves, presets, proposals = compared(pipe, unseen, found, args)
    written = table(found, proposals, curves, presets)
    print(written)
    if args.update:
        update(args.update, "proof" if args.model == "clips" else f"{args.model} proof", written)
    if args.picture:
        draw(curves, presets, proposals, found, STEPS[args.model], args.picture)
    limits = LIMITS if args.model == "clips" else {}
    wrong = [
        each
        for budget, point in proposals.items()
        for each in complaints(budget, point, limits.get(budget, 1.0), curves, presets)
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))


def calibrated(pipe: Any, prompts: Sequence[str], budget: int, args: argparse.Namespace) -> Calibration:
    """The proposal for a budget in dB, which is written into the folder too."""
    found = pab_fx.calibrate(
        pipe,
        prompts,
        f"psnr>={budget}",
        call={"num_inference_steps": STEPS[args.model]},
        folder=args.folder / "calibration",
        effort=args.effort,
        seed=SEEN,
        batch=args.batch,
        margin=args.margin,
        rounds=3,
    )
    pab_fx.save_policies(found.policies, args.folder / f"policies-{budget}.json")
    return found


def single_methods(pipe: Any, prompts: Sequence[str], steps: int) -> dict[str, dict[str, Any]]:
    """For each method configs of several speeds, by name."""

    def parts(how: How) -> Any:
        return lambda rule: (Policy(Attentions(), rule, how), Policy(FeedForwards(), rule, how))

    def one(where: Any, how: How) -> Any:
        return lambda rule: (Policy(where, rule, how),)

    ratios = pab_fx.magnitude_ratios(pipe, lambda: pipe(list(prompts), num_inference_steps=steps), steps)
    regular: dict[str, Rule] = {f"every {n}": Every(n, warmup=2) for n in (2, 3, 4, 6)}
    magnitudes: dict[str, Rule] = {f"{t}": Magnitude(ratios, t, 5, 0.1) for t in (0.01, 0.03, 0.06, 0.12)}
    first: dict[str, Rule] = {f"{t}": Change(Blocks(0, 1), t, warmup=2) for t in (0.03, 0.06, 0.12, 0.25)}
    easy: dict[str, Rule] = {
        f"{t}": Change(Model(), t, accumulate=True, by_rate=True, warmup=2) for t in (0.02, 0.05, 0.1, 0.2)
    }
    methods = {
        "PAB, as kept": (parts(Last()), regular),
        "PAB, forecast": (parts(Taylor(1)), regular),
        "TaylorSeer, order 2": (parts(Taylor(2)), regular),
        "blocks, residual": (one(Blocks(), Residual()), regular),
        "blocks, order 1": (one(Blocks(), Taylor(1, of=Residual())), regular),
        "blocks, order 2": (one(Blocks(), Taylor(2, of=Residual())), regular),
        "model, order 2": (one(Model(), Taylor(2, of=Residual())), regular),
        "MagCache": (one(Blocks(), Residual()), magnitudes),
        "FirstBlock": (one(Blocks(first=1), Residual()), first),
        "EasyCache": (one(Model(), RatedResidual()), easy),
    }
    return {name: {label: make(rule) for label, rule in rules.items()} for name, (make, rules) in methods.items()}


Curves = Mapping[str, Sequence[Point]]


def compared(
    pipe: Any, prompts: Sequence[str], found: Mapping[int, Calibration], args: argparse.Namespace
) -> tuple[Curves, list[Point], dict[int, Point]]:
    """What the single methods, the presets and the proposals come to on prompts that calibration did not see."""
    batches = batches_of(prompts, UNSEEN, args.batch)
    home = Folder(args.folder / "unseen", {"prompts": list(prompts), "batch": args.batch})
    steps = STEPS[args.model]
    methods = single_methods(pipe, prompts[:4], steps)
    pipe.scheduler.set_timesteps(steps)
    own = {"latte": demo_config([float(t) for t in pipe.scheduler.timesteps])}  # its feed-forwards' steps are moved
    with Trials(pipe, None, {"num_inference_steps": steps}, "eager") as trials, Progress() as progress:
        laboratory = Laboratory(home, trials, batches, (), progress, 60 * len(batches))
        laboratory.observe()

        def point(name: str, config: Any) -> Point:
            outcome = laboratory.outcome(name, config)
            return Point(name, outcome.psnr(), outcome.operations)

        proposals = {budget: point(f"calibrated to {budget} dB", each.policies) for budget, each in found.items()}
        presets = [point(name, own.get(name) or PABConfig.preset(name)) for name in PRESETS]
        curves = {
            name: [point(f"{name}, {label}", each) for label, each in configs.items()]
            for name, configs in methods.items()
        }
        references = [np.load(home.entries / f"reference-{batch.label}.npy") for batch in batches]
    curves["fewer steps"] = [
        fewer(pipe, batches, references, round(share * steps), steps, home) for share in (0.8, 0.52, 0.36, 0.28)
    ]
    return curves, presets, proposals


def fewer(
    pipe: Any, batches: Sequence[Any], references: Sequence[np.ndarray], steps: int, of: int, home: Folder
) -> Point:
    """Without a cache, in fewer steps."""
    known = home.load(f"steps-{steps}")
    if known is None:
        known = []
        for batch, reference in zip(batches, references, strict=True):
            generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
            clips = pipe(list(batch.prompts), generator=generators, num_inference_steps=steps, output_type="np")[0]
            known += [Difference.between(a, b).psnr() for a, b in zip(clips, reference, strict=True)]
        home.save(f"steps-{steps}", known)
    return Point(f"{steps} steps", float(np.mean(known)), steps / of)


def at(points: Sequence[Point], operations: float) -> float | None:
    """The PSNR of a method with as many operations, between the two settings that are next to it."""
    ordered = sorted(points, key=lambda point: point.operations)
    if not ordered[0].operations <= operations <= ordered[-1].operations:
        return None
    return float(np.interp(operations, [p.operations for p in ordered], [p.psnr for p in ordered]))


def complaints(budget: int, point: Point, most: float, curves: Curves, presets: Sequence[Point]) -> list[str]:
    """What is not as it has to be, with at most so many operations."""
    wrong = []
    if point.psnr < budget:
        wrong.append(f"{point.name}: {point.psnr:.2f} dB on unseen captions")
    if point.operations > most:
        wrong.append(f"{point.name}: {point.operations:.3f} of the operations, where {most} are allowed")
    for name, points in curves.items():
        other = at(points, point.operations)
        if other is not None and other > point.psnr:
            wrong.append(f"{point.name}: {point.psnr:.2f} dB, where {name} has {other:.2f} at as many operations")
    wrong += [
        f"{point.name}: {each.name} is nearer, {each.psnr:.2f} dB, with no more operations"
        for each in presets
        if each.psnr > point.psnr and each.operations <= point.operations
    ]
    return wrong


def table(
    found: Mapping[int, Calibration], proposals: Mapping[int, Point], curves: Curves, presets: Sequence[Point]
) -> str:
    """PSNR of every method with as many operations as each proposal; then the presets, and what is proposed."""
    points = list(proposals.values())
    heads = ("PSNR, dB, with", *(f"{p.operations:.2f} of the operations, {1 / p.operations:.2f}x" for p in points))
    rows = [("**calibrated**", *(f"**{point.psnr:.1f}**" for point in points))]
    others = {name: [at(each, point.operations) for point in points] for name, each in curves.items()}
    for name, psnrs in sorted(others.items(), key=lambda each: -max((p or 0.0) for p in each[1])):
        rows.append((name, *("" if psnr is None else f"{psnr:.1f}" for psnr in psnrs)))
    lines = [markdown(heads, rows)]
    said = [f"{each.name} {each.psnr:.1f} dB with {each.operations:.2f} of the operations" for each in presets]
    lines += ["", f"PAB's presets: {'; '.join(said)}.", ""]
    for budget, each in found.items():
        what = "; ".join(f"{type(p.where).__name__} {p.describe()}" for p in each.policies)
        measured = "" if each.measured_speedup is None else f" Measured {each.measured_speedup:.2f}x."
        lines.append(
            f"- {budget} dB asked for: {what}.{measured} {each.searched.psnr():.1f} dB on the captions it was searched "
            f"with, {each.proposal.psnr():.1f} on those held out, {proposals[budget].psnr:.1f} on others."
        )
    return "\n".join(lines)


COLOURS = (
    "#1f6feb",
    "#6f42c1",
    "#d1495b",
    "#8a8f98",
    "#3c4f8f",
    "#0a7f6f",
    "#b5651d",
    "#a3476b",
    "#c77d0a",
    "#5b8c2a",
    "#24292f",
)


def draw(
    curves: Curves,
    presets: Sequence[Point],
    proposals: Mapping[int, Point],
    found: Mapping[int, Calibration],
    steps: int,
    path: Path,
) -> None:
    """Speed-up against error: every method's curve, the proposals, and their steps below."""
    rows = [(f"{budget} dB: {type(p.where).__name__}", p) for budget, each in found.items() for p in each.policies]
    height = 0.25 * len(rows) + 0.6
    figure, (axis, strip) = pyplot().subplots(
        2, 1, figsize=(9.0, 5.6 + height), layout="constrained", height_ratios=(5.6, height)
    )
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        ordered = sorted(points, key=lambda point: point.operations)
        xs, ys = [1 / p.operations for p in ordered], [p.psnr for p in ordered]
        axis.plot(xs, ys, color=colour, marker="o", markersize=3.5, linewidth=1.3, label=name, alpha=0.85)
    for preset in presets:
        axis.scatter(1 / preset.operations, preset.psnr, color="#24292f", marker="D", s=26, zorder=3)
        axis.annotate(preset.name, (1 / preset.operations, preset.psnr), (5, 4), textcoords="offset points", fontsize=8)
    ordered = sorted(proposals.values(), key=lambda point: point.operations)
    xs, ys = [1 / p.operations for p in ordered], [p.psnr for p in ordered]
    axis.plot(xs, ys, color="#c9a227", linewidth=2.5, marker="*", markersize=15, label="calibrated", zorder=5)
    axis.set_xlim(1.0, 5.0)
    axis.set_ylim(20, 75)
    axis.set_xlabel("speed-up, by floating-point operations")
    axis.set_ylabel("PSNR to the clips without a cache, dB")
    axis.set_title("Speed-up against error: right is faster, up is nearer", loc="left", fontsize=11)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=False, fontsize=8.5, ncols=2)
    bare(axis)
    strips(strip, rows, steps)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
