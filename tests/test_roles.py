"""Roles by dataflow: with a `PABConfig` an attention is what it computes, whatever it is called.

Every model here takes a timestep and is traced by Dynamo; `roles` reads what the backend found. Names mislead
on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from pab_fx import MLPBroadcast, PABBackend, PABConfig

WIDTH, IMAGE, TEXT = 8, 6, 5


def config(**fields: Any) -> PABConfig:
    """Every role every 2nd step."""
    ranges = {f"{role}_attention_block_skip_range": 2 for role in ("spatial", "temporal", "cross")}
    return PABConfig(**ranges, **fields)


def traced(model: nn.Module, *args: Any, config: PABConfig, **kwargs: Any) -> PABBackend:
    """The backend after one call of the compiled model."""
    torch._dynamo.reset()
    backend = PABBackend(config, inner="eager")
    with torch.no_grad():
        torch.compile(model.eval().requires_grad_(False), backend=backend)(*args, **kwargs)
    return backend


def roles(model: nn.Module, *args: Any, **fields: Any) -> list[str]:
    """The roles of the attentions of a model, in the order in which they run."""
    return [region.role for region in traced(model, *args, config=config(**fields)).regions if region.is_broadcast]


def image_and_text() -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens [2, 6, 8], text tokens [2, 5, 8], timestep [1]."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, length, WIDTH, generator=generator) for length in (IMAGE, TEXT))
    return image, text, torch.tensor([500.0])


class Attention(nn.Module):
    """Plain attention; subclasses change one thing each."""

    def __init__(self, heads: int = 2, kv_width: int = WIDTH) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(WIDTH, kv_width), nn.Linear(WIDTH, kv_width)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, H, S, D]"""
        return x.unflatten(-1, (-1, WIDTH // self.heads)).transpose(1, 2)

    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query, key, value = self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context))
        return self.to_out(self.core(query, key, value).transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """An attention whose class promises something."""


class Host(nn.Module):
    """Embeds image, text and timestep, and runs `steps(self, image, text)` with the given modules."""

    def __init__(self, steps: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.steps = steps
        self.image_in, self.text_in, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, image: Tensor, text: Tensor, timestep: Tensor) -> Any:
        image = self.image_in(image) + torch.sin(timestep).view(-1, 1, 1)
        return self.steps(self, image, self.text_in(text))


# ------------------------------------------------------------------------------------- names that mislead


def test_a_class_called_cross_attention_that_attends_itself_is_spatial() -> None:
    model = Host(lambda self, x, y: x + self.cross_attn(x) + y.mean(), cross_attn=CrossAttention())
    assert roles(model, *image_and_text()) == ["spatial"]


def test_a_module_called_spatial_that_attends_text_is_cross() -> None:
    model = Host(lambda self, x, y: x + self.spatial_attn(x, y), spatial_attn=Attention())
    assert roles(model, *image_and_text()) == ["cross"]


def test_names_override_the_dataflow() -> None:
    model = Host(lambda self, x, y: x + self.spatial_attn(x, y), spatial_attn=Attention())
    assert roles(model, *image_and_text(), temporal_attention_block_identifiers=("spatial_attn",)) == ["temporal"]


def test_linear_layers_called_attention_are_none() -> None:
    mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
    model = Host(lambda self, x, y: self.attn(x) + self.attention(x), attn=nn.Linear(WIDTH, WIDTH), attention=mlp)
    assert roles(model, *image_and_text()) == []


# ---------------------------------------------------------------------------------- spellings of attention


class Written(nn.Module):
    """A block with its attention written out, residual and feed-forward included."""

    def __init__(self, spelling: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ff = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x_norm = self.norm(x)
        context = x_norm if context is None else context
        x = x + self.o(self.spelling(self.q(x_norm), self.k(context), self.v(context)))
        return x + self.ff(x)


def _einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("bqd,bkd->bqk", query, key).softmax(-1)
    return torch.einsum("bqk,bkd->bqd", scores, value)


def _softmax_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ value


SPELLINGS = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0],
    "matmul_softmax": lambda q, k, v: (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v),
    "baddbmm": lambda q, k, v: torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0).softmax(-1) @ v,
    "einsum": _einsum,
    "linear": lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v),
    "softmax_by_hand": _softmax_by_hand,
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("is_cross", [False, True], ids=["self", "cross"])
def test_attention_written_out_in_a_block_has_the_role_of_its_dataflow(
    spelling: Callable[..., Tensor], is_cross: bool
) -> None:
    def steps(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, y if is_cross else None)
        return self.out(x) + y.mean()

    model = Host(steps, blocks=nn.ModuleList([Written(spelling), Written(spelling)]))
    assert roles(model, *image_and_text()) == ["cross" if is_cross else "spatial"] * 2


