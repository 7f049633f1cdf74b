"""Train the second model from nothing: drawn pictures of two digits, flow matching, about 25 minutes of one CPU core.

    python examples/train_pictures.py --folder runs/pictures

Each step's data and noise depend on the seed and the step's number alone, so a run that was cut off and goes on sees
what it would have seen. `--folder` holds `checkpoint.pt` (to go on from) and `pipeline/`, the averaged weights in
float16 as a `PicturePipeline`. Those in the package are from three runs in one folder: `--steps 2200`, 3200 and 4400,
so their learning rate fell three times.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormZero
from train_demo import parser, start, train

from pab_fx.demo.clips import SIZE
from pab_fx.demo.picture_pipeline import MAX_WORDS, VOCABULARY, PicturePipeline, encode_caption
from pab_fx.demo.pictures import CAPTIONS, draw


def build_transformer(width: int = 96, heads: int = 4, layers: int = 6) -> SD3Transformer2DModel:
    """What is not a size is as in Stable Diffusion 3.5 Large; blocks begin with open gates, which trains faster."""
    transformer = SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=len(VOCABULARY) + MAX_WORDS,
        caption_projection_dim=width,
        pooled_projection_dim=len(VOCABULARY) + MAX_WORDS,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero):  # shift, scale and gate of the attention, then of the feed-forward
            torch.nn.init.zeros_(module.linear.weight)
            module.linear.bias.data = torch.tensor([0.0, 0.0, 1.0] * 2).repeat_interleave(width)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """That of Stable Diffusion 3."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def batch(
    size: int, seed: int, step: int, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's pictures, captions, noise levels and noise.

    Returns:
        Pictures `[B, 3, H, W]` in [-1, 1], captions `[B, L, V]`, noise levels `[B]` in 0 to 1, noise shaped as the
        pictures.
    """
    rng = np.random.default_rng([seed, step])
    captions = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=size)]
    pictures = torch.from_numpy(np.stack([draw(c, rng) for c in captions])).permute(0, 3, 1, 2)
    kept = rng.random(size) >= dropout
    embeds = torch.stack([encode_caption(str(c) if keep else "") for c, keep in zip(captions, kept, strict=True)])
    # Logit-normal as for Stable Diffusion 3, stratified, so that every batch has all noise levels; the half that is
    # added gives more of them to the noisy half, where places are decided.
    quantiles = torch.from_numpy(((np.arange(size) + rng.random(size)) / size).astype(np.float32))
    sigmas = torch.sigmoid(1.2 * torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)) + 0.5)
    noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32))
    return pictures.contiguous(), embeds, sigmas, noise


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices `[N, R, C]` with their singular values brought near 1, by five steps of Newton and Schulz."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32, all matrices of a shape at once: a CPU may have to emulate its bfloat16."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for shape in {p.shape: None for p in group["params"]}:
            same = [p for p in group["params"] if p.shape == shape]
            gradients = torch.stack([p.grad for p in same])  # [N, R, C]
            mean = self.state[same[0]].setdefault("mean", torch.zeros_like(gradients))
            mean.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonal(torch.lerp(gradients, mean, group["momentum"]))
            for p, update in zip(same, updates, strict=True):
                rate = 0.2 * max(shape) ** 0.5  # as large as AdamW's
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * rate)


def build_optimizers(transformer: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attentions and feed-forwards, AdamW for the rest."""
    named = [
        (name, p, "blocks" in name and "norm" not in name and p.ndim == 2) for name, p in transformer.named_parameters()
    ]
    rest = [p for _, p, is_matrix in named if not is_matrix]
    return [
        Muon([p for _, p, is_matrix in named if is_matrix], lr),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True),
    ]


def main() -> None:
    options = parser(__doc__, steps=4400, batch=24, lr=2e-3)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    def loss_of(transformer: Any, step: int) -> torch.Tensor:
        pictures, embeds, sigmas, noise = batch(args.batch, args.seed, step, args.dropout)
        noisy = torch.lerp(pictures, noise, sigmas[:, None, None, None])
        predicted = transformer(noisy, embeds, embeds.sum(dim=1), 1000 * sigmas, return_dict=False)[0]
        return (predicted - (noise - pictures)).square().mean()

    def pipeline_of(average: SD3Transformer2DModel) -> PicturePipeline:
        return PicturePipeline(copy.deepcopy(average).half(), build_scheduler())

    train(args, start(args, build_transformer, build_optimizers, pipeline_of), loss_of)


if __name__ == "__main__":
    main()
