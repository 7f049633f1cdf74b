"""One model with inputs as its pipeline gives them, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pab_fx.testing import Clock

Kwargs = dict[str, Any]


class Draw:
    """Draws the tensors of one step: `noise` depends on the step's seed, `fixed` does not."""

    def __init__(self, seed: int) -> None:
        self._noise = torch.Generator().manual_seed(1000 + seed)
        self._fixed = torch.Generator().manual_seed(0)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._noise)

    def fixed(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._fixed)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: Class name in diffusers, with a suffix after `-` where a class is here in several forms.
        make: Builds the model; its parameters are drawn anew by `build`.
        make_inputs: Keyword arguments of `forward` for one step, without the timestep.
        timestep: From `pipe.current_timestep` (0 to 1000) to the keyword arguments that the pipeline makes
            of it; where it makes several, the first is the timestep.
        pipeline_note: The pipeline that calls the model this way.
    """

    name: str
    make: Callable[[], Any]
    make_inputs: Callable[[Draw], Kwargs]
    timestep: Callable[[float], Kwargs]
    pipeline_note: str

    @property
    def class_name(self) -> str:
        return self.name.split("-")[0]

    @property
    def timestep_name(self) -> str:
        return next(iter(self.timestep(500.0)))

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float32 and eval mode, without gradients, its parameters drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = self.make().float().eval().requires_grad_(False)
            redraw_(model)
        return model

    def of_one_block(self) -> Entry:
        """The same with one block of each kind, for tests that have no use for a second one."""
        return self.of_blocks(1)

    def of_blocks(self, count: int) -> Entry:
        """The same with so many blocks of each kind."""

        def make() -> Any:
            model = self.make()
            counts = {name: count for name in ("num_layers", "num_single_layers") if name in model.config}
            return type(model).from_config({**model.config, **counts})

        return replace(self, make=make)

    def inputs(self, seed: int) -> Kwargs:
        """Keyword arguments for one step: hidden states drawn from `seed`, conditions the same for each."""
        return self.make_inputs(Draw(seed))

    def step(self, t: float, seed: int) -> Kwargs:
        """All keyword arguments of `forward` for a step at `pipe.current_timestep == t`."""
        return {**self.inputs(seed), **self.timestep(t), "return_dict": False}


def redraw_(model: nn.Module) -> None:
    """Draw all parameters from a normal, so that no zero-initialised gate or projection hides an attention.

    Weights of norms are around 1, and matrices keep the scale of what they multiply.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        elif name.endswith("weight"):
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:  # tables of modulation, padding tokens, experts
            parameter.normal_(std=0.3)


def call(entry: Entry, model: Callable[..., Any], t: float, seed: int) -> tuple[torch.Tensor, ...]:
    """The output tensors of one denoising step at `pipe.current_timestep == t`."""
    with torch.no_grad():
        output = model(**entry.step(t, seed))
    return tuple(tensors(output))


def tensors(output: Any) -> Iterable[torch.Tensor]:
    """All tensors of a nest of tuples and lists, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


def trajectory(
    entry: Entry, model: Callable[..., Any], timesteps: Iterable[float], clock: Clock | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Outputs of one generation: each step has a timestep and hidden states of its own, and sets `clock`."""
    outputs = []
    for step, t in enumerate(timesteps):
        if clock is not None:
            clock.t = t
        # A kept output must not be one that a later step writes to.
        outputs.append(tuple(output.clone() for output in call(entry, model, t, seed=step)))
    return outputs
