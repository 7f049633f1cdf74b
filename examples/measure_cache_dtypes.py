"""How much smaller caches change the demo's clips: PSNR of each `cache_dtype` against caches as they are computed.

    python examples/measure_cache_dtypes.py --captions 96

All with the demo's config (spatial, temporal and cross-attention, and feed-forwards) and inner="eager".
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

import pab_fx
from pab_fx.demo import CAPTIONS, Caption, load_pipeline, recognise
from pab_fx.demo.run import demo_config

WAYS: dict[str, dict[str, Any]] = {
    "as computed (float32)": {},
    "bfloat16": {"cache_dtype": "bfloat16"},
    "int8": {"cache_dtype": "int8"},
    "float8_e4m3fn": {"cache_dtype": "float8_e4m3fn"},
}


def sample(pipe: Any, captions: list[Caption], steps: int, batch: int, seed: int) -> np.ndarray:
    """One clip for each caption, [N, F, H, W, 3] in 0 to 1."""
    clips = []
    for start in range(0, len(captions), batch):
        some = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        clips.append(pipe([str(c) for c in some], num_inference_steps=steps, generator=generators).frames)
    return np.concatenate(clips)


def psnr(frames: np.ndarray, reference: np.ndarray) -> str:
    """Mean and worst PSNR over clips, in dB."""
    found = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(reference, frames, strict=True)]
    return f"{np.mean(found):.1f} (worst {min(found):.1f})"


def main() -> None:
    """Sample, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2_000_000)
    args = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(args.steps)
    config = demo_config([float(t) for t in pipe.scheduler.timesteps])
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(args.captions)]
    given = (captions, args.steps, args.batch, args.seed)
    plain, exact = sample(pipe, *given), None
    print("| caches | bytes at most | PSNR to caches as computed, dB | PSNR to no PAB, dB | captions right |")
    print("| --- | --- | --- | --- | --- |")
    for name, options in WAYS.items():
        with pab_fx.enable(pipe, config, inner="eager", **options) as pab:
            frames = sample(pipe, *given)
            full = sum(role.full_bytes for role in pab.report().roles)
        to_exact = "" if exact is None else psnr(frames, exact)
        exact = frames if exact is None else exact
        right = sum(recognise(2 * clip - 1) == caption for clip, caption in zip(frames, captions, strict=True))
        print(f"| {name} | {full:,} | {to_exact} | {psnr(frames, plain)} | {right} of {len(captions)} |")


if __name__ == "__main__":
    main()
