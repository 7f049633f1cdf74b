"""What is kept of a part, and how it is read: three torch functions, traced into the branches of a condition.

    slots(outputs)                             what is kept looks like these tensors
    update(slots, inputs, outputs, scalars)    what is kept after a step that computed
    read(slots, inputs, scalars)               the outputs of a step that reuses

A step that computes yields the model's own output, to the bit: a how never touches it. The functions are traced with
`torch.fx.Proxy`s, so they call torch functions on what they are given, branch on no value, update nothing in place, and
make no tensors of their own (`torch.ones_like(kept)` in place of `torch.ones(8)`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .checks import check_integer, checked_dtype, checked_flag

Tensors = Sequence[torch.Tensor]

HIGHEST_ORDER = 34
"""Of a forecast: it divides by the factorial, and 35! is more than float32 holds."""


class Scalars(NamedTuple):
    """What a step knows of the steps that computed. Both are tensors of shape [] and dtype float32.

    Args:
        distance: steps between this one and the last one that computed before it; 1 where none has.
        filled: how many steps have computed and updated the slots so far, 0 in the first one: then what is in the slots
            is arbitrary, also nan.
    """

    distance: Any
    filled: Any


class How(ABC):
    """What is kept and how it is read. Subclasses are frozen dataclasses.

    Attributes:
        keeps_updates: whether an update in place of an output, after the part has yielded it, updates what is kept too,
            as where a Python hook holds on to the tensor. Otherwise an output is kept as the part left it.

    Example:
        >>> @dataclass(frozen=True)
        ... class Fading(How):
        ...     by: float
        ...     def slots(self, outputs):
        ...         return tuple(outputs)
        ...     def update(self, slots, inputs, outputs, scalars):
        ...         return tuple(outputs)
        ...     def read(self, slots, inputs, scalars):
        ...         return tuple(kept * self.by**scalars.distance for kept in slots)
        >>> Fading(0.5).read((torch.tensor([8.0]),), (), Scalars(torch.tensor(2.0), torch.tensor(1.0)))
        (tensor([2.]),)
    """

    keeps_updates: bool = False

    @abstractmethod
    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of what is kept of these outputs; their values do not matter."""

    @abstractmethod
    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What is kept after a step that computed.

        Args:
            slots: what was kept before; arbitrary where `scalars.filled` is 0.
            inputs: the activations that the part reads.
            outputs: what it has computed.
        """

    @abstractmethod
    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The outputs of a step that reuses, of the shapes and dtypes of the part's own."""

    def describe(self) -> str:
        """How it is read in words, for reports; "" for as it was kept."""
        return repr(self)


@dataclass(frozen=True)
class Last(How):
    """The last output, as it was computed (paper, section 3.2).

    Args:
        keeps_updates: as for `How`. diffusers' hooks keep the very tensor, so its configs become `Last(True)`.

    Example:
        >>> Last().read((torch.tensor([1.0]),), (), Scalars(torch.tensor(3.0), torch.tensor(1.0)))
        (tensor([1.]),)
    """

    keeps_updates: bool = False

    def __post_init__(self) -> None:
        checked_flag("Last: keeps_updates", self.keeps_updates)

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """One for each output, as it is."""
        return tuple(outputs)

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        return tuple(outputs)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The outputs that were kept."""
        return tuple(slots)

    def describe(self) -> str:
        """Nothing needs to be said."""
        return ""


@dataclass(frozen=True)
class Taylor(How):
    """A forecast: the Taylor polynomial through the last outputs that were computed (TaylorSeer, arXiv 2503.06923).

    Kept are the last output `f[0]` and its differences `f[j + 1] = (f[j] - the f[j] kept before) / distance`, over the
    steps that really lay between; read is the sum of `f[j] * distance**j / j!`
    (`diffusers/hooks/taylorseer_cache.py`). With too few computed steps it reads at the order that it has.

    Args:
        order: of the polynomial, an integer from 0 to 34; each order is one more tensor of the output's size that is
            kept.
        dtype: what the differences are kept in, a dtype or its name; `None` for the output's.

    Raises:
        ValueError: for an order that is no integer >= 0, or a dtype that is not floating point.

    Example:
        >>> how, far = Taylor(1), Scalars(torch.tensor(2.0), torch.tensor(1.0))
        >>> slots = how.update((torch.tensor([1.0]), torch.tensor([0.0])), (), (torch.tensor([5.0]),), far)
        >>> slots
        (tensor([5.]), tensor([2.]))
        >>> how.read(slots, (), Scalars(torch.tensor(3.0), torch.tensor(2.0)))
        (tensor([11.]),)
    """

    order: int = 1
    dtype: Any = None

    def __post_init__(self) -> None:
        check_integer("Taylor: order", self.order, least=0, most=HIGHEST_ORDER)
        object.__setattr__(self, "dtype", checked_dtype("Taylor: dtype", self.dtype))

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """For each output itself, and a difference for each order."""
        return tuple(
            torch.empty_like(output, dtype=self.dtype if j else None)
            for output in outputs
            for j in range(self.order + 1)
        )

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Each output and its differences; those for which too few steps have computed yet are zero."""
        kept: list[torch.Tensor] = []
        for i, output in enumerate(outputs):
            factors = [output]
            for j in range(self.order):
                before = slots[i * (self.order + 1) + j]
                if j and self.dtype is not None:
                    before = before.type_as(output)
                difference = (factors[j] - before) / scalars.distance
                factors.append(torch.where(scalars.filled > j, difference, 0.0))
            kept += [
                factor if self.dtype is None or not j else factor.to(self.dtype) for j, factor in enumerate(factors)
            ]
        return tuple(kept)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The polynomials, `distance` steps after their last output."""
        outputs = []
        for i in range(0, len(slots), self.order + 1):
            output = slots[i]
            for j in range(1, self.order + 1):
                factor = slots[i + j] if self.dtype is None else slots[i + j].type_as(output)
                output = output + factor * (scalars.distance**j / math.factorial(j))
            outputs.append(output)
        return tuple(outputs)

    def describe(self) -> str:
        """How it is read in words.

        Example:
            >>> Taylor(2).describe()
            'forecast to order 2'
        """
        return f"forecast to order {self.order}" if self.order else ""
