"""Train the demo's text-to-video model from nothing: procedurally drawn clips, one CPU, about an hour.

    python examples/train_demo.py --folder runs/demo

Each step's data and noise depend on the seed and the step's number alone, so a run that was cut off and goes
on sees what it would have seen. `--folder` holds `checkpoint.pt` (to go on from) and `pipeline/`, the
averaged weights as a `ClipPipeline`.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from pab_fx.demo.clips import CAPTIONS, FRAMES, SIZE, draw
from pab_fx.demo.pipeline import VOCABULARY, ClipPipeline, encode_caption


def build_transformer(width: int = 128, heads: int = 4, layers: int = 3) -> LatteTransformer3DModel:
    """What is not a size is as in maxin-cn/Latte-1, but for the prediction: it has no learned variance."""
    return LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=SIZE,
        patch_size=4,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=len(VOCABULARY),
        video_length=FRAMES,
    )


def build_scheduler() -> DDIMScheduler:
    """Latte's linear betas, but ending in pure noise: sampling begins there."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=True,
    )


def batch(
    size: int, seed: int, step: int, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's clips, captions, timesteps and noise.

    Returns:
        Clips `[B, 3, F, H, W]` in [-1, 1], one-hot captions `[B, L, V]`, timesteps `[B]` int64, noise shaped
        as the clips.
    """
    rng = np.random.default_rng([seed, step])
    captions = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=size)]
    clips = np.stack([draw(c, rng) for c in captions]).transpose(0, 4, 1, 2, 3)
    kept = rng.random(size) >= dropout
    prompts = [str(c) if keep else "" for c, keep in zip(captions, kept, strict=True)]
    embeds = torch.stack([encode_caption(p) for p in prompts])
    # Stratified, so that every batch has all noise levels.
    timesteps = ((np.arange(size) + rng.random(size)) * 1000 / size).astype(np.int64)
    noise = rng.standard_normal(clips.shape, dtype=np.float32)
    return torch.from_numpy(clips.copy()), embeds, torch.from_numpy(timesteps), torch.from_numpy(noise)


def loss_weights(scheduler: DDIMScheduler, cap: float = 5.0) -> torch.Tensor:
    """Weight `[1000]` of the squared error of the predicted clip at each timestep.

    1 + SNR makes it the error of a v-prediction; the cap (Min-SNR, arXiv 2303.09556) keeps the least noisy
    steps from taking over.
    """
    alphas = scheduler.alphas_cumprod
    return (1 / (1 - alphas).clamp(min=1e-8)).clamp(max=cap)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, decay: float = 0.4) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay` of all steps."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


def set_plain_attention(transformer: LatteTransformer3DModel) -> None:
    """Matrix products and a softmax: over 8 and 64 tokens Inductor makes them faster than SDPA's kernel."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


@torch.no_grad()
def update_average(
    average: LatteTransformer3DModel, transformer: LatteTransformer3DModel, step: int, decay: float
) -> None:
    """Exponential moving average of the weights, faster at the beginning."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)


def resume(
    folder: Path,
    transformer: LatteTransformer3DModel,
    average: LatteTransformer3DModel,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load the folder's checkpoint, if it has one, and return the number of steps already done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    state = torch.load(folder / "checkpoint.pt")
    for name, part in (("transformer", transformer), ("average", average), ("optimizer", optimizer)):
        part.load_state_dict(state[name])
    return state["step"]


def save(
    folder: Path,
    step: int,
    transformer: LatteTransformer3DModel,
    average: LatteTransformer3DModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    parts = {"transformer": transformer, "average": average, "optimizer": optimizer}
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    torch.save(state, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").rename(folder / "checkpoint.pt")  # cut off before, the old one is whole
    ClipPipeline(average, build_scheduler()).save_pretrained(folder / "pipeline")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    transformer, scheduler = build_transformer(), build_scheduler()
    average = copy.deepcopy(transformer).requires_grad_(False)
    set_plain_attention(transformer)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    args.folder.mkdir(parents=True, exist_ok=True)
    first = resume(args.folder, transformer, average, optimizer)
    predict = torch.compile(transformer) if args.compile else transformer
    weights = loss_weights(scheduler)

    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    mean_loss, since = float("nan"), time.monotonic()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps, completed=first, loss=mean_loss)
        for step in range(first, args.steps):
            clips, embeds, timesteps, noise = batch(args.batch, args.seed, step, args.dropout)
            noisy = scheduler.add_noise(clips, noise, timesteps)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = predict(noisy, timesteps, embeds, return_dict=False)[0]
            error = (predicted.float() - clips).square().mean(dim=(1, 2, 3, 4))  # [B]
            loss = (weights[timesteps] * error).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, transformer, step, args.ema)

            mean_loss = loss.item() if step == first else 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(task, advance=1, loss=mean_loss)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save(args.folder, step + 1, transformer, average, optimizer)
                pace = (time.monotonic() - since) / (step + 1 - first)
                progress.console.print(f"step {step + 1}  loss {mean_loss:.5f}  {pace:.3f} s/step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="checkpoint and trained pipeline; goes on from a checkpoint there",
    )
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="share of captions that are left out, for guidance"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
