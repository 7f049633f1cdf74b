"""What else people do to a pipeline, together with PAB: the same pictures as the hooks, or an error or warning."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import diffusers
import pipelines
import pytest
import torch
import zoo
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.models.attention_dispatch import attention_backend
from pipelines.oracle import observed, plain_run
from reference import Part, skip_blocks
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pab_fx
from pab_fx import Blocks, Every, PABConfig, Policy, Residual, Taylor

Change = Callable[[Any], Any]
PIPELINE = "FluxPipeline"


def config_of(clock: Callable[[], float] | None) -> Any:
    return zoo.diffusers_config(clock, ranges=(2, 3, 3), window=(100, 900))  # type: ignore[arg-type]


def changed(*changes: Change, name: str = PIPELINE) -> pipelines.PipelineEntry:
    """An entry whose pipeline is built and then changed, one after the other."""
    entry = pipelines.BY_NAME[name]

    def build() -> Any:
        pipe = entry.build()
        for change in changes:
            change(pipe)
        return pipe

    return replace(entry, build=build)


@cache
def timesteps_of(name: str) -> list[float]:
    """Whatever is changed, the steps are the same."""
    return plain_run(pipelines.BY_NAME[name])[1]


BLOCKS = Policy(Blocks(), Every(3, warmup=2), Taylor(1, of=Residual()))


def hooked_run(entry: pipelines.PipelineEntry, policy: Policy | None = None) -> torch.Tensor:
    """As the oracle's, with each branch's model built anew: a deep copy shares its hooks' modules with the original.

    With a policy of blocks, they are skipped by it in place of what the hooks do.
    """
    pipe, known = entry.build(), timesteps_of(entry.name)
    calls: Counter[str] = Counter()
    copies: dict[tuple[str, int], Any] = {}
    position = 0

    def on_step(_: Any) -> None:
        nonlocal position
        position += 1
        calls.clear()

    def forward(name: str, *args: Any, **kwargs: Any) -> Any:
        key = (name, calls[name])
        calls[name] += 1
        if key not in copies:
            copies[key] = getattr(entry.build(), name)
            if policy is None:
                apply_pyramid_attention_broadcast(copies[key], config_of(lambda: known[position]))
            else:
                skip_blocks(copies[key], Part(policy, len(known)), lambda: (position, known[position]))
        return copies[key](*args, **kwargs)

    for name in entry.denoisers:
        getattr(pipe, name).forward = partial(forward, name)
    with observed(pipe, on_step):
        return pipelines.run(pipe, entry)


def check(pipe: Any, pab: pab_fx.PAB, entry: pipelines.PipelineEntry, policy: Policy | None = None) -> None:
    """The next generation is the hooks', for a pipeline in the state that `entry` builds; it reuses, and it shows."""
    output = pipelines.run(pipe, entry)
    assert torch.equal(output, hooked_run(entry, policy))
    assert pab.report().reused > 0  # what was counted for weights that are no more is not in it
    assert not torch.equal(output, pipelines.run(entry.build(), entry))


@pytest.fixture
def enabled() -> Iterator[tuple[Any, pab_fx.PAB]]:
    pipe = pipelines.BY_NAME[PIPELINE].build()
    with pab_fx.enable(pipe, config_of(None), inner="eager") as pab:
        yield pipe, pab


def before_and_between(
    change: Change, name: str = PIPELINE, undo: Change | None = None, policy: Policy | None = None
) -> None:
    """The change before `enable`; and after a generation with it on, with `undo` after that."""
    entry, config = changed(change, name=name), policy or config_of(None)
    pipe = entry.build()
    with pab_fx.enable(pipe, config, inner="eager") as pab:
        check(pipe, pab, entry, policy)
    pipe = pipelines.BY_NAME[name].build()
    with pab_fx.enable(pipe, config, inner="eager") as pab:
        pipelines.run(pipe, pipelines.BY_NAME[name])
        change(pipe)
        check(pipe, pab, entry, policy)
        if undo is not None:
            undo(pipe)
            check(pipe, pab, changed(change, undo, name=name), policy)


# --------------------------------------------------------------------------------------------------- adapters


