"""What is kept of a part, and how it is read: torch functions, traced into the branches of a condition.

    slots(outputs)                             what is kept looks like these tensors
    update(slots, inputs, outputs, scalars)    what is kept after a step that computed
    read(slots, inputs, scalars)               the outputs of a step that reuses
    carry(slots, inputs, outputs, scalars)     what is kept after that step: by default the slots as they are

A step that computes yields the model's own output, to the bit: a how never touches it. The functions are traced with
`torch.fx.Proxy`s, so they call torch functions on what they are given, branch on no value, update nothing in place, and
make no tensors of their own (`torch.ones_like(kept)` in place of `torch.ones(8)`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .checks import check_integer, checked_dtype, checked_flag, is_number

Tensors = Sequence[torch.Tensor]

HIGHEST_ORDER = 34
"""Of a forecast: it divides by the factorial, and 35! is more than float32 holds."""


class Scalars(NamedTuple):
    """What a step knows beside the slots. All are tensors of shape [] and dtype float32.

    Args:
        distance: steps between this one and the last one that computed before it; 1 where none has.
        filled: how many steps have computed and updated the slots so far, 0 in the first one: then what is in the slots
            is arbitrary, also nan.
        weight: what the how's `weigh` says in this step, if it reuses.
    """

    distance: Any
    filled: Any
    weight: Any = 1.0


class How(ABC):
    """What is kept and how it is read. Subclasses are frozen dataclasses.

    Attributes:
        keeps_updates: whether an update in place of an output, after the part has yielded it, updates what is kept too,
            as where a Python hook holds on to the tensor. Otherwise an output is kept as the part left it.
        reads_streams: whether `inputs` are, for each output, the tensor of its shape and dtype that enters where that
            leaves, as the residual stream of a block. A part that has none is left alone then. Otherwise they are all
            activations that the part reads.
        keeps_rate: whether the last slot is a number, shape [] and float32: how much the outputs change, relative to
            their size, for each unit that a signal changes by. Rules with `by_rate` ask for it; of several parts under
            one rule, the first one's counts.
        is_read: whether this graph reads what is kept. Otherwise the part computes in each of its calls, for another
            graph to read: that of a call of half a batch, say.

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
    reads_streams: bool = False
    keeps_rate: bool = False
    is_read: bool = True

    @abstractmethod
    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes and dtypes of what is kept of these outputs; their values do not matter."""

    @abstractmethod
    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What is kept after a step that computed.

        Args:
            slots: what was kept before; arbitrary where `scalars.filled` is 0.
            inputs: the activations that the part reads, see `reads_streams`.
            outputs: what it has computed.
        """

    @abstractmethod
    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The outputs of a step that reuses, of the shapes and dtypes of the part's own."""

    def carry(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What is kept after a step that reuses: the slots as they are, if a how does not say otherwise.

        Args:
            slots, inputs, scalars: as for `read`.
            outputs: what `read` has yielded.
        """
        return tuple(slots)

    def weigh(self, module: Any) -> float:
        """`scalars.weight`: asked for on the host in each step that reuses, if `read` or `carry` look at it.

        It is an input of the graph: another number compiles nothing anew.

        Args:
            module: the part, an `nn.Module`; `None` where it is none.
        """
        return 1.0

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
class Residual(How):
    """What the part adds: its output less what enters where that leaves, added to what enters in a step that reuses.

    Args: none.

    Example:
        >>> how, far = Residual(), Scalars(torch.tensor(1.0), torch.tensor(0.0))
        >>> how.update((), (torch.tensor([1.0]),), (torch.tensor([5.0]),), far)
        (tensor([4.]),)
        >>> how.read((torch.tensor([4.0]),), (torch.tensor([2.0]),), far)
        (tensor([6.]),)
    """

    reads_streams = True

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """One for each output."""
        return tuple(outputs)

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Each output less its input."""
        return tuple(output - entering for output, entering in zip(outputs, inputs, strict=True))

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Each input and what was added to it last."""
        return tuple(entering + added for entering, added in zip(inputs, slots, strict=True))

    def describe(self) -> str:
        """How it is read in words."""
        return "as a residual"


@dataclass(frozen=True)
class Handed(How):
    """Nothing is kept: what enters is handed on as it is, for another part to add to it.

    Example:
        >>> Handed().read((), (torch.tensor([2.0]),), Scalars(torch.tensor(1.0), torch.tensor(1.0)))
        (tensor([2.]),)
    """

    reads_streams = True

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Nothing."""
        return ()

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What enters."""
        return tuple(inputs)


@dataclass(frozen=True)
class RatedResidual(Residual):
    """As `Residual`, and the rate at which the output changes with what enters (EasyCache, arXiv 2507.02860).

    With `x` for what enters, `y` for the output, and both of the last two steps that computed, the rate is
    `mean(abs(y - y before)) / mean(abs(x - x before)) / mean(abs(y))`, of the first output. It is infinite after the
    first step: a rule with `by_rate` computes there.

    Args: none.

    Example:
        >>> how, far = RatedResidual(), Scalars(torch.tensor(1.0), torch.tensor(1.0))
        >>> before = (torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.0))
        >>> how.update(before, (torch.tensor([2.0]),), (torch.tensor([4.0]),), far)
        (tensor([2.]), tensor([4.]), tensor(0.5000))
        >>> how.read((torch.tensor([2.0]), torch.tensor([5.0]), torch.tensor(0.75)), (torch.tensor([3.0]),), far)
        (tensor([6.]),)
    """

    keeps_rate = True

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """What enters where each output leaves, the outputs, and the rate."""
        return (*outputs, *outputs, outputs[0].new_empty((), dtype=torch.float32))

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """What has entered, what has left, and the rate between the steps that computed."""
        now, before = (inputs[0], outputs[0]), (slots[0], slots[len(inputs)])
        entered, left = ((new - old).float().abs().mean() for new, old in zip(now, before, strict=True))
        rate = left / entered / outputs[0].float().abs().mean()
        return (*inputs, *outputs, torch.where(scalars.filled > 0, rate, torch.inf))

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Each input and what was added to it last."""
        of = len(inputs)
        added = [left - entered for entered, left in zip(slots[:of], slots[of : 2 * of], strict=True)]
        return super().read(added, inputs, scalars)

    def describe(self) -> str:
        """How it is read in words."""
        return "as a residual, with its rate"


