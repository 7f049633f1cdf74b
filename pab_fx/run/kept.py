"""Hold, from step to step, what a graph computes once a generation (see `passes.invariants`).

An input is the same as before if it is the same object at the same version. One that is not is taken for a changing one
from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..compile.variants import Once
from .holding import in_buffers


class Kept:
    """The kept tensors of a graph in one generation, and what they were computed from.

    Args:
        once: computes them.
        args: inputs of the graph.
        buffers: where they are copied to, see `in_buffers`; `None` for where they were computed.
    """

    def __init__(self, once: Once, args: Sequence[Any], buffers: list[torch.Tensor] | None = None) -> None:
        self.once = once
        tensors = once.run(*args)
        self.tensors = tuple(tensors) if buffers is None else in_buffers(buffers, tensors)
        self._seen = [(position, *_seen(args[position])) for position in once.reads]

    def check(self, args: Sequence[Any]) -> None:
        """Compute the tensors anew and compare.

        Raises:
            RuntimeError: if they differ: something was updated that leaves no trace, such as `weight.data.mul_(2)`.
        """
        for kept, computed in zip(self.tensors, self.once.run(*args), strict=True):
            if not torch.equal(kept.nan_to_num(), computed.nan_to_num()):
                raise RuntimeError(
                    f"what is computed once a generation, a tensor of shape {list(kept.shape)}, would differ in this "
                    "step by up to "
                    f"{float((kept - computed).abs().max()):g}: a weight or an input was updated where it leaves no "
                    "trace, as through .data. Call reset() after such an update, or set step_invariants=False."
                )

    @property
    def bytes(self) -> int:
        """Bytes of the kept tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def outdated(self, args: Sequence[Any]) -> list[int]:
        """Positions of the inputs that are others than those that the tensors were computed from."""
        return [i for i, seen, version in self._seen if not _is_same(args[i], seen, version)]


def _seen(given: Any) -> tuple[Any, int | None]:
    """What an input is remembered by: a tensor by what it is and its version, a number by its value."""
    if not isinstance(given, torch.Tensor):
        return given, None
    if _is_number(given):
        return given.item(), None
    return weakref.ref(given), None if given.is_inference() else given._version


def _is_same(given: Any, seen: Any, version: int | None) -> bool:
    if not isinstance(given, torch.Tensor):
        return bool(given == seen)
    if _is_number(given):
        return bool(given.item() == seen)
    return seen() is given and (version is None or given._version == version)


def _is_number(given: torch.Tensor) -> bool:
    """Whether a tensor is a float of the code or the call: under `dynamic=True` Dynamo makes a new one in each call."""
    return given.dtype == torch.float64 and given.dim() == 0 and given.device.type == "cpu"
