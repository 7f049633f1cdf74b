"""The modules of a `TransformerSpec`: a video transformer whose blocks do what the spec says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn


class Attention(nn.Module, AttentionModuleMixin):
    """An attention module that diffusers' hooks take for one.

    Where it breaks, it does so in `forward` itself: a `forward` that breaks before it has computed anything is
    given up by Dynamo for every module of the class, and what it calls is then computed in every step.
    """

    def __init__(self, spec: Any, width: int, heads: int) -> None:
        super().__init__()
        self.spec, self.heads, self.width = spec, heads, width
        self.is_cross_attention = spec.kind == "cross"
        if spec.fused_qkv and spec.kind != "cross":
            self.to_qkv = nn.Linear(width, 3 * width)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, 2 * width if spec.returns in ("halves", "narrow") else width)
        self.to_add = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0 if spec.dropout == "zero" else 0.5)

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, ...] | list[Tensor]:
        residual, text = hidden, 0
        if self.spec.kind == "joint":
            assert context is not None
            text = context.shape[1]
            hidden = torch.cat([context, hidden], dim=1)
        if hasattr(self, "to_qkv"):
            query, key, value = self.to_qkv(hidden).chunk(3, dim=-1)
        else:
            source = context if self.spec.kind == "cross" else hidden
            query, key, value = self.to_q(hidden), self.to_k(source), self.to_v(source)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.spec.breaks:
            torch._dynamo.graph_break()
        attended = self._core(query, key, value).transpose(1, 2).flatten(2)
        if self.spec.dropout != "none":
            attended = self.dropout(attended)
        out = self.to_out(attended)
        if self.spec.kind == "joint":
            first, second = out[:, text:], out[:, :text]
            if self.spec.returns in ("halves", "narrow"):
                first, second = first[..., : self.width], second[..., -self.width :]
            return first, second
        return self._returned(out, attended, residual)

    def _heads(self, tensor: Tensor) -> Tensor:
        """[N, S, C] -> [N, H, S, D]"""
        return tensor.view(tensor.shape[0], tensor.shape[1], self.heads, -1).transpose(1, 2)

    def _core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.spec.math == "sdpa":
            return F.scaled_dot_product_attention(query, key, value)
        if self.spec.math == "linear":
            return F.relu(query) @ (F.relu(key).transpose(-1, -2) @ value)
        if self.spec.math == "softmax":
            scores = query @ key.transpose(-1, -2)
            scores.mul_(query.shape[-1] ** -0.5)
            return scores.softmax(dim=-1) @ value
        size = query.shape[:2]
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        bias = query.new_zeros(query.shape[0], query.shape[1], key.shape[1])
        scores = torch.baddbmm(bias, query, key.transpose(-1, -2), beta=0, alpha=0.5).softmax(dim=-1)
        return torch.bmm(scores, value).unflatten(0, size)

    def _returned(self, out: Tensor, attended: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, ...] | list[Tensor]:
        returns = self.spec.returns
        if returns == "pair":
            return out, self.to_add(attended)
        if returns == "list":
            return [self.to_add(out), out]
        if returns == "halves":
            first, second = out.chunk(2, dim=-1)
            return first, second
        if returns == "narrow":
            return out.narrow(-1, 1, self.width)
        if returns == "inner_view":
            view = out.transpose(0, 1)
            return view.transpose(0, 1), self.to_add(view).transpose(0, 1)
        if returns == "residual":
            return residual + out
        if returns == "scaled_in_place":
            out.mul_(0.5)
        return out


class ModalAttention(Attention):
    """An attention that enters no-grad or inference mode."""

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor | tuple[Tensor, ...] | list[Tensor]:
        with torch.no_grad() if self.spec.context == "no_grad" else torch.inference_mode():
            return super().forward(hidden, context)


class Block(nn.Module):
    """Calls of attentions and a feed-forward; holds the attentions under names that tell their kind."""

    def __init__(self, sites: tuple[Any, ...], spec: Any, attentions: list[Attention]) -> None:
        super().__init__()
        self.sites, self.spec = sites, spec
        for i, site in enumerate(sites):
            attention = attentions[site.attention]
            self.add_module(f"{attention.spec.kind}_{i}", attention)
            self.add_module(f"norm_{i}", nn.LayerNorm(spec.width))
            self.add_module(f"modulation_{i}", nn.Linear(spec.width, 3 * spec.width))
        self.ff = nn.Sequential(nn.Linear(spec.width, 8), nn.GELU(), nn.Linear(8, spec.width))

    def forward(self, x: Tensor, y: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        late: list[Tensor] = []
        for i, site in enumerate(self.sites):
            kind = self.spec.attentions[site.attention].kind
            attention, norm = getattr(self, f"{kind}_{i}"), getattr(self, f"norm_{i}")
            shift, scale, gate = getattr(self, f"modulation_{i}")(temb)[:, None].chunk(3, dim=-1)
            x, prepared = self._prepare(site.prepare, x, norm, shift, scale)
            if site.break_before:
                torch._dynamo.graph_break()
            outputs = self._attend(kind, attention, prepared, y)
            if site.break_after:
                torch._dynamo.graph_break()
            if kind == "joint":
                y = self._use(site.uses[-1], y, outputs.pop(), gate, late)
            for use, output in zip(site.uses, outputs, strict=False):
                x = self._use(use, x, output, gate, late)
        for output in late:
            x = x + output.mean(1, keepdim=True)
        if self.spec.feed_forward == "in_place":
            x += self.ff(x)
        elif self.spec.feed_forward == "add":
            x = x + self.ff(x)
        return x, y

    def _attend(self, kind: str, attention: nn.Module, hidden: Tensor, y: Tensor) -> list[Tensor]:
        """Outputs shaped as `x`; for joint attention the text's comes last."""
        batch, frames, space = hidden.shape[0], self.spec.frames, self.spec.space
        if kind == "temporal":
            hidden = hidden.view(batch, frames, space, -1).transpose(1, 2).reshape(batch * space, frames, -1)
        elif kind == "frame":
            hidden = hidden.view(batch * frames, space, -1)
        output = attention(hidden, y) if kind in ("cross", "joint") else attention(hidden)
        outputs = list(output) if isinstance(output, (tuple, list)) else [output]
        if kind == "temporal":
            outputs = [each.reshape(batch, space, frames, -1).transpose(1, 2).flatten(1, 2) for each in outputs]
        elif kind == "frame":
            outputs = [each.reshape(batch, frames * space, -1) for each in outputs]
        return outputs

    def _prepare(
        self, steps: tuple[str, ...], x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = x
        for step in steps:
            if step == "norm":
                h = norm(h)
            elif step == "modulate":
                h = h * (1 + scale) + shift
            elif step == "clone_mul_":
                h = h.clone()
                h.mul_(1.5)
            elif step == "norm_add_":
                h = norm(h)
                h += shift
            elif step == "update_behind":  # the attention reads what x was
                h = h * 0.9
                x.add_(0.1)
            elif step == "update_view":  # the attention reads what x becomes
                h = h.view(h.shape)
                x.mul_(0.9)
            elif step == "slice_add_":
                h = h.clone()
                h[:, 1:].add_(shift)
        return x, h

    def _use(self, use: str, x: Tensor, output: Tensor, gate: Tensor, late: list[Tensor]) -> Tensor:
        if use == "add":
            x = x + output
        elif use == "iadd":
            x += output
        elif use == "gate":
            x = x + gate * output
        elif use == "mul_":
            output.mul_(gate)
            x = x + output
        elif use == "view_mul_":
            output.transpose(0, 1)[:1].mul_(0.5)
            x = x + output
        elif use == "out_setitem":
            output[:, :1] = 0.5
            x = x + output
        elif use == "x_setitem":
            x = x.clone()
            x[:, 1:] = x[:, 1:] + output[:, 1:]
        elif use == "replace":
            x = output
        elif use == "into_output":
            output.add_(x)
            x = output
        elif use == "twice":
            x = (x + output) * torch.sigmoid(output)
        elif use == "relu_":
            x = x + F.relu(output, inplace=True)
        elif use == "late":
            late.append(output)
        return x


class Transformer(nn.Module):
    """A video transformer: patchify, blocks, project back."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        attentions = [
            (Attention if each.context == "none" else ModalAttention)(each, spec.width, spec.heads)
            for each in spec.attentions
        ]
        self.proj_in = nn.Linear(4, spec.width)
        self.text_in = nn.Linear(6, spec.width)
        self.blocks = nn.ModuleList(Block(sites, spec, attentions) for sites in spec.blocks)
        self.proj_out = nn.Linear(spec.width, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [B, 4, F, S, 1], encoder_hidden_states [B, T, 6], timestep [B]."""
        x = self.proj_in(hidden_states.permute(0, 2, 3, 4, 1).flatten(1, 3))
        y = self.text_in(encoder_hidden_states)
        frequencies = torch.arange(self.spec.width, device=x.device) / 100
        temb = torch.sin(timestep[:, None] * frequencies)
        for block in self.blocks:
            x, y = block(x, y, temb)
        return self.proj_out(x), y