@dataclass(frozen=True)
class Taylor(How):
    """A forecast: the Taylor polynomial through the last values that were computed (TaylorSeer, arXiv 2503.06923).

    Kept are the last value `f[0]` and its differences `f[j + 1] = (f[j] - the f[j] kept before) / distance`, over the
    steps that really lay between; read is the sum of `f[j] * distance**j / j!`
    (`diffusers/hooks/taylorseer_cache.py`). With too few computed steps it reads at the order that it has.

    Args:
        order: of the polynomial, an integer from 0 to 34; each order is one more tensor of the output's size that is
            kept.
        dtype: what the differences are kept in, a dtype or its name; `None` for the output's.
        of: whose values, `Last()` for the part's outputs, `Residual()` for what it adds to its inputs.

    Raises:
        ValueError: for an order that is no integer from 0 to 34, a dtype that is not floating point, or another `of`.

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
    of: How = field(default_factory=Last)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(f"{name}: order", self.order, least=0, most=HIGHEST_ORDER)
        object.__setattr__(self, "dtype", checked_dtype(f"{name}: dtype", self.dtype))
        if not isinstance(self.of, (Last, Residual)):
            raise ValueError(f"{name}: of must be Last() or Residual(), got {self.of!r}.")

    @property
    def reads_streams(self) -> bool:  # type: ignore[override]
        """As that of which it is a forecast."""
        return self.of.reads_streams

    def slots(self, outputs: Tensors) -> tuple[torch.Tensor, ...]:
        """For each value itself, and a difference for each order."""
        return tuple(
            torch.empty_like(each, dtype=self.dtype if j else None)
            for each in self.of.slots(outputs)
            for j in range(self.order + 1)
        )

    def update(self, slots: Tensors, inputs: Tensors, outputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """Each value and its differences; those for which too few steps have computed yet are zero."""
        kept: list[torch.Tensor] = []
        for i, found in enumerate(self.of.update((), inputs, outputs, scalars)):
            factors = [found]
            for j in range(self.order):
                before = slots[i * (self.order + 1) + j]
                if j and self.dtype is not None:
                    before = before.type_as(found)
                difference = (factors[j] - before) / scalars.distance
                factors.append(torch.where(scalars.filled > j, difference, 0.0))
            kept += [
                factor if self.dtype is None or not j else factor.to(self.dtype) for j, factor in enumerate(factors)
            ]
        return tuple(kept)

    def read(self, slots: Tensors, inputs: Tensors, scalars: Scalars) -> tuple[torch.Tensor, ...]:
        """The polynomials, `distance` steps after their last value."""
        found = []
        for i in range(0, len(slots), self.order + 1):
            forecast = slots[i]
            for j in range(1, self.order + 1):
                factor = slots[i + j] if self.dtype is None else slots[i + j].type_as(forecast)
                forecast = forecast + factor * self._weight(j, scalars.distance)
            found.append(forecast)
        return self.of.read(found, inputs, scalars)

    def _weight(self, j: int, distance: Any) -> Any:
        """Of the `j`-th difference, `j >= 1`."""
        return distance**j / math.factorial(j)

    def describe(self) -> str:
        """How it is read in words.

        Example:
            >>> Taylor(2, of=Residual()).describe()
            'as a residual, forecast to order 2'
        """
        return ", ".join(filter(None, (self.of.describe(), f"forecast to order {self.order}" if self.order else "")))


@dataclass(frozen=True)
class Hermite(Taylor):
    """As `Taylor`, with scaled Hermite polynomials for the powers (HiCache, arXiv 2508.16984).

    Read is `f[0]` and the sum of `f[j] * scale**j * H_j(scale * distance) / j!`, with the physicists' polynomials
    `H_1(x) = 2x`, `H_2(x) = 4x**2 - 2`, and so on. They grow slower than the powers where `scale` is small.

    Args:
        order, dtype, of: as for `Taylor`.
        scale: between 0 and 1; the paper's is 0.5.

    Raises:
        ValueError: as for `Taylor`, and for a scale that is not above 0 and at most 1.

    Example:
        >>> Hermite(1).read((torch.tensor([5.0]), torch.tensor([2.0])), (), Scalars(torch.tensor(3.0), None))
        (tensor([8.]),)
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.scale) or not 0 < self.scale <= 1:
            raise ValueError(f"Hermite: scale must be a number above 0 and at most 1, got {self.scale!r}.")

    def _weight(self, j: int, distance: Any) -> Any:
        before, polynomial = 1.0, 2 * self.scale * distance
        for i in range(1, j):
            before, polynomial = polynomial, 2 * self.scale * distance * polynomial - 2 * i * before
        return polynomial * (self.scale**j / math.factorial(j))

    def describe(self) -> str:
        """How it is read in words."""
        return super().describe().replace("forecast", "forecast by Hermite polynomials")
