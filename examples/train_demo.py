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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from rich.progress import Progress, TextColumn

from pab_fx.demo.clip_pipeline import VOCABULARY, ClipPipeline, encode_caption
from pab_fx.demo.clips import CAPTIONS, FRAMES, SIZE, draw


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
        patch_size=8,
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
    # Stratified, so that every batch has all noise levels; the power gives more of them to the noisy half,
    # where place and motion are decided.
    timesteps = (1000 * ((np.arange(size) + rng.random(size)) / size) ** (2 / 3)).astype(np.int64)
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
def update_average(average: torch.nn.Module, transformer: torch.nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights, faster at the beginning."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)


def build_optimizers(transformer: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which spares half of the first thousand steps; AdamW for the rest."""
    matrices = [p for name, p in transformer.named_parameters() if "blocks" in name and name.endswith("weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


@dataclass
class Run:
    """All that a run must remember to go on where it stopped, and how its averaged weights become a pipeline."""

    transformer: Any
    average: Any
    optimizers: list[torch.optim.Optimizer]
    pipeline_of: Callable[[Any], Any]
    step: int = 0

    def save(self, folder: Path) -> None:
        state = {
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").rename(folder / "checkpoint.pt")  # cut off before, the old one is whole
        self.pipeline_of(self.average).save_pretrained(folder / "pipeline")

    def resume(self, folder: Path) -> None:
        state = torch.load(folder / "checkpoint.pt")
        self.step = state["step"]
        self.transformer.load_state_dict(state["transformer"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def start(
    args: argparse.Namespace,
    build: Callable[[], Any],
    optimizers_of: Callable[[Any, float], list[torch.optim.Optimizer]],
    pipeline_of: Callable[[Any], Any],
) -> Run:
    """A new run, or the one that the folder holds."""
    torch.manual_seed(args.seed)
    transformer = build()
    average = copy.deepcopy(transformer).requires_grad_(False)
    run = Run(transformer, average, optimizers_of(transformer, args.lr), pipeline_of)
    args.folder.mkdir(parents=True, exist_ok=True)
    if (args.folder / "checkpoint.pt").exists():
        run.resume(args.folder)
    return run


def train(args: argparse.Namespace, run: Run, loss_of: Callable[[Any, int], torch.Tensor]) -> None:
    """Train to the last step.

    Args:
        args: those of `parser`.
        run: where it begins.
        loss_of: takes the transformer, compiled if asked for, and a step's number.
    """
    predict = torch.compile(run.transformer) if args.compile else run.transformer
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}"))
    mean_loss, since, first = float("nan"), time.monotonic(), run.step
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps, completed=first, loss=mean_loss)
        for step in range(first, args.steps):
            loss = loss_of(predict, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.transformer.parameters(), 1.0)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.steps, args.lr)
                optimizer.step()
                optimizer.zero_grad()
            update_average(run.average, run.transformer, step, args.ema)

            run.step = step + 1
            mean_loss = loss.item() if step == first else 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(task, advance=1, loss=mean_loss)
            if run.step % args.save_every == 0 or run.step == args.steps:
                run.save(args.folder)
                pace = (time.monotonic() - since) / (run.step - first)
                progress.console.print(f"step {run.step}  loss {mean_loss:.5f}  {pace:.3f} s/step")


def parser(description: str | None, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options of a training, with these defaults."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="checkpoint and trained pipeline; goes on from a checkpoint there",
    )
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--batch", type=int, default=batch)
    found.add_argument("--lr", type=float, default=lr)
    found.add_argument("--ema", type=float, default=0.999)
    found.add_argument("--dropout", type=float, default=0.1, help="share of captions that are left out, for guidance")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--save-every", type=int, default=500)
    found.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return found


def main() -> None:
    args = parser(__doc__, steps=10000, batch=24, lr=2e-3).parse_args()
    scheduler = build_scheduler()
    weights = loss_weights(scheduler)

    def build() -> LatteTransformer3DModel:
        transformer = build_transformer()
        set_plain_attention(transformer)
        return transformer

    def loss_of(transformer: Any, step: int) -> torch.Tensor:
        clips, embeds, timesteps, noise = batch(args.batch, args.seed, step, args.dropout)
        noisy = scheduler.add_noise(clips, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(noisy, timesteps, embeds, return_dict=False)[0]
        error = (predicted.float() - clips).square().mean(dim=(1, 2, 3, 4))  # [B]
        return (weights[timesteps] * error).mean()

    run = start(args, build, build_optimizers, lambda average: ClipPipeline(average, build_scheduler()))
    train(args, run, loss_of)


if __name__ == "__main__":
    main()