def lora(name: str, seed: int, pipe: Any, targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")) -> None:
    """Add an adapter of random weights."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = pipe.transformer
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=name)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.normal_(0, 0.3)
                parameter.requires_grad_(False)


def saved_lora(seed: int) -> dict[str, torch.Tensor]:
    """An adapter as it is saved: a state dict of the transformer's layers."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    pipe = pipelines.BY_NAME[PIPELINE].build()
    lora("made", seed, pipe)
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="made")
    return {f"transformer.{name}": tensor for name, tensor in layers.items()}


def loaded(pipe: Any) -> None:
    pipe.load_lora_weights(saved_lora(3), adapter_name="loaded")


FIRST, SECOND = partial(lora, "first", 1), partial(lora, "second", 2, targets=("to_q", "to_k", "proj_out"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((FIRST, lambda p: p.fuse_lora(), lambda p: p.unfuse_lora()), id="fuse"),
        pytest.param((FIRST, SECOND, lambda p: p.set_adapters("first")), id="switch", marks=pytest.mark.slow),
        pytest.param((FIRST, lambda p: p.set_adapters(["first"], [2.0])), id="scale", marks=pytest.mark.slow),
        pytest.param((FIRST, lambda p: p.unload_lora_weights()), id="unload", marks=pytest.mark.slow),
        pytest.param((FIRST, lambda p: p.disable_lora(), lambda p: p.enable_lora()), id="off", marks=pytest.mark.slow),
        pytest.param(
            (FIRST, SECOND, lambda p: p.set_adapters(["first", "second"], [0.5, 1.0]), lambda p: p.fuse_lora()),
            id="both",
            marks=pytest.mark.slow,
        ),
        pytest.param((FIRST, SECOND, lambda p: p.delete_adapters("first")), id="delete", marks=pytest.mark.slow),
        pytest.param((loaded, lambda p: p.unload_lora_weights()), id="load"),
        pytest.param(
            (loaded, lambda p: p.fuse_lora(), lambda p: p.unfuse_lora()), id="load and fuse", marks=pytest.mark.slow
        ),
        pytest.param((FIRST, loaded, lambda p: p.set_adapters(["loaded"])), id="load another", marks=pytest.mark.slow),
    ],
)
def test_adapters_change_between_generations(enabled: tuple[Any, pab_fx.PAB], changes: tuple[Change, ...]) -> None:
    pipe, pab = enabled
    for i, change in enumerate(changes):
        change(pipe)
        check(pipe, pab, changed(*changes[: i + 1]))
    assert pab.report().roles[0].modules == 2  # an adapter makes no other attention of one


@pytest.mark.slow
def test_weights_loaded_between_generations_are_compiled_by_block() -> None:
    pipe = pipelines.BY_NAME[PIPELINE].build()
    with pab_fx.enable(pipe, config_of(None), inner="eager", regional=True) as pab:
        pipelines.run(pipe, pipelines.BY_NAME[PIPELINE])
        loaded(pipe)
        check(pipe, pab, changed(loaded))
        assert not pab.report().warnings


@pytest.mark.slow
def test_an_adapter_that_is_there_before_enable_is_broadcast() -> None:
    entry = changed(FIRST)
    pipe = entry.build()
    with pab_fx.enable(pipe, config_of(None), inner="eager") as pab:
        check(pipe, pab, entry)


def test_an_adapter_switched_in_a_generation_keeps_what_was_counted_and_kept() -> None:
    def switch(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i in (2, 4):
            (pipe.disable_lora if i == 2 else pipe.enable_lora)()
        return kwargs

    entry = changed(FIRST)
    pipe = entry.build()
    apply_pyramid_attention_broadcast(pipe.transformer, config_of(lambda: float(pipe.current_timestep)))
    expected = pipelines.run(pipe, entry, callback_on_step_end=switch)
    assert not torch.equal(expected, pipelines.run(entry.build(), entry, callback_on_step_end=switch))
    pipe = entry.build()
    with pab_fx.enable(pipe, config_of(None), inner="eager") as pab:
        assert torch.equal(pipelines.run(pipe, entry, callback_on_step_end=switch), expected)
        assert pab.report().reused > 0


def test_a_model_that_dynamo_gives_up_on_says_so(enabled: tuple[Any, pab_fx.PAB]) -> None:
    """It limits how often a changed model is compiled; then it runs the model as it is."""
    pipe, pab = enabled
    entry = pipelines.BY_NAME[PIPELINE]
    with torch._dynamo.config.patch(recompile_limit=1):
        pipelines.run(pipe, entry)
        FIRST(pipe)
        with pytest.warns(UserWarning, match=r"runs without broadcasting now.*recompile_limit"):
            output = pipelines.run(pipe, entry)
    assert torch.equal(output, pipelines.run(changed(FIRST).build(), entry))
    assert "recompile_limit" in str(pab.report())


# --------------------------------------------------------------------------------------- weights of other types


def int8(pipe: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="quantisation needs torchao")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())


