"""`enable` turns PAB on in place and `disable` leaves no trace of it."""

import contextlib
import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import PixArtTransformer2DModel, TextKVCacheConfig
from torch import nn

import pab_fx
from pab_fx import PAB, Blocks, Change, Every, LayerBroadcast, PABConfig, Policy, Residual

TIMESTEPS = (900, 700, 600, 500, 400, 50)
ENTRY = zoo.BY_NAME["PixArtTransformer2DModel"]  # self- and cross-attention; its timestep is on the scheduler's scale
CACHING = zoo.BY_NAME["CogVideoXTransformer3DModel"]  # mixes in CacheMixin
CONFIG = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
Outputs = list[tuple[torch.Tensor, ...]]


def unequal(left: Outputs, right: Outputs) -> int:
    """In how many steps two trajectories differ."""
    return sum(
        any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True)) for outputs in zip(left, right, strict=True)
    )


def generation(model: Any, entry: zoo.Entry = ENTRY, clock: zoo.Clock | None = None) -> Outputs:
    return zoo.trajectory(entry, model, TIMESTEPS, clock)


def hooks_of(entry: zoo.Entry, model: nn.Module) -> Outputs:
    """What diffusers' hooks yield under the numbers of `CONFIG`, spatial and cross as they are."""
    clock = zoo.Clock()
    return generation(zoo.hooked(model, zoo.diffusers_config(clock, ranges=(2, None, 3))), entry, clock)


class Pipe:
    """What `enable` needs of a pipeline."""

    def __init__(self, **components: Any) -> None:
        self.__dict__.update(components)


# ------------------------------------------------------------------------------------------------ on and off


def test_enable_works_in_place_and_disable_restores_the_model() -> None:
    model = ENTRY.build()
    plain, expected = generation(model), hooks_of(ENTRY, model)
    attributes, modules = dict(vars(model)), dict(model.named_modules())

    pab = pab_fx.enable(model, CONFIG, inner="eager")
    assert unequal(generation(model), expected) == 0
    assert unequal(expected, plain) > 0
    assert pab.report().reused > 0
    assert type(model) is PixArtTransformer2DModel
    assert dict(model.named_modules()) == modules

    pab.disable()
    assert unequal(generation(model), plain) == 0
    assert dict(vars(model)) == attributes
    assert pab.backend.report().roles == ()
    pab.disable()  # once more does nothing


def test_weights_and_what_is_saved_of_them_stay_as_they_are(tmp_path: Path) -> None:
    model = ENTRY.build()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")  # type: ignore[operator]
    with pab_fx.enable(model, CONFIG, inner="eager"):
        generation(model)
        after = model.state_dict()
        assert list(after) == list(before)
        for name, (address, values) in before.items():
            assert after[name].data_ptr() == address
            assert torch.equal(after[name], values)
        model.save_pretrained(tmp_path / "enabled")  # type: ignore[operator]
        loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "enabled").eval().requires_grad_(False)
        assert json.loads((tmp_path / "enabled/config.json").read_text()) == json.loads(
            (tmp_path / "before/config.json").read_text()
        )
    assert unequal(generation(loaded), generation(model)) == 0


def test_as_a_context_manager_it_disables_at_the_end_also_after_an_exception() -> None:
    model = ENTRY.build()
    plain = generation(model)
    with contextlib.suppress(KeyboardInterrupt), pab_fx.enable(model, CONFIG, inner="eager") as pab:
        assert isinstance(pab, PAB)
        assert unequal(generation(model), plain) > 0
        raise KeyboardInterrupt
    assert unequal(generation(model), plain) == 0
    with pab_fx.enable(model, CONFIG, inner="eager"):
        assert unequal(generation(model), plain) > 0


def test_enabling_twice_is_refused_and_says_what_to_do() -> None:
    model = ENTRY.build()
    pab = pab_fx.enable(model, CONFIG, inner="eager")
    for again in (model, torch.compile(model, backend="eager"), Pipe(transformer=model)):
        with pytest.raises(ValueError, match=r"PAB is enabled on this PixArtTransformer2DModel already: .*disable\(\)"):
            pab_fx.enable(again, CONFIG, inner="eager")
    assert unequal(generation(model), hooks_of(ENTRY, model)) == 0
    pab.disable()
    pab_fx.enable(model, CONFIG, inner="eager").disable()


def test_a_model_is_disabled_without_its_handle() -> None:
    model = ENTRY.build()
    plain = generation(model)
    pab_fx.enable(model, CONFIG, inner="eager")
    pab_fx.disable(model)
    assert unequal(generation(model), plain) == 0
    pab_fx.disable(model)  # nothing to do
    pab_fx.disable(nn.Linear(2, 2))


