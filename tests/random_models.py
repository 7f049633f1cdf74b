"""Small random transformers for hypothesis, and diffusers' hooks as the oracle for them.

A model is drawn as data (`Spec`) and built from it, so that a failure prints as the spec that fails. What is
drawn is what a graph pass can get wrong: what an attention returns (a tensor, several, views of one storage,
its residual), what is done to its input and its output (updates in place, uses of views, no use at all), one
module called several times, sizes that coincide.

The state of a model is a video `x` [B, F * S, C] and a text `y` [B, T, C]; temporal attention sees
[B * S, F, C], frame-wise attention [B * F, S, C].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention import AttentionModuleMixin
from hypothesis import strategies as st
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ specs

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


@dataclass(frozen=True)
class AttentionSpec:
    """One attention module: its kind, its mathematics, what it returns and what surrounds it."""

    kind: str = "self"
    math: str = "sdpa"
    returns: str = "tensor"
    fused_qkv: bool = False
    context: str = "none"
    dropout: str = "none"
    breaks: bool = False


@dataclass(frozen=True)
class Site:
    """One call of an attention: which one, how its input is prepared, how its outputs are used."""

    attention: int = 0
    prepare: tuple[str, ...] = ()
    uses: tuple[str, ...] = ("add",)
    break_before: bool = False
    break_after: bool = False


@dataclass(frozen=True)
class Spec:
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
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Schedule:
    """Skip ranges, windows and two generations of timesteps, none of which rises inside a generation."""

    ranges: tuple[int | None, int | None, int | None] = (2, 3, 4)
    windows: tuple[tuple[int, int], ...] = ((100, 800),) * 3
    generations: tuple[tuple[int, ...], ...] = ((900, 700, 600, 500, 300, 50), (700, 600, 500))


@dataclass
class Clock:
    """Stands in for `pipe.current_timestep`."""

    t: float = 1000.0

    def __call__(self) -> float:
        return self.t


def config_of(schedule: Schedule, clock: Callable[[], float]) -> PyramidAttentionBroadcastConfig:
    """diffusers' config for these models, in which an attention's name says its kind."""
    spatial, temporal, cross = schedule.ranges
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        temporal_attention_block_skip_range=temporal,
        cross_attention_block_skip_range=cross,
        spatial_attention_timestep_skip_range=schedule.windows[0],
        temporal_attention_timestep_skip_range=schedule.windows[1],
        cross_attention_timestep_skip_range=schedule.windows[2],
        spatial_attention_block_identifiers=(r"self_\d+$", r"frame_\d+$", r"joint_\d+$"),
        temporal_attention_block_identifiers=(r"temporal_\d+$",),
        cross_attention_block_identifiers=(r"cross_\d+$",),
        current_timestep_callback=clock,
    )


# ----------------------------------------------------------------------------------------------- models


class Attention(nn.Module, AttentionModuleMixin):
    """An attention module that diffusers' hooks take for one.

    Where it breaks, it does so in `forward` itself: a `forward` that breaks before it has computed anything is
    given up by Dynamo for every module of the class, and what it calls is then computed in every step.
    """

    def __init__(self, spec: AttentionSpec, width: int, heads: int) -> None:
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

    def __init__(self, sites: tuple[Site, ...], spec: Spec, attentions: list[Attention]) -> None:
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


class Model(nn.Module):
    """A video transformer: patchify, blocks, project back."""

    def __init__(self, spec: Spec) -> None:
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


def build(spec: Spec, seed: int = 0) -> Model:
    """The model, its parameters drawn from `seed` so that it neither dies out nor blows up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(spec).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return model


