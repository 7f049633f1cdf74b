"""Small transformers that are drawn and written down as data: a failure prints as the spec that fails.

    >>> spec = TransformerSpec((AttentionSpec("cross"),), ((Site(uses=("iadd",)),),))
    >>> spec
    TransformerSpec(attentions=(AttentionSpec(kind='cross'),), blocks=((Site(uses=('iadd',)),),))
    >>> x, y = spec.build()(*spec.inputs(t=500, seed=0))

What a spec can say is what a graph pass can get wrong: what an attention returns (a tensor, several, views of one
storage, its residual), what is done to its input and its output (updates in place, uses of views, no use at all), one
module called several times, sizes that coincide, breaks of the graph.

The state of a model is a video `x` [B, F * S, C] and a text `y` [B, T, C]; temporal attention sees [B * S, F, C],
frame-wise attention [B * F, S, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor, nn


class _Short:
    """Prints as the call that makes it, without what is left at its default."""

    def __repr__(self) -> str:
        given = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        said = [f"{each.name}={given[each.name]!r}" for each in fields(self) if given[each.name] != each.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(said)})"


KINDS = ("self", "frame", "cross", "joint", "temporal")
MATHS = ("sdpa", "softmax", "linear", "baddbmm")
RETURNS = ("tensor", "pair", "halves", "narrow", "inner_view", "residual", "scaled_in_place", "list")
PREPARATIONS = ("norm", "modulate", "clone_mul_", "norm_add_", "update_behind", "update_view", "slice_add_")
USES = (
    "add",
    "iadd",
    "gate",
    "mul_",
    "view_mul_",
    "out_setitem",
    "x_setitem",
    "replace",
    "into_output",
    "twice",
    "relu_",
    "late",
    "unused",
)


@dataclass(frozen=True, repr=False)
class AttentionSpec(_Short):
    """One attention module: its kind, its mathematics, what it returns and what surrounds it."""

    kind: str = "self"
    math: str = "sdpa"
    returns: str = "tensor"
    fused_qkv: bool = False
    context: str = "none"
    dropout: str = "none"
    breaks: bool = False


@dataclass(frozen=True, repr=False)
class Site(_Short):
    """One call of an attention: which one, how its input is prepared, how its outputs are used."""

    attention: int = 0
    prepare: tuple[str, ...] = ()
    uses: tuple[str, ...] = ("add",)
    break_before: bool = False
    break_after: bool = False


@dataclass(frozen=True, repr=False)
class TransformerSpec(_Short):
    """A model: its attentions, the calls of them in each block, and its sizes."""

    attentions: tuple[AttentionSpec, ...] = (AttentionSpec(),)
    blocks: tuple[tuple[Site, ...], ...] = ((Site(),),)
    feed_forward: str = "add"
    frames: int = 3
    space: int = 4
    text: int = 5
    heads: int = 2
    head_dim: int = 4

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.heads * self.head_dim

    @property
    def mode(self) -> Callable[[], Any]:
        """What the model has to run in: tensors made in inference mode may not be updated outside of it."""
        enters = any(attention.context == "inference" for attention in self.attentions)
        return torch.inference_mode if enters else torch.no_grad

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, without gradients, its parameters drawn so that it neither dies out nor blows up."""
        from .transformers import Transformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Transformer(self).eval().requires_grad_(False)
            for parameter in model.parameters():
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
        return model

    def inputs(self, t: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of one step: hidden states [2, 4, F, S, 1], text [2, T, 6], timestep [2]; all change with the seed."""
        generator = torch.Generator().manual_seed(seed)
        hidden_states = torch.randn(2, 4, self.frames, self.space, 1, generator=generator)
        encoder_hidden_states = torch.randn(2, self.text, 6, generator=generator)
        return hidden_states, encoder_hidden_states, torch.full((2,), float(t))


@dataclass(frozen=True, repr=False)
class Schedule(_Short):
    """When what is broadcast: skip ranges and windows of spatial, temporal and cross-attention, and generations.

    Example:
        >>> Schedule(ranges=(2, None, 4)).config().cross_attention_block_skip_range
        4
    """

    ranges: tuple[int | None, int | None, int | None] = (2, 3, 4)
    windows: tuple[tuple[float, float], ...] = ((100, 800),) * 3
    generations: tuple[tuple[float, ...], ...] = ((900, 700, 600, 500, 300, 50), (700, 600, 500))

    def config(self, callback: Callable[[], float] | None = None) -> PyramidAttentionBroadcastConfig:
        """diffusers' config for the transformers of this file, in which an attention's name says its kind."""
        spatial, temporal, cross = self.ranges
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial,
            temporal_attention_block_skip_range=temporal,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=self.windows[0],  # type: ignore[arg-type]
            temporal_attention_timestep_skip_range=self.windows[1],  # type: ignore[arg-type]
            cross_attention_timestep_skip_range=self.windows[2],  # type: ignore[arg-type]
            spatial_attention_block_identifiers=(r"self_\d+$", r"frame_\d+$", r"joint_\d+$"),
            temporal_attention_block_identifiers=(r"temporal_\d+$",),
            cross_attention_block_identifiers=(r"cross_\d+$",),
            current_timestep_callback=callback,  # type: ignore[arg-type]
        )
