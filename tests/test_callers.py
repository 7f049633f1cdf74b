"""Which module runs: the one whose method is on the stack, not one that a function is given."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from diffusers.hooks import HookRegistry, ModelHook
from test_state import CONFIG, TIMESTEPS, Attention, Run, Tied, Tiny, inputs
from torch import nn

import pab_fx
from pab_fx import PABBackend, PABConfig
from pab_fx._torch.dynamo import calling_modules

pytestmark = pytest.mark.usefixtures("no_gradients")


def log_validation(vae: nn.Module, generate: Callable[[], Any]) -> Any:
    """A function of the user's, whose first argument is a module that has no part in the generation."""
    assert isinstance(vae, nn.Module)
    return generate()


class Trainer(nn.Module):
    """A module that runs a model which is no part of it."""

    def forward(self, generate: Callable[[], Any]) -> Any:
        return generate()


WAYS: dict[str, Callable[[Any, PABBackend], Any]] = {
    "the model": lambda model, backend: model.compile(backend=backend),
    "its blocks": lambda model, backend: [block.compile(backend=backend) for block in model.blocks],
}
around = pytest.mark.parametrize("around", [log_validation, lambda vae, generate: Trainer()(generate)])


@around
@pytest.mark.parametrize("breaks", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_tied_modules_keep_apart_whatever_calls_the_model(way: str, breaks: bool, around: Callable[..., Any]) -> None:
    clock, model = zoo.Clock(), Tied(breaks).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    WAYS[way](model, PABBackend(CONFIG(clock), inner="eager"))
    run = Run(plain, model, clock)
    around(nn.Linear(2, 2), lambda: run.steps(TIMESTEPS))
    assert run.differs


def test_enabled_tied_modules_keep_apart_whatever_calls_the_model() -> None:
    clock, model = zoo.Clock(), Tied(breaks=True).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    pab_fx.enable(model, CONFIG(clock), inner="eager")
    run = Run(plain, model, clock)
    log_validation(nn.Linear(2, 2), lambda: run.steps(TIMESTEPS))
    assert run.differs


@around
@pytest.mark.parametrize("way", WAYS)
def test_another_cache_on_the_model_is_seen_whatever_calls_it(way: str, around: Callable[..., Any]) -> None:
    model, backend = Tiny(), PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
    HookRegistry.check_if_exists_or_initialize(model.blocks[0].norm).register_hook(ModelHook(), "fbc_block_hook")
    WAYS[way](model, backend)
    with pytest.warns(UserWarning, match=r"another cache of diffusers is on \(its hook 'fbc_block_hook'\)"):
        around(nn.Linear(2, 2), lambda: model(**inputs(0, 700)))


def denoise(vae: nn.Module, model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """A function of the user's that is compiled as a whole."""
    return model(**kwargs)


in_a_trainer = pytest.mark.parametrize("in_a_trainer", [True, False])


@in_a_trainer
def test_a_compiled_function_broadcasts_the_model_that_it_is_given_last(in_a_trainer: bool) -> None:
    clock, model = zoo.Clock(), Tiny()
    backend = PABBackend(CONFIG(clock), inner="eager", regional=True)
    compiled = torch.compile(denoise, backend=backend)
    run = Run(model, lambda **kwargs: compiled(nn.Linear(2, 2), model, kwargs), clock)
    generate = functools.partial(run.steps, TIMESTEPS)
    Trainer()(generate) if in_a_trainer else generate()
    assert run.differs
    names = {region.name for region in backend.report().regions}
    assert names == {f"blocks.{i}.attn{k}" for i in (0, 1) for k in (1, 2)}


@in_a_trainer
def test_a_compiled_function_sees_another_cache_on_a_model_that_it_is_given_last(in_a_trainer: bool) -> None:
    model, backend = Tiny(), PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
    HookRegistry.check_if_exists_or_initialize(model.blocks[0].norm).register_hook(ModelHook(), "fbc_block_hook")
    generate = functools.partial(torch.compile(denoise, backend=backend), nn.Linear(2, 2), model, inputs(0, 700))
    with pytest.warns(UserWarning, match="another cache of diffusers is on"):
        Trainer()(generate) if in_a_trainer else generate()


def adapt(model: Tiny) -> Tiny:
    """Give the queries of the first block an adapter."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(r=2, target_modules=[r"blocks.0.attn1.to_q"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, model)
    return model.requires_grad_(False)


@around
def test_an_adapter_switched_in_a_generation_keeps_what_is_kept_whatever_calls_the_model(
    around: Callable[..., Any],
) -> None:
    clock, model = zoo.Clock(), adapt(Tiny())
    backend = PABBackend(CONFIG(clock), inner="eager")
    run = Run(model, torch.compile(model, backend=backend), clock)

    def generate() -> None:
        run.steps(TIMESTEPS[:3])  # the next step reuses
        for each in (model, run.plain, run.oracle):
            each.blocks[0].attn1.to_q.enable_adapters(False)  # type: ignore
        run.steps(TIMESTEPS[3:], first=3)

    around(nn.Linear(2, 2), generate)
    assert run.differs


def test_the_timestep_is_an_argument_of_the_model_not_of_a_function_that_is_given_one() -> None:
    """Attentions that are compiled one by one look for it on the stack."""
    model, backend = Tiny(), PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
    for block in model.blocks:
        block.attn1.compile(backend=backend)  # type: ignore

    def sample(module: nn.Module, timesteps: tuple[float, ...]) -> None:
        for number, t in enumerate(timesteps):
            module(**inputs(number, t))

    sample(model, TIMESTEPS)
    assert backend.report().reused == 2 * 3


class Breaking(ModelHook):
    """A hook that Dynamo cannot trace, as those that move weights: the graph breaks in what takes `forward`'s place."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return args, kwargs


class Watching(ModelHook):
    """Notes which module runs."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.running = calling_modules()
        return args, kwargs


@pytest.mark.parametrize("hooked", ["blocks", "attentions"])
def test_a_module_whose_forward_a_hook_has_replaced_is_broadcast(hooked: str) -> None:
    clock, model = zoo.Clock(), Tiny()
    plain = copy.deepcopy(model)
    for block in model.blocks:
        for module in [block] if hooked == "blocks" else [block.attn1, block.attn2]:  # type: ignore
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Breaking(), "moves_weights")
    backend = PABBackend(CONFIG(clock), inner="eager")
    run = Run(plain, torch.compile(model, backend=backend), clock)
    run.steps(TIMESTEPS)
    assert run.differs
    assert {region.name for region in backend.report().regions} == {
        f"blocks.{i}.attn{k}" for i in (0, 1) for k in (1, 2)
    }


def test_a_hook_in_place_of_forward_counts_as_the_call_of_its_module() -> None:
    model = Tiny()
    hook = Watching()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "watches")
    model.forward(**inputs(0, 700))  # without `__call__` around it
    assert hook.running == [model]


def test_a_continuation_in_a_processor_belongs_to_its_attention() -> None:
    """Dynamo passes to a continuation what is still used: without its `self`, the attention comes first."""

    class Processor:
        def __call__(self, attn: Attention, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
            torch._dynamo.graph_break()
            return Attention.forward(attn, x, text)

    class Delegating(Attention):
        def __init__(self, channels: int, text_channels: int | None = None) -> None:
            super().__init__(channels, text_channels)
            self.processor = Processor()

        def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
            return self.processor(self, x, text)

    clock, model = zoo.Clock(), Tiny()
    for block in model.blocks:
        for name, width in (("attn1", None), ("attn2", 6)):
            attention = Delegating(8, width).requires_grad_(False)
            attention.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, attention)
    backend = PABBackend(CONFIG(clock), inner="eager")
    run = Run(model, torch.compile(model, backend=backend), clock)
    run.steps(TIMESTEPS)
    assert run.differs
