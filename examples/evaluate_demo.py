"""Sample one of the demo's models and count how often the samples show what their captions say.

    python examples/evaluate_demo.py --captions 96 --sheet clips.png
    python examples/evaluate_demo.py --captions 96 --hooks
    python examples/evaluate_demo.py --model pictures --sheet pictures.png

The judges are `pab_fx.demo.clips.recognise` and `pab_fx.demo.pictures.recognise`, which measure the pixels and have
never seen the models. `--hooks` samples the same clips again with diffusers' own Pyramid Attention Broadcast and says
by how much they differ.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import PyramidAttentionBroadcastConfig
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from skimage.metrics import peak_signal_noise_ratio

from pab_fx.demo import PIPELINES, WEIGHTS, clips, pictures

MODELS: dict[str, Any] = {"clips": clips, "pictures": pictures}
console = Console()


def contact_sheet(frames: np.ndarray, labels: list[str], scale: int = 3, label_width: int = 230) -> np.ndarray:
    """Lay clips out on one picture.

    Args:
        frames: `[N, F, H, W, 3]` RGB in [0, 1].
        labels: N texts.
        scale: Screen pixels, in each direction, for one pixel of a clip.
        label_width: Screen pixels left of the frames.

    Returns:
        `[N * (scale * H + 2), label_width + F * (scale * W + 2), 3]` uint8.
    """
    pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=64)  # a line between frames
    n, f, h, w, _ = pixels.shape
    sheet = Image.new("RGB", (label_width + f * w, n * h), (32, 32, 32))
    sheet.paste(Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, 3)), (label_width, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, label in enumerate(labels):
        pen.text((6, row * h + h // 2), label, fill=(235, 235, 235), font=font, anchor="lm")
    return np.asarray(sheet)


def sample(pipe: Any, captions: list[Any], args: argparse.Namespace, what: str) -> np.ndarray:
    """A clip `[N, F, H, W, 3]` or picture `[N, H, W, 3]` in [0, 1] for each caption; each has a seed of its own."""
    made = []
    chosen = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    options = {name: value for name, value in chosen.items() if value is not None}
    for start in track(range(0, len(captions), args.batch), description=what, console=console):
        some = captions[start : start + args.batch]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(some))]
        made.append(pipe([str(c) for c in some], generator=generators, return_dict=False, **options)[0])
    return np.concatenate(made)


def report(model: Any, pixels: np.ndarray, captions: list[Any]) -> None:
    """Print how many samples are recognised as their caption, and how well drawn they are."""
    seen = [model.recognise(2 * each - 1) for each in pixels]
    parts = [field.name for field in fields(model.Caption)]
    for part in parts:
        right = sum(s is not None and getattr(s, part) == getattr(c, part) for s, c in zip(seen, captions, strict=True))
        console.print(f"{part:>10} {right:4d} of {len(captions)} = {right / len(captions):.1%}")
    right = sum(s == c for s, c in zip(seen, captions, strict=True))
    console.print(f"{'all three':>10} {right:4d} of {len(captions)} = {right / len(captions):.1%}")
    overlaps = [model.overlap(2 * each - 1, c) for each, c in zip(pixels, captions, strict=True)]
    console.print(f"overlap with what the caption says: mean {np.mean(overlaps):.3f}, worst {min(overlaps):.3f}")
    for s, c in zip(seen, captions, strict=True):
        if s != c:
            console.print(f"  {c}: seen as {s}")


def hooks_config(pipe: Any) -> PyramidAttentionBroadcastConfig:
    """PAB for all three roles; diffusers' default identifiers take Latte's temporal blocks for spatial."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=3,
        cross_attention_block_skip_range=6,
        spatial_attention_block_identifiers=("^transformer_blocks",),
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        cross_attention_block_identifiers=("^transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="clips")
    parser.add_argument("--pipeline", type=Path, help="a folder; the package's pipeline by default")
    parser.add_argument("--captions", type=int, default=96, help="of clips, 96 is each caption once")
    parser.add_argument("--steps", type=int, help="the pipeline's default: 50 for clips, 28 for pictures")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's default")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="PNG to write, a row for each sample")
    parser.add_argument("--sheet-rows", type=int, default=16)
    parser.add_argument("--hooks", action="store_true", help="also sample clips with diffusers' PAB hooks and compare")
    args = parser.parse_args()
    if args.hooks and args.model != "clips":
        parser.error("the hooks are configured for clips")

    model = MODELS[args.model]
    pipe = PIPELINES[args.model].from_pretrained(args.pipeline or WEIGHTS / args.model, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    order = np.random.default_rng(args.seed).permutation(len(model.CAPTIONS))
    captions = [model.CAPTIONS[order[i % len(order)]] for i in range(args.captions)]

    pixels = sample(pipe, captions, args, "sampling")
    report(model, pixels, captions)
    rows, labels = [pixels], [[str(c) for c in captions]]
    if args.hooks:
        pipe.transformer.enable_cache(hooks_config(pipe))
        hooked = sample(pipe, captions, args, "sampling with hooks")
        report(model, hooked, captions)
        psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(pixels, hooked, strict=True)]
        console.print(f"PSNR between the two: mean {np.mean(psnr):.1f}, worst {min(psnr):.1f}, best {max(psnr):.1f} dB")
        rows.append(hooked)
        labels.append([f"same, PAB: {value:.1f} dB" for value in psnr])
    if args.sheet:
        n, frames = args.sheet_rows, (-1, *pixels.shape[-3:])
        stacked = np.stack([r[:n] for r in rows], axis=1)  # [n, 1 or 2, (F,) H, W, 3]
        texts = [text for pair in zip(*(some[:n] for some in labels), strict=True) for text in pair]
        iio.imwrite(args.sheet, contact_sheet(stacked.reshape(len(texts), *frames), texts))
        console.print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()