def test_a_refused_option_leaves_the_model_as_it_was() -> None:
    model = CACHING.build()
    model.enable_cache(zoo.diffusers_config(zoo.Clock()))  # type: ignore[operator]
    for bad in ({"lowering": "branch"}, {"inner": "inductr"}, {"config": "latte"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            pab_fx.enable(model, **{"inner": "eager", **bad})
    with pytest.raises(ValueError, match="lowring"):
        pab_fx.enable(model, lowring="cond")
    assert len(zoo.hooked_modules(model)) == 2
    pab_fx.enable(model, inner="eager").disable()


def test_what_is_no_model_is_refused() -> None:
    for nothing in (None, 3, "transformer", Pipe(vae=nn.Linear(2, 2)), Pipe(transformer=None)):
        for call in (pab_fx.enable, pab_fx.disable):
            with pytest.raises(TypeError, match="expected a model, or a pipeline with one of transformer"):
                call(nothing)


def test_reset_starts_a_generation() -> None:
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner="eager") as pab:
        expected = zoo.trajectory(ENTRY, model, TIMESTEPS[1:3])
        pab.reset()
        assert sum(role.cache_bytes for role in pab.report().roles) == 0
        assert unequal(zoo.trajectory(ENTRY, model, TIMESTEPS[1:3]), expected) == 0
        assert unequal(expected, zoo.trajectory(ENTRY, ENTRY.build(), TIMESTEPS[1:3])) == 1


# -------------------------------------------------------------------------------------------------- pipelines


def test_a_pipeline_is_enabled_at_its_transformers() -> None:
    first, second = ENTRY.build(seed=0), ENTRY.build(seed=1)
    expected = [hooks_of(ENTRY, model) for model in (first, second)]
    pipe = Pipe(transformer=first, transformer_2=second, vae=nn.Linear(2, 2))
    with pab_fx.enable(pipe, CONFIG, inner="eager"):
        assert [unequal(generation(m), e) for m, e in zip((first, second), expected, strict=True)] == [0, 0]
        assert pipe.transformer is first
    plain = generation(ENTRY.build(seed=1))
    assert unequal(generation(second), plain) == 0


def test_a_pipeline_half_of_which_is_enabled_already_is_left_as_it_is() -> None:
    first, second = ENTRY.build(seed=0), ENTRY.build(seed=1)
    plain = generation(first)
    with pab_fx.enable(second, CONFIG, inner="eager") as pab:
        with pytest.raises(ValueError, match="already"):
            pab_fx.enable(Pipe(transformer=first, transformer_2=second), CONFIG, inner="eager")
        assert unequal(generation(first), plain) == 0
        assert unequal(generation(second), hooks_of(ENTRY, second)) == 0
        assert pab.report().reused > 0


# ---------------------------------------------------------------------------------- beside diffusers' own caches


def test_it_takes_over_from_enable_cache_with_its_config_and_gives_back_at_the_end() -> None:
    model, clock = CACHING.build(), zoo.Clock()
    config = zoo.diffusers_config(clock)
    expected = generation(zoo.hooked(model, config), CACHING, clock)
    plain = generation(model, CACHING)
    model.enable_cache(config)  # type: ignore[operator]

    with pab_fx.enable(model, inner="eager") as pab:
        assert not model.is_cache_enabled
        assert zoo.hooked_modules(model) == {}
        assert unequal(generation(model, CACHING, clock), expected) == 0
        assert pab.report().reused > 0

    assert unequal(expected, plain) > 0
    assert model.is_cache_enabled
    assert len(zoo.hooked_modules(model)) == 2
    assert unequal(generation(model, CACHING, clock), expected) == 0


def test_a_config_of_its_own_wins_over_that_of_enable_cache() -> None:
    model, clock = CACHING.build(), zoo.Clock()
    expected = generation(zoo.hooked(model, zoo.diffusers_config(clock, ranges=(3, None, None))), CACHING, clock)
    model.enable_cache(zoo.diffusers_config(clock, ranges=(2, None, None)))  # type: ignore[operator]
    with pab_fx.enable(model, PABConfig(spatial_attention_block_skip_range=3), inner="eager"):
        assert unequal(generation(model, CACHING), expected) == 0


def test_another_cache_of_diffusers_is_refused() -> None:
    model = CACHING.build()
    model.enable_cache(TextKVCacheConfig())  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"another cache of diffusers enabled \(TextKVCacheConfig\).*disable_cache"):
        pab_fx.enable(model, CONFIG, inner="eager")


