"""Is a calibrated setting better than a preset, on prompts and seeds that the calibration has not seen?

    python examples/prove_calibration.py --folder runs/calibration

For each preset: calibrate the demo's model to be no worse than it on some captions; then sample other captions, from
other seeds, without PAB, with the preset and with the proposal. The proposal has to be as near to the samples without
PAB as the preset, in both measures, and faster: by the floating-point operations that are left out, and by the time
of the processor, in generations that take turns. Prints a table in Markdown, and ends with an error if it is not so.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pab_fx
from pab_fx import PABConfig
from pab_fx.calibrate.changes import ModuleChanges
from pab_fx.calibrate.samples import Difference
from pab_fx.calibrate.settings import at_own_timesteps, reused_modules
from pab_fx.demo import CAPTIONS, load_pipeline
from pab_fx.policy.config import PRESETS

SEEN, UNSEEN = 100, 3_000_000
"""Seeds of the first caption of each kind."""


@dataclass(frozen=True)
class Row:
    """What a setting comes to on unseen captions: means over clips, and speed-ups."""

    name: str
    psnr: float
    relative_l2: float
    operations: float
    measured: float


def main() -> None:
    """Calibrate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--captions", type=int, default=8, help="that the calibration sees")
    parser.add_argument("--unseen", type=int, default=24, help="other captions, that are compared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layer-groups", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="timed generations of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs=3,
        metavar=("CHANGES", "ROLES", "PARETO"),
        help="copies of the last calibration's",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    order = np.random.default_rng(args.seed).permutation(len(CAPTIONS))
    captions = [str(CAPTIONS[i]) for i in order]
    seen, unseen = captions[: args.captions], captions[args.captions :][: args.unseen]
    pipe = quiet_pipeline()
    found = {
        name: pab_fx.calibrate(
            pipe,
            seen,
            PABConfig.preset(name),
            call={"num_inference_steps": args.steps},
            folder=args.folder,
            seed=SEEN,
            batch=args.batch,
            layer_groups=args.layer_groups,
            rounds=0,
        )
        for name in args.presets
    }
    for name, copy in zip(("changes.png", "roles.png", "pareto.png"), args.pictures or (), strict=False):
        shutil.copy(args.folder / name, copy)
    plain = clips(pipe, unseen, args)
    print("\n| setting | PSNR, dB | relative L2 | speed-up by operations | speed-up measured |")
    print("| --- | --- | --- | --- | --- |")
    worse = []
    for name, calibration in found.items():
        timesteps = calibration.changes[0].timesteps
        configs = {name: at_own_timesteps(PABConfig.preset(name), timesteps), "calibrated to it": calibration.config}
        preset, proposal = compare(configs, calibration.changes, plain, unseen, args)
        for row in (preset, proposal):
            speedups = f"{row.operations:.2f}x | {row.measured:.2f}x"
            print(f"| {row.name} | {row.psnr:.2f} | {row.relative_l2:.4f} | {speedups} |", flush=True)
        is_near = proposal.psnr >= preset.psnr and proposal.relative_l2 <= preset.relative_l2
        is_faster = proposal.operations > preset.operations and proposal.measured > preset.measured
        worse += [] if is_near and is_faster else [name]
    if worse:
        raise SystemExit(f"not better than {', '.join(worse)}")


def compare(
    configs: dict[str, PABConfig],
    changes: Sequence[ModuleChanges],
    plain: np.ndarray,
    captions: Sequence[str],
    args: argparse.Namespace,
) -> list[Row]:
    """A row for each of the configs."""
    pipes = {name: quiet_pipeline() for name in configs}
    for name, pipe in pipes.items():
        scheduler = pipe.scheduler
        pab_fx.enable(pipe, configs[name], inner="eager", timesteps=lambda scheduler=scheduler: scheduler.timesteps)
    rows = []
    plain_pipe = quiet_pipeline()
    plain_pipe.transformer.compile(backend="eager")  # so that all that differs is what is reused
    speedups = measured_speedups(plain_pipe, pipes, captions[:4], args)
    for name, pipe in pipes.items():
        frames = clips(pipe, captions, args)
        differences = [Difference.between(a, b) for a, b in zip(frames, plain, strict=True)]
        rows.append(
            Row(
                name,
                statistics.fmean(each.psnr() for each in differences),
                statistics.fmean(each.relative_l2 for each in differences),
                speedup_by_operations(pipe, configs[name], changes),
                speedups[name],
            )
        )
    return rows


def quiet_pipeline() -> Any:
    """The demo's pipeline, without a progress bar."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clips(pipe: Any, captions: Sequence[str], args: argparse.Namespace) -> np.ndarray:
    """A clip for each caption, [N, F, H, W, 3] in 0 to 1, from seeds far from those of the calibration."""
    found = []
    for start in range(0, len(captions), args.batch):
        some = list(captions[start : start + args.batch])
        generators = [torch.Generator().manual_seed(UNSEEN + start + i) for i in range(len(some))]
        found.append(pipe(some, num_inference_steps=args.steps, generator=generators).frames)
    return np.concatenate(found)


def measured_speedups(
    plain: Any, pipes: dict[str, Any], captions: Sequence[str], args: argparse.Namespace
) -> dict[str, float]:
    """The ratio of the processor's time for a whole generation without and with PAB, in turns: median over rounds."""
    ratios: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(args.rounds + 1):
        without = seconds_of(lambda: plain(list(captions), num_inference_steps=args.steps))
        for name, pipe in pipes.items():
            within = seconds_of(lambda pipe=pipe: pipe(list(captions), num_inference_steps=args.steps))
            ratios[name] += [without / within] if turn else []  # the first captures
    return {name: statistics.median(found) for name, found in ratios.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """Of the processor, in one thread: what else runs on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def speedup_by_operations(pipe: Any, config: PABConfig, changes: Sequence[ModuleChanges]) -> float:
    """Floating-point operations of a generation without PAB over those with it: of its matrix products."""
    model = quiet_pipeline().transformer
    counter = FlopCounterMode(display=False)
    shape = (1, 3, model.config.video_length, model.config.sample_size, model.config.sample_size)
    with counter, torch.no_grad():
        model(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 5, model.config.caption_channels))
    of_module = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    reuses = reused_modules(config, changes)
    steps = len(changes[0].timesteps)
    spared = sum(of_module[module.name] * sum(plan) for module, plan in reuses.items())
    return 1 / (1 - spared / (steps * counter.get_total_flops()))


if __name__ == "__main__":
    main()