def inputs(spec: Spec, t: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of one step; everything changes with the seed, the text too."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(2, 4, spec.frames, spec.space, 1, generator=generator)
    encoder_hidden_states = torch.randn(2, spec.text, 6, generator=generator)
    return hidden_states, encoder_hidden_states, torch.full((2,), float(t))


# ----------------------------------------------------------------------------------------------- oracle


@dataclass
class Hooked:
    """A copy of a model with diffusers' hooks, which counts what the hooks reuse."""

    model: nn.Module
    config: PyramidAttentionBroadcastConfig
    computed: int = 0
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        apply_pyramid_attention_broadcast(self.model, self.config)
        for hook in self._hooks():
            hook.fn_ref.original_forward = self._counted(hook.fn_ref.original_forward)

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self.model(*args)

    def reset(self) -> None:
        """Start a new generation, as pipelines do at their end."""
        for hook in self._hooks():
            self.calls += hook.state.iteration
            hook.state.reset()

    def leave_alone(self, names: Iterable[str]) -> None:
        """Take the hooks off these modules, where there are any."""
        for module in map(self.model.get_submodule, names):
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook("pyramid_attention_broadcast")

    @property
    def reused(self) -> int:
        """Calls answered from a cache, up to the last reset."""
        return self.calls - self.computed

    def _hooks(self) -> Iterator[object]:
        for module in self.model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and "pyramid_attention_broadcast" in registry.hooks:
                yield registry.hooks["pyramid_attention_broadcast"]

    def _counted(self, forward: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.computed += 1
            return forward(*args, **kwargs)

        return counted


def generate(
    model: Callable[..., tuple[Tensor, ...]], spec: Spec, timesteps: Iterable[float], clock: Clock, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """The outputs of each step of one generation."""
    outputs = []
    # tensors made in inference mode may not be updated outside of it
    inference = any(attention.context == "inference" for attention in spec.attentions)
    for step, t in enumerate(timesteps):
        clock.t = t
        with torch.inference_mode() if inference else torch.no_grad():
            output = model(*inputs(spec, t, seed=100 * seed + step))
        outputs.append(tuple(each.clone() for each in output))
    return outputs


def first_difference(left: list[tuple[Tensor, ...]], right: list[tuple[Tensor, ...]]) -> str | None:
    """Where two trajectories differ in a bit, and by how much; `None` if nowhere."""
    for step, (a, b) in enumerate(zip(left, right, strict=True)):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            if not torch.equal(one, other):
                return f"step {step}, output {i}: off by {(one - other).abs().max().item():.3g}"
    return None


# ------------------------------------------------------------------------------------------- strategies

SIZES = st.sampled_from(
    [
        {"frames": 3, "space": 4, "text": 5, "heads": 2},
        {"frames": 4, "space": 4, "text": 4, "heads": 4},
        {"frames": 2, "space": 2, "text": 2, "heads": 2},
        {"frames": 1, "space": 4, "text": 3, "heads": 1},
        {"frames": 3, "space": 1, "text": 1, "heads": 3},
        {"frames": 2, "space": 3, "text": 6, "heads": 2},
    ]
)


@st.composite
def attention_specs(draw: st.DrawFn, breaks: bool = False, inference: bool = True) -> AttentionSpec:
    """Attention modules; `inference` allows inference mode inside, which `torch.export` does not take.

    One that breaks enters no mode: Dynamo gives up the frame around it, and with it that of every attention
    of the class, broadcast before or not.
    """
    does_break = draw(st.booleans()) if breaks else False
    contexts = ("none", "none", "no_grad", *(("inference",) if inference else ()))
    return AttentionSpec(
        kind=draw(st.sampled_from(KINDS)),
        math=draw(st.sampled_from(MATHS)),
        returns=draw(st.sampled_from(RETURNS)),
        fused_qkv=draw(st.booleans()),
        context="none" if does_break else draw(st.sampled_from(contexts)),
        dropout=draw(st.sampled_from(("none", "zero", "eval"))),
        breaks=does_break,
    )


TRACEABLE_USES = tuple(set(USES) - {"out_setitem", "x_setitem", "iadd"})
"""What `symbolic_trace` traces as eager does it: its proxies take no `x[i] = y`, and make `x = x + y` of `x += y`."""

TRACEABLE_PREPARATIONS = ("norm", "modulate", "clone_mul_", "update_behind", "update_view", "slice_add_")

PURE_USES = ("add", "gate", "iadd", "x_setitem", "twice", "late", "unused")
"""Uses that leave an output as it is."""


@st.composite
def specs(draw: st.DrawFn, breaks: bool = False, traceable: bool = False, exportable: bool = False) -> Spec:
    """Models of one or two blocks with one to three attentions.

    Where an attention is called several times its outputs are not updated in place: the hooks then hand the
    same tensor to both calls, and an update by one user is seen by the other.
    """
    attentions = draw(st.lists(attention_specs(breaks, inference=not exportable), min_size=1, max_size=3))
    shape = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    called = draw(st.lists(st.integers(0, len(attentions) - 1), min_size=sum(shape), max_size=sum(shape)))
    feed_forward = draw(st.sampled_from(("add", "none") if traceable else ("add", "in_place", "none")))
    sites = []
    for attention in called:
        is_shared = called.count(attention) > 1
        uses = [use for use in USES if not traceable or use in TRACEABLE_USES]
        if is_shared:
            uses = [use for use in uses if use in PURE_USES]
        prepare = st.sampled_from(TRACEABLE_PREPARATIONS if traceable else PREPARATIONS)
        sites.append(
            Site(
                attention=attention,
                prepare=draw(st.lists(prepare, max_size=3, unique=True).map(tuple)),
                uses=draw(st.tuples(st.sampled_from(uses), st.sampled_from(uses))),
                break_before=draw(st.booleans()) if breaks else False,
                break_after=draw(st.booleans()) if breaks else False,
            )
        )
    blocks, rest = [], sites
    for count in shape:
        blocks.append(tuple(rest[:count]))
        rest = rest[count:]
    return Spec(tuple(attentions), tuple(blocks), feed_forward, **draw(SIZES))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Ranges of 1 to 4 or none, windows, and two generations of up to 6 steps, the second starting higher."""
    ranges = draw(st.tuples(*(st.sampled_from((2, 3, 4, 1, None)) for _ in range(3))))
    windows = draw(st.tuples(*(st.sampled_from(((100, 800), (0, 1001), (300, 700))) for _ in range(3))))
    timesteps = st.lists(st.integers(0, 20).map(lambda t: 50 * t), min_size=3, max_size=6)
    generations = [tuple(sorted(draw(timesteps), reverse=True)) for _ in range(2)]
    generations[1] = (max(1000, generations[0][0]), *generations[1])
    if ranges == (None, None, None):
        ranges = (2, None, None)
    return Schedule(ranges, windows, tuple(generations))