def test_hooks_that_are_put_on_top_of_it_are_refused_or_broadcast_nothing_twice() -> None:
    model, clock = CACHING.build(), zoo.Clock()
    config = zoo.diffusers_config(clock)
    expected = generation(zoo.hooked(model, config), CACHING, clock)
    with pab_fx.enable(model, config, inner="eager"), contextlib.suppress(ValueError):  # at either of the two
        model.enable_cache(config)  # type: ignore[operator]
        assert unequal(generation(model, CACHING, clock), expected) == 0


# ------------------------------------------------------------------------------------------ copies and compiling


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_a_model_of_one_graph_is_enabled_with_fullgraph(lowering: str) -> None:
    model = ENTRY.build()
    with pab_fx.enable(model, CONFIG, inner="eager", lowering=lowering, fullgraph=True) as pab:
        assert unequal(generation(model), hooks_of(ENTRY, model)) == 0
        assert len(pab.backend.graphs) == 1
        assert pab.report().reused > 0


def test_fullgraph_refuses_a_model_whose_graph_breaks() -> None:
    class Breaks(nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return hidden_states * timestep

    model = Breaks()
    with (
        pab_fx.enable(model, CONFIG, inner="eager", fullgraph=True),
        pytest.raises(Exception, match="graph_break"),
    ):
        model(torch.ones(1), torch.ones(1))


def test_a_copy_of_an_enabled_model_is_a_model_of_its_own_without_pab() -> None:
    model = ENTRY.build()
    plain, expected = generation(model), hooks_of(ENTRY, model)
    with pab_fx.enable(model, CONFIG, inner="eager") as pab:
        generation(model)
        twin = copy.deepcopy(model)
        twin.load_state_dict(ENTRY.build(seed=1).state_dict())
        reused = pab.report().reused

        assert unequal(generation(twin), generation(ENTRY.build(seed=1))) == 0
        assert pab.report().reused == reused
        assert unequal(generation(model), expected) == 0
        with pab_fx.enable(twin, CONFIG, inner="eager"):
            assert unequal(generation(twin), hooks_of(ENTRY, ENTRY.build(seed=1))) == 0
        assert unequal(generation(model), expected) == 0
    assert unequal(generation(model), plain) == 0


def test_a_model_that_is_compiled_already_is_compiled_again_in_place() -> None:
    model = ENTRY.build()
    plain, expected = generation(model), hooks_of(ENTRY, model)
    model.compile(backend="eager")
    own = model._compiled_call_impl
    with pab_fx.enable(model, CONFIG, inner="eager") as pab:
        assert unequal(generation(model), expected) == 0
        assert pab.report().reused > 0
    assert model._compiled_call_impl is own
    assert unequal(generation(model), plain) == 0


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before torch 2.13 nothing is compiled inside of torch.compiler.disable"
)
def test_a_wrapper_of_torch_compile_is_enabled_at_its_model() -> None:
    model = ENTRY.build()
    expected = hooks_of(ENTRY, model)
    wrapper = torch.compile(model, backend="eager")
    with pab_fx.enable(wrapper, CONFIG, inner="eager") as pab:
        assert unequal(generation(wrapper), expected) == 0
        assert pab.report().reused > 0


def test_positional_arguments_are_timed_too() -> None:
    class Late(nn.Module):
        """Takes its timestep but never looks at it: only the call knows it."""

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return hidden_states + nn.functional.scaled_dot_product_attention(*[hidden_states] * 3)

    model = Late()
    steps = [(torch.randn(1, 3, 4), torch.tensor(t)) for t in (700, 600, 500)]
    for how in ("positional", "keyword"):
        with pab_fx.enable(model, inner="eager") as pab:
            for x, t in steps:
                model(x, t) if how == "positional" else model(timestep=t, hidden_states=x)
            assert pab.report().reused == 1


def test_enable_takes_the_fields_of_a_config() -> None:
    with pab_fx.enable(nn.Linear(2, 2), inner="eager", cross_attention_block_skip_range=3) as pab:
        assert pab.backend.config == PABConfig(cross_attention_block_skip_range=3)
    with pytest.raises(ValueError, match="unknown option 'skip_range'"):
        pab_fx.enable(nn.Linear(2, 2), skip_range=3)
    with pytest.raises(ValueError, match="not both: cross_attention_block_skip_range"):
        pab_fx.enable(nn.Linear(2, 2), CONFIG, cross_attention_block_skip_range=3)