class GroupedQuery(Attention):
    def __init__(self) -> None:
        super().__init__(heads=4, kv_width=WIDTH // 2)

    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Rotary(Attention):
    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().core(self.rotate(query), self.rotate(key), value)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * torch.arange(2)[None]
        left, right = x.chunk(2, dim=-1)
        return x * angles.cos().repeat(1, 2) + torch.cat([-right, left], dim=-1) * angles.sin().repeat(1, 2)


@torch.library.custom_op("pab_fx_tests::my_attention", mutates_args=())
def my_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A kernel of one's own; its name says that it attends."""
    return F.scaled_dot_product_attention(query, key, value)


@torch.library.custom_op("pab_fx_tests::flash_fwd", mutates_args=())
def flash_fwd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A kernel whose name does not."""
    return F.scaled_dot_product_attention(query, key, value)


my_attention.register_fake(lambda query, key, value: torch.empty_like(query))
flash_fwd.register_fake(lambda query, key, value: torch.empty_like(query))


class CustomOp(Attention):
    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return my_attention(query, key, value)


class FlashOp(Attention):
    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.pab_fx_tests.flash_fwd(query, key, value)


@pytest.mark.parametrize("kind", [Attention, GroupedQuery, Rotary, CustomOp, FlashOp])
def test_kinds_of_attention_modules(kind: type[Attention]) -> None:
    def steps(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.a(x)
        return self.out(x + self.b(x, y))

    assert roles(Host(steps, a=kind(), b=kind()), *image_and_text()) == ["spatial", "cross"]


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_multi_head_attention(need_weights: bool) -> None:
    def steps(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.a(x, x, x, need_weights=need_weights)[0]
        return x + self.b(x, y, y, need_weights=need_weights)[0]

    a, b = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
    assert roles(Host(steps, a=a, b=b), *image_and_text()) == ["spatial", "cross"]


def test_the_function_multi_head_attention_forward() -> None:
    def attend(mha: nn.MultiheadAttention, x: Tensor, y: Tensor) -> Tensor:
        output, _ = F.multi_head_attention_forward(
            *(x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1), WIDTH, 2, mha.in_proj_weight, mha.in_proj_bias),
            *(None, None, False, 0.0, mha.out_proj.weight, mha.out_proj.bias),
        )
        return output.transpose(0, 1)

    def steps(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x + attend(self.a, x, x)
        return self.out(x + attend(self.b, x, y))

    a, b = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
    assert roles(Host(steps, a=a, b=b), *image_and_text()) == ["spatial", "cross"]


def test_attention_in_a_function_with_rotary_tables_from_outside() -> None:
    def attend(self: Attention, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        query, key = (
            torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * table[: z.shape[2]]).flatten(-2)
            for z in (self.split(self.to_q(x)), self.split(self.to_k(y)))
        )
        return self.to_out(self.core(query, key, self.split(self.to_v(y))).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.proj = Attention(), Attention(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor, angles: Tensor, timestep: Tensor) -> Tensor:
            x = self.proj(x) + torch.sin(timestep)
            table = torch.polar(torch.ones_like(angles), angles)
            x = x + attend(self.a, x, x, table)
            return x + attend(self.b, x, y, table)

    image, text, timestep = image_and_text()
    assert roles(Model(), image, text, torch.randn(IMAGE, 2), timestep) == ["spatial", "cross"]


# --------------------------------------------------------------------------------------- which sequence


class JointProjections(Attention):
    """Text has projections of its own, as in MMDiT; queries and keys are concatenated."""

    def __init__(self, text_queries: bool) -> None:
        super().__init__()
        self.text_queries = text_queries
        self.add_q, self.add_k, self.add_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query, key = self.to_q(x), torch.cat([self.add_k(y), self.to_k(x)], dim=1)
        value = torch.cat([self.add_v(y), self.to_v(x)], dim=1)
        if self.text_queries:
            query = torch.cat([self.add_q(y), query], dim=1)
        attended = self.core(self.split(query), self.split(key), self.split(value)).transpose(1, 2).flatten(2)
        return self.to_out(attended)[:, -x.shape[1] :]


class Compressed(Attention):
    """Keys and values are a shorter version of the queries' sequence, as in PVT and PixArt-Sigma."""

    def __init__(self, by_convolution: bool) -> None:
        super().__init__()
        self.by_convolution = by_convolution
        self.compress, self.norm = nn.Conv1d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        channels_first = x.transpose(1, 2)
        short = self.compress(channels_first) if self.by_convolution else F.avg_pool1d(channels_first, 2)
        return super().forward(x, self.norm(short.transpose(1, 2)))


def _joint(self: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([y, x], dim=1)
    z = z + self.attn(z)
    return z[:, TEXT:], z[:, :TEXT]


def _joint_then_cross(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = _joint(self, x, y)
    return self.out(x + self.attn2(x, y))


def _refined_text(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    y = y + self.refiner(y)
    return self.out(x + self.attn(x, y))


def _both_ways(self: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x + self.a(x, y)
    y = y + self.b(y, x)
    return self.out(x), y


def _time_token_in_both(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    token = y.new_ones(y.shape[0], 1, WIDTH)
    return self.out(
        torch.cat([x, token], dim=1) + self.attn(torch.cat([x, token], dim=1), torch.cat([token, y], dim=1))
    )


SEQUENCES: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], nn.Module]], list[str]]] = {
    "joint, concatenated tokens": (_joint, {"attn": Attention}, ["spatial"]),
    "joint, concatenated queries": (
        lambda self, x, y: x + self.cross_attn(x, y),
        {"cross_attn": lambda: JointProjections(text_queries=True)},
        ["spatial"],
    ),
    "keys of image and text": (
        lambda self, x, y: x + self.cross_attn(x, y),
        {"cross_attn": lambda: JointProjections(text_queries=False)},
        ["spatial"],
    ),
    "cross after joint": (_joint_then_cross, {"attn": Attention, "attn2": Attention}, ["spatial", "cross"]),
    "text refined by itself": (_refined_text, {"refiner": Attention, "attn": Attention}, ["spatial", "cross"]),
    "pooled text modulates": (
        lambda self, x, y: x + self.attn(x * (1 + y.mean(1, keepdim=True)), y),
        {"attn": Attention},
        ["cross"],
    ),
    "image and text attend each other": (_both_ways, {"a": Attention, "b": Attention}, ["cross", "cross"]),
    "a constant token in both": (_time_token_in_both, {"attn": Attention}, ["cross"]),
    "one text token": (lambda self, x, y: x + self.attn(x, y[:, :1]), {"attn": Attention}, ["cross"]),
    "text's dtype only": (lambda self, x, y: x + self.attn(x.type_as(y), y), {"attn": Attention}, ["cross"]),
    "keys compressed by convolution": (
        lambda self, x, y: x + self.attn(x) + y.mean(),
        {"attn": lambda: Compressed(by_convolution=True)},
        ["spatial"],
    ),
    "keys compressed by pooling": (
        lambda self, x, y: x + self.attn(x) + y.mean(),
        {"attn": lambda: Compressed(by_convolution=False)},
        ["spatial"],
    ),
}


@pytest.mark.parametrize("case", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_cross_is_what_reads_another_sequence(case: tuple[Any, dict[str, Callable[[], nn.Module]], list[str]]) -> None:
    steps, modules, expected = case
    model = Host(steps, **{name: make() for name, make in modules.items()})
    assert roles(model, *image_and_text()) == expected


def test_learned_queries_that_read_tokens_are_cross_both_ways() -> None:
    class Perceiver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(1, 3, WIDTH))
            self.proj, self.read, self.write = nn.Linear(WIDTH, WIDTH), Attention(), Attention()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            x = self.proj(x) + torch.sin(timestep)
            latents = self.latents.expand(x.shape[0], -1, -1)
            latents = latents + self.read(latents, x)
            return x + self.write(x, latents)

    image, _, timestep = image_and_text()
    assert roles(Perceiver(), image, timestep) == ["cross", "cross"]


# ----------------------------------------------------------------------------------------------- frames


class Video(nn.Module):
    """One attention over the frames, each frame, or everything of a video; its name says another one."""

    NAMES = {"temporal": "spatial_attn", "spatial": "temporal", "full": "temporal_attn"}

    def __init__(self, over: str, layout: str, patchify: str) -> None:
        super().__init__()
        self.over, self.layout, self.patchify = over, layout, patchify
        self.proj = {"linear": nn.Linear(4, WIDTH), "conv2d": nn.Conv2d(4, WIDTH, 1), "conv3d": nn.Conv3d(4, WIDTH, 1)}[
            patchify
        ]
        self.add_module(self.NAMES[over], Attention())
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states) + torch.sin(timestep)  # [B, F, S, C]
        batch, frames, space, width = x.shape
        if self.over == "temporal":
            x = x.transpose(1, 2).reshape(batch * space, frames, width)
        else:
            x = x.reshape(-1, space if self.over == "spatial" else frames * space, width)
        return self.out(x + getattr(self, self.NAMES[self.over])(x))

    def embed(self, x: Tensor) -> Tensor:
        if self.layout == "bfchw":
            x = x.transpose(1, 2)  # [B, C, F, H, W]
        if self.patchify == "linear":
            return self.proj(x.permute(0, 2, 3, 4, 1)).flatten(2, 3)
        if self.patchify == "conv3d":
            return self.proj(x).flatten(3).permute(0, 2, 3, 1)
        frames = x.shape[2]
        x = self.proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        return x.unflatten(0, (-1, frames))