def int4(pipe: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="quantisation needs torchao")
    torchao.quantize_(pipe.transformer, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))


@pytest.mark.slow
@pytest.mark.parametrize("quantise", [int8, int4])
def test_quantised_weights_are_broadcast(quantise: Change) -> None:
    before_and_between(quantise)


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def leaves_offloaded(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.slow
@pytest.mark.parametrize("change", [casting, leaves_offloaded])
def test_hooks_on_single_layers_break_graphs_and_what_is_left_alone_is_told(
    enabled: tuple[Any, pab_fx.PAB], change: Change
) -> None:
    """An attention of two outputs is cut in pieces, none of which yields both."""
    pipe, pab = enabled
    pipelines.run(pipe, pipelines.BY_NAME[PIPELINE])
    reused = pab.report().reused
    change(pipe)
    entry = changed(change)
    with pytest.warns(UserWarning, match=r"computed in every step.*: transformer_blocks\.0\.attn"):
        output = pipelines.run(pipe, entry)
    assert "left alone: transformer_blocks.0.attn" in str(pab.report())
    assert pab.report().reused > reused  # the others
    assert not torch.equal(output, pipelines.run(entry.build(), entry))


def blocks_offloaded(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def model_offloaded(pipe: Any) -> None:
    pytest.importorskip("accelerate", reason="CPU offload needs accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("change", [blocks_offloaded, model_offloaded])
def test_an_offloaded_model_is_broadcast(change: Change) -> None:
    """On a CPU nothing moves, but the hooks that would move it are there."""
    before_and_between(change)


def test_a_model_that_is_offloaded_layer_by_layer_is_refused() -> None:
    """Set up as `enable_sequential_cpu_offload` does; that itself fails between a CPU and a CPU, without PAB too."""
    hooks = pytest.importorskip("accelerate.hooks", reason="CPU offload needs accelerate")
    pipe = pipelines.BY_NAME["CogVideoXPipeline"].build()
    model = pipe.transformer
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(io_same_device=True), append=True)
    hooks.attach_align_device_hook(model, torch.device("cpu"), offload=True, weights_map=weights)
    for options in ({}, {"regional": True}):
        with pytest.raises(ValueError, match=r"layer by layer \(enable_sequential_cpu_offload\).*enable_group_offload"):
            pab_fx.enable(pipe, config_of(None), inner="eager", **options)
    hooks.remove_hook_from_submodules(model)
    model.load_state_dict(weights, assign=True)
    with pab_fx.enable(pipe, config_of(None), inner="eager") as pab:
        check(pipe, pab, pipelines.BY_NAME["CogVideoXPipeline"])


def test_the_data_type_may_change_between_generations(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    entry = changed(lambda pipe: pipe.to(dtype=torch.bfloat16))

    def call() -> pipelines.Kwargs:
        given = pipelines.BY_NAME[PIPELINE].call()
        return {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in given.items()}

    entry = replace(entry, call=call)
    pipelines.run(pipe, pipelines.BY_NAME[PIPELINE])
    check(pipe.to(dtype=torch.bfloat16), pab, entry)


# ------------------------------------------------------------------------------------- kernels and processors


@pytest.mark.slow
@pytest.mark.parametrize("name", [PIPELINE, "WanPipeline"])
def test_an_attention_backend_is_chosen_before_and_between(name: str) -> None:
    before_and_between(
        lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
        name,
        undo=lambda pipe: pipe.transformer.set_attention_backend("native"),
    )


@pytest.mark.slow
def test_flex_attention_is_broadcast() -> None:
    before_and_between(lambda pipe: pipe.transformer.set_attention_backend("flex"))


def test_an_attention_backend_is_chosen_by_context(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    with attention_backend("_native_math"):
        check(pipe, pab, pipelines.BY_NAME[PIPELINE])
    check(pipe, pab, pipelines.BY_NAME[PIPELINE])


@pytest.mark.slow
@pytest.mark.parametrize("name", [PIPELINE, "CogVideoXPipeline", "WanPipeline"])
def test_projections_are_fused_before_and_between(name: str) -> None:
    before_and_between(
        lambda pipe: pipe.transformer.fuse_qkv_projections(),
        name,
        undo=lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    )


class Doubling(diffusers.models.transformers.transformer_flux.FluxAttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        return tuple(2 * part for part in output) if isinstance(output, tuple) else 2 * output


@pytest.mark.slow
def test_a_processor_of_ones_own_is_broadcast() -> None:
    before_and_between(lambda pipe: pipe.transformer.set_attn_processor(Doubling()))


class Contexts(nn.Module):
    """Attends with an autocast or a choice of kernel around any part."""

    def __init__(self, around: str, context: Callable[[], Any]) -> None:
        super().__init__()
        self.norm, self.attn = nn.Linear(32, 32), _attention()
        self.around, self.context = around, context

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        normed = self.part("norm", lambda: self.norm(hidden_states)).float()
        return hidden_states + self.part("attention", lambda: self.attn(normed)).float()

    def part(self, name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name != self.around:
            return run()
        with self.context():
            return run()


def _attention() -> nn.Module:
    return diffusers.models.attention_processor.Attention(query_dim=32, heads=2, dim_head=16)


@pytest.mark.parametrize(("around", "lowering"), [("norm", "specialize"), ("attention", "cond")])
@pytest.mark.parametrize(
    "context", [partial(torch.autocast, "cpu", torch.bfloat16), partial(sdpa_kernel, SDPBackend.MATH)]
)
def test_what_is_around_a_part_of_the_model_stays_around_it(
    around: str, context: Callable[[], Any], lowering: str
) -> None:
    """Work that only feeds an attention is moved to it; not out of an autocast, nor into one."""
    torch.manual_seed(0)
    model = Contexts(around, context).eval().requires_grad_(False)
    inputs = [torch.randn(1, 7, 32) for _ in range(4)]
    plain = [model(x, torch.tensor(700.0)) for x in inputs]
    with pab_fx.enable(model, PABConfig(), inner="eager", lowering=lowering) as pab:
        outputs = [model(x, torch.tensor(t)) for x, t in zip(inputs, (700.0, 600.0, 500.0, 400.0), strict=True)]
        assert pab.report().reused == 2
    for i in (0, 2):
        assert torch.equal(outputs[i], plain[i])
        torch.testing.assert_close(outputs[i + 1], plain[i] - inputs[i] + inputs[i + 1])


# -------------------------------------------------------------------------------------------- blocks as a whole


def fused(pipe: Any) -> None:
    FIRST(pipe)
    pipe.fuse_lora()


def test_blocks_are_skipped_as_a_whole_before_and_after_an_adapter_is_fused() -> None:
    pipe = pipelines.BY_NAME[PIPELINE].build()
    with pab_fx.enable(pipe, BLOCKS, inner="eager") as pab:
        pipelines.run(pipe, pipelines.BY_NAME[PIPELINE])
        fused(pipe)
        check(pipe, pab, changed(fused), BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (PIPELINE, fused),
        ("CogVideoXPipeline", FIRST),
        ("WanPipeline", FIRST),
        (PIPELINE, int8),
        (PIPELINE, model_offloaded),
        (PIPELINE, lambda pipe: pipe.transformer.fuse_qkv_projections()),
    ],
)
def test_blocks_are_skipped_as_a_whole_whatever_is_done_to_the_pipeline(name: str, change: Change) -> None:
    before_and_between(change, name, policy=BLOCKS)


@pytest.mark.slow
def test_blocks_are_skipped_as_a_whole_while_an_adapter_is_switched_in_a_generation() -> None:
    entry, timesteps, done = changed(FIRST), timesteps_of(PIPELINE), []

    def switch(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        done.append(i)
        if i in (2, 4):
            (pipe.disable_lora if i == 2 else pipe.enable_lora)()
        return kwargs

    pipe = entry.build()
    plain = pipelines.run(entry.build(), entry, callback_on_step_end=switch)
    done.clear()
    skip_blocks(pipe.transformer, Part(BLOCKS, len(timesteps)), lambda: (len(done), timesteps[len(done)]))
    expected = pipelines.run(pipe, entry, callback_on_step_end=switch)
    assert not torch.equal(expected, plain)
    pipe = entry.build()
    with pab_fx.enable(pipe, BLOCKS, inner="eager") as pab:
        assert torch.equal(pipelines.run(pipe, entry, callback_on_step_end=switch), expected)
        assert pab.report().reused > 0


@pytest.mark.slow
@pytest.mark.parametrize("change", [blocks_offloaded, lambda pipe: pipe.transformer.compile_repeated_blocks()])
def test_blocks_that_are_captured_one_by_one_are_skipped_one_by_one(change: Change) -> None:
    """What each adds is summed up in another order than what all of them add."""
    entry = changed(change)
    pipe = entry.build()
    with pab_fx.enable(pipe, BLOCKS, inner="eager") as pab:
        output = pipelines.run(pipe, entry)
        assert pab.report().reused > 0
    expected = hooked_run(changed(blocks_offloaded), BLOCKS)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output, pipelines.run(pipelines.BY_NAME[PIPELINE].build(), entry), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "why"), [(casting, "no residual"), (leaves_offloaded, "config is for was found")])
def test_blocks_in_which_hooks_break_the_graph_are_computed_and_it_is_said(change: Change, why: str) -> None:
    entry = changed(change)
    pipe = entry.build()
    with pab_fx.enable(pipe, BLOCKS, inner="eager") as pab, pytest.warns(UserWarning, match="pab_fx: "):
        output = pipelines.run(pipe, entry)
    assert torch.equal(output, pipelines.run(entry.build(), entry))
    assert why in str(pab.report())


# ------------------------------------------------------------------------------------ other caches and compiling


def test_another_cache_is_refused_before_and_after(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    for config in (FirstBlockCacheConfig(threshold=0.1), config_of(lambda: 500.0)):
        with pytest.raises(ValueError, match=r"caches cannot be combined: call pab_fx\.disable"):
            pipe.transformer.enable_cache(config)
    check(pipe, pab, pipelines.BY_NAME[PIPELINE])
    pab.disable()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"another cache of diffusers applied .*fbc"):
        pab_fx.enable(pipe, config_of(None), inner="eager")


def test_a_model_that_is_compiled_after_enable_stays_enabled(enabled: tuple[Any, pab_fx.PAB]) -> None:
    """The order does not matter; `disable` goes back to the model as it was compiled."""
    pipe, pab = enabled
    entry = pipelines.BY_NAME[PIPELINE]
    compiled = []

    def count(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled.append(gm)
        return gm

    pipe.transformer.compile(backend=count)
    check(pipe, pab, entry)
    assert not compiled
    pab.disable()
    assert torch.equal(pipelines.run(pipe, entry), pipelines.run(entry.build(), entry))
    assert compiled


@pytest.mark.slow
def test_pipelines_that_are_compiled_before_or_by_block_are_broadcast(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    pipe.transformer.compile_repeated_blocks(backend="eager")
    check(pipe, pab, pipelines.BY_NAME[PIPELINE])
    before_and_between(lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"))


# ---------------------------------------------------------------------------------------- modes, copies, files


@pytest.mark.slow
def test_inference_mode_and_no_grad_may_take_turns(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    entry = pipelines.BY_NAME[PIPELINE]
    expected = hooked_run(entry)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(pipelines.run(pipe, entry), expected)
    assert pab.report().reused > 0


@pytest.mark.slow
def test_a_pipeline_under_autocast_is_broadcast(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    with torch.autocast("cpu", torch.bfloat16):
        check(pipe, pab, pipelines.BY_NAME[PIPELINE])
    check(pipe, pab, pipelines.BY_NAME[PIPELINE])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
        lambda pipe: pipe.transformer.to(memory_format=torch.channels_last),
        lambda pipe: pipe.to("cpu"),
    ],
    ids=["gradient checkpointing", "channels last", "to"],
)
def test_what_changes_no_value_changes_nothing(change: Change) -> None:
    before_and_between(change)


def test_copies_and_pickles_of_an_enabled_pipeline_are_without_pab(enabled: tuple[Any, pab_fx.PAB]) -> None:
    pipe, pab = enabled
    entry = pipelines.BY_NAME[PIPELINE]
    plain = pipelines.run(entry.build(), entry)
    pipelines.run(pipe, entry)
    reused = pab.report().reused
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(pipelines.run(twin, entry), plain)
    assert pab.report().reused == reused
    check(pipe, pab, entry)
    check(type(pipe)(**pipe.components), pab, entry)  # the same transformer
