"""What a policy says about one part of a model, in plain eager Python."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pab_fx import Policy, Progress, Scalars, Step

Tensors = Sequence[Tensor]


class Part:
    """A part that computes, or reads what was kept, as the three functions of its policy say.

    Args:
        policy: when and how.
        of: how many steps a generation has.
    """

    def __init__(self, policy: Policy, of: float = math.inf) -> None:
        self._policy, self._of, self.reused = policy, of, 0
        self.reset()

    def reset(self) -> None:
        """Start a generation."""
        self._kept: dict[str, Any] = {}

    def __call__(self, n: int, t: float, inputs: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """The outputs of step `n` at timestep `t`."""
        found = self.read(n, t, inputs)
        return self.keep(n, t, inputs, compute()) if found is None else found

    def read(self, n: int, t: float, inputs: Tensors) -> Tensors | None:
        """The outputs of a step that reuses, `None` if the step has to compute."""
        rule, kept = self._policy.when, self._kept
        assert rule is not None
        if not kept or not rule.decide(Step(n, t, self._of), Progress(n - kept["n"], kept["t"])):
            return None
        self.reused += 1
        how, scalars = self._policy.how, self._scalars(n)
        found = [each.clone() for each in how.read(kept["slots"], inputs, scalars)]
        kept["slots"] = [each.clone() for each in how.carry(kept["slots"], inputs, found, scalars)]
        return found

    def keep(self, n: int, t: float, inputs: Tensors, outputs: Tensors) -> Tensors:
        """Keep what the outputs of a step that computed leave for later ones; the outputs."""
        how, kept = self._policy.how, self._kept
        slots = kept.get("slots") or [torch.full_like(each, math.nan) for each in how.slots(outputs)]
        updated = [each.clone() for each in how.update(slots, inputs, outputs, self._scalars(n))]
        self._kept = {"n": n, "t": t, "filled": kept.get("filled", 0) + 1, "slots": updated}
        return outputs

    def _scalars(self, n: int) -> Scalars:
        distance, filled = n - self._kept.get("n", n - 1), self._kept.get("filled", 0)
        return Scalars(*(torch.tensor(float(each)) for each in (distance, filled, self._policy.how.weigh(None))))


def skip_blocks(model: nn.Module, part: Part, step: Callable[[], tuple[int, float]]) -> None:
    """Let all blocks of a model of diffusers do together what a part does, by other forwards; they have no PAB then.

    Args:
        model: its blocks are in lists, take streams by the names in `STREAMS`, and yield them in any order.
        part: what they are together.
        step: number and timestep of the current step.
    """
    blocks = [block for each in model.children() if isinstance(each, nn.ModuleList) for block in each]
    blocks = [block for block in blocks if "Block" in type(block).__name__]
    state: dict[str, Any] = {"order": {}}

    def forward(i: int, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = inspect.signature(type(blocks[i]).forward).bind(blocks[i], *args, **kwargs).arguments
        streams = {named[name].shape: named[name] for name in STREAMS if name in named}
        if i == 0:
            state["entering"] = streams
            state["read"] = None
            if state["order"]:
                state["read"] = part.read(*step(), [streams[shape] for shape in state["order"][len(blocks) - 1]])
        if state["read"] is not None:
            found = state["read"] if i == len(blocks) - 1 else [streams[shape] for shape in state["order"][i]]
            return tuple(found) if state["is_tuple"] else found[0]
        computed = compute(*args, **kwargs)
        outputs = computed if isinstance(computed, tuple) else (computed,)
        state["order"][i], state["is_tuple"] = [each.shape for each in outputs], isinstance(computed, tuple)
        if i == len(blocks) - 1:
            part.keep(*step(), [state["entering"][each.shape] for each in outputs], outputs)
        return computed

    for i, block in enumerate(blocks):
        block.forward = functools.partial(forward, i, block.forward)  # type: ignore[method-assign]


STREAMS = ("hidden_states", "encoder_hidden_states")


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