VIDEO_SIZES = ((3, 2, 2), (4, 2, 2), (4, 4, 4), (2, 2, 2))
PATCHIFY = ("linear", "conv2d", "conv3d")


@pytest.mark.parametrize(
    ("over", "patchify", "size"),  # each pair of two
    [
        (over, PATCHIFY[(i + j) % 3], size)
        for i, over in enumerate(("temporal", "spatial", "full"))
        for j, size in enumerate(VIDEO_SIZES)
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["bcfhw", "bfchw"])
def test_temporal_is_what_attends_the_frames_alone(
    over: str, layout: str, patchify: str, size: tuple[int, int, int]
) -> None:
    """Also where frames, tokens, channels or heads are as many as each other."""
    frames, height, width = size
    video = torch.randn(2, 4, frames, height, width)
    model = Video(over, layout, patchify)
    expected = "temporal" if over == "temporal" else "spatial"
    assert roles(model, video if layout == "bcfhw" else video.transpose(1, 2), torch.tensor([500.0])) == [expected]


@pytest.mark.parametrize("over", ["spatial", "full"])
def test_a_single_frame_attends_space(over: str) -> None:
    assert roles(Video(over, "bcfhw", "linear"), torch.randn(2, 4, 1, 2, 2), torch.tensor([500.0])) == ["spatial"]


# ------------------------------------------------------------------------- what the region takes with it


def test_a_residual_around_the_attention_is_not_kept() -> None:
    """A module that adds its input, and a model that is little else, go on adding what the step gives them."""

    class WithResidual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(self.norm(x))[:, None].chunk(3, dim=-1)
            return x + self.proj(F.scaled_dot_product_attention(query, key, value)[:, 0])

    model = Host(lambda self, x, y: self.block(x) + y.mean(), block=WithResidual())
    backend = PABBackend(config(), inner="eager")
    torch._dynamo.reset()
    compiled = torch.compile(model.eval().requires_grad_(False), backend=backend)
    image, text, _ = image_and_text()
    with torch.no_grad():
        first = compiled(image, text, torch.tensor([700.0]))
        reusing = compiled(2 * image, text, torch.tensor([600.0]))
    (region,) = backend.regions
    assert backend.report().reused == 1
    assert not torch.equal(first, reusing), f"the residual is part of what is kept: {region.outputs}"


def test_a_model_that_is_one_attention_is_no_region() -> None:
    def steps(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x + self.attn(x, y, y, need_weights=False)[0]

    model = Host(steps, attn=nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    (region,) = traced(model, *image_and_text(), config=config()).regions
    assert region.name.startswith("attn")


# ------------------------------------------------------------------------------------ models of diffusers

DIFFUSERS_ROLES = {
    "LatteTransformer3DModel": {
        "transformer_blocks.0.attn1": "spatial",
        "transformer_blocks.0.attn2": "cross",
        "temporal_transformer_blocks.0.attn1": "temporal",
    },
    "PixArtTransformer2DModel": {"transformer_blocks.0.attn1": "spatial", "transformer_blocks.0.attn2": "cross"},
    "CogVideoXTransformer3DModel": {"transformer_blocks.0.attn1": "spatial"},
    "FluxTransformer2DModel": {"transformer_blocks.0.attn": "spatial", "single_transformer_blocks.0.attn": "spatial"},
    "WanTransformer3DModel": {"blocks.0.attn1": "spatial", "blocks.0.attn2": "cross"},
    "WanTransformer3DModel-timestep_per_token": {"blocks.0.attn1": "spatial", "blocks.0.attn2": "cross"},
    # diffusers has no flag for LTX's and Kandinsky's cross-attentions
    "LTXVideoTransformer3DModel": {"transformer_blocks.0.attn1": "spatial", "transformer_blocks.0.attn2": "cross"},
    "Kandinsky5Transformer3DModel": {
        "text_transformer_blocks.0.self_attention": "spatial",
        "visual_transformer_blocks.0.self_attention": "spatial",
        "visual_transformer_blocks.0.cross_attention": "cross",
    },
    # joint attention, then cross-attention to the text that it has updated
    "MotifVideoTransformer3DModel": {
        "transformer_blocks.0.attn": "spatial",
        "transformer_blocks.0.cross_attn": "cross",
        "single_transformer_blocks.0.cross_attn": "cross",
        "single_transformer_blocks.0.attn": "spatial",
        "single_transformer_blocks.1.attn": "spatial",
    },
}


def entry_of(name: str) -> zoo.Entry:
    if name not in zoo.BY_NAME:
        pytest.skip(f"the installed diffusers has no {name}")
    return zoo.BY_NAME[name]


def of_zoo(entry: zoo.Entry, config: PABConfig) -> PABBackend:
    return traced(entry.build(), config=config, **entry.inputs(seed=0), **entry.timestep(500.0), return_dict=False)


@pytest.mark.parametrize("name", DIFFUSERS_ROLES)
def test_roles_of_diffusers_models(name: str) -> None:
    entry = entry_of(name)
    if name in zoo.OF_TWO_BLOCKS:
        entry = entry.of_one_block()
    found = {region.name: region.role for region in of_zoo(entry, config()).regions if region.is_broadcast}
    assert found == DIFFUSERS_ROLES[name]


FEED_FORWARDS = {
    "LatteTransformer3DModel": ("transformer_blocks.1.ff", "temporal_transformer_blocks.1.ff"),
    "WanTransformer3DModel": ("blocks.1.ffn",),
    "CogVideoXTransformer3DModel": ("transformer_blocks.1.ff",),
    "PixArtTransformer2DModel": ("transformer_blocks.1.ff",),
    "FluxTransformer2DModel": ("transformer_blocks.1.ff", "transformer_blocks.1.ff_context"),
}


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_mlp_takes_the_feed_forwards_of_the_chosen_blocks_and_nothing_else(name: str) -> None:
    """No time embedder and no caption projection, which project, bend and project back as well."""
    backend = of_zoo(entry_of(name), PABConfig(mlp=MLPBroadcast(timesteps=(500,), blocks=(1,), skip_count=2)))
    broadcast = {region.name for region in backend.regions if region.is_broadcast}
    assert broadcast == set(FEED_FORWARDS[name])