class Perceptron(nn.Module):
    """Has no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


@torch.no_grad()
def test_a_model_in_which_no_attention_is_found_warns() -> None:
    model = Perceptron()
    with (
        pab_fx.enable(model, inner="eager"),
        pytest.warns(UserWarning, match="config is for was found in Perceptron"),
    ):
        model(torch.ones(1, 2))


def test_the_report_outlives_disable() -> None:
    model = ENTRY.build()
    pab = pab_fx.enable(model, CONFIG, inner="eager")
    generation(model)
    reused = pab.report().reused
    pab.disable()
    assert pab.report().reused == reused > 0
    assert repr(pab).startswith("PAB(disabled; ")


def test_a_part_that_holds_the_whole_model_is_no_obstacle() -> None:
    """Caches of others leave such models: modules that are in a circle."""
    model = ENTRY.build()
    expected = hooks_of(ENTRY, model)
    next(module for module in model.modules() if not list(module.children())).whole = model
    with pab_fx.enable(model, CONFIG, inner="eager") as pab:
        assert unequal(generation(model), expected) == 0
        assert pab.report().reused > 0


def test_a_role_that_no_attention_has_warns_while_others_are_broadcast() -> None:
    config = PABConfig(spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=3)
    model = ENTRY.build()
    with (
        pab_fx.enable(model, config, inner="eager") as pab,
        pytest.warns(UserWarning, match="no temporal attention was found in PixArtTransformer2DModel"),
    ):
        generation(model)
    assert pab.report().reused


def test_a_layer_that_no_attention_is_called_warns_while_others_are_broadcast() -> None:
    layers = [LayerBroadcast(("blocks.0.attn1", "blocks.7."), skip_range=3)]
    model = ENTRY.build()
    with (
        pab_fx.enable(model, spatial_attention_block_skip_range=2, layers=layers, inner="eager") as pab,
        pytest.warns(UserWarning, match="'blocks.7.' matches the name of no attention of PixArt"),
    ):
        generation(model)
    assert pab.report().reused
    assert not any("blocks.0.attn1'" in each for each in pab.report().warnings)


# ------------------------------------------------------------------------------------------ the order of compiling


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_around(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_by_block(model: Any) -> Any:
    model.compile_repeated_blocks(backend="eager")
    return model


POLICIES = {
    "a signal": Policy(Blocks(1), Change(Blocks(0, 1), 1.0, max_skips=2), Residual()),
    "blocks": Policy(Blocks(), Every(2), Residual()),
    "PAB": CONFIG,
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("compiled", [compiled_in_place, compiled_around, compiled_by_block])
@pytest.mark.parametrize("order", ["enable first", "compile first"])
def test_either_order_of_compile_and_enable_works(order: str, compiled: Any, policy: Any) -> None:
    """TensorRT-LLM PR 16508, sglang PR 25328, ComfyUI issue 14795: in one order the cache, or the compiler, is idle."""
    entry = zoo.BY_NAME["WanTransformer3DModel"]
    model = entry.build()
    plain = generation(model, entry)
    with pab_fx.enable(model, policy, inner="eager") as pab:
        expected = generation(model, entry)
        reused = pab.report().reused
    assert reused > 0
    assert unequal(expected, plain) > 0
    call = model
    if order == "compile first":
        call = compiled(model)
        assert unequal(generation(call, entry), plain) == 0
    with pab_fx.enable(model, policy, inner="eager") as pab:
        call = call if order == "compile first" else compiled(model)
        assert unequal(generation(call, entry), expected) == 0
        assert pab.report().reused == reused
        assert not pab.report().warnings
    assert unequal(generation(call, entry), plain) == 0


@pytest.mark.parametrize("order", ["compile first", "enable first"])
def test_a_forward_that_is_compiled_by_itself_runs_without_a_cache_and_says_so(order: str) -> None:
    model = ENTRY.build()
    plain, forward = generation(model), torch.compile(model.forward, backend="eager")
    if order == "compile first":
        model.forward = forward
    with pab_fx.enable(model, CONFIG, inner="eager"):
        model.forward = forward
        with pytest.warns(UserWarning, match="its forward was replaced by a compiled one"):
            assert unequal(generation(model), plain) == 0


def test_a_compiled_model_that_was_enabled_is_freed_with_its_last_user() -> None:
    model = ENTRY.build()
    model.compile(backend="eager")
    pab_fx.enable(model, CONFIG, inner="eager")
    compiled_in_place(model)
    generation(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_report_before_the_first_call_says_what_is_planned() -> None:
    policies = [
        pab_fx.Policy(pab_fx.Blocks(1), pab_fx.Every(3, warmup=2), pab_fx.Residual()),
        pab_fx.Policy(pab_fx.Attentions("cross"), pab_fx.SkipRange(6, 100, 800)),
    ]
    with pab_fx.enable(zoo.BY_NAME["WanTransformer3DModel"].build(), policies, inner="eager") as pab:
        assert str(pab.report()).splitlines() == [
            "Nothing has run yet, so nothing was looked for. Planned:",
            "Blocks(first=1): computed every 3rd step, in the first 2, as a residual",
            "Attentions(roles=('cross',)): computed every 6th step in (100, 800)",
        ]
        assert pab.report().reused == 0
