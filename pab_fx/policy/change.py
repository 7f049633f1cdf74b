"""A rule that goes by what happens: how far a tensor has changed, as a number that the graph computes (a signal)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .checks import check_integer, checked_flag, is_iterable, is_number
from .when import Progress, Rule, Step, unknown_end
from .where import Blocks, Model


@dataclass(frozen=True)
class ModulatedInput:
    """What the first attention of the first block reads, after norm and modulation: TeaCache's signal.

    In blocks of two streams it is that of the sample's; where an attention reads both in one sequence, that sequence.
    """


@dataclass(frozen=True)
class Output:
    """The first tensor that a module yields.

    Args:
        name: qualified name of the module, such as "time_embedding" or "blocks.0.norm1".

    Raises:
        ValueError: for anything but a name.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Output: name must be the qualified name of a module, got {self.name!r}.")


@dataclass(frozen=True)
class Sigma:
    """The noise level of the step, from 0 to 1; a tensor of shape [] and dtype float32, for `Computed`.

    It is what a pipeline says with its cache context (`cache_context("cond", sigma=...)`), else the timestep: as it is
    where the first one is at most 1, else divided by 1000.
    """


@dataclass(frozen=True)
class Computed:
    """A signal of your own: what a function makes of tensors that the graph has.

    Args:
        function: takes tensors and returns one, of any shape. It is torch code that a compiler can trace; it updates
            nothing in place. What it takes besides are its own fields, so it is a function or a frozen dataclass.
        of: which tensors, one or several, in order: `Model()`, `ModulatedInput()`, `Blocks(0, n)` and `Output(name)`
            are as for `Change`, and `Sigma()` is the noise level.

    Raises:
        ValueError: for a function that is none or not hashable, and for anything else in `of`.

    Example:
        >>> lowest = Computed(lambda sample: torch.nn.functional.avg_pool2d(sample, 8), Model())
        >>> Change(lowest, threshold=0.1).describe()
        'reused while what <lambda> makes of the sample changes by at most 0.1'
    """

    function: Callable[..., Any]
    of: Any = field(default_factory=Model)

    def __post_init__(self) -> None:
        if not callable(self.function) or not isinstance(self.function, Hashable):
            raise ValueError(f"Computed: function must be a function, hashable, got {self.function!r}.")
        given = tuple(self.of) if isinstance(self.of, (tuple, list)) else (self.of,)
        if not given or not all(type(each) in (*TENSORS, Sigma) for each in given):
            raise ValueError(
                "Computed: of must be Model(), ModulatedInput(), Blocks(0, n), Output(name), Sigma(), or several of "
                f"those, got {self.of!r}."
            )
        if all(isinstance(each, Sigma) for each in given):
            raise ValueError(f"Computed: of must have a tensor of the graph beside Sigma(), got {self.of!r}.")
        object.__setattr__(self, "of", given)


TENSORS = (Blocks, ModulatedInput, Model, Output)
"""What a signal may be of by itself."""


def named(of: Any) -> str:
    """A signal in words."""
    if isinstance(of, Computed):
        whose = " and ".join(map(named, of.of))
        return f"what {getattr(of.function, '__name__', repr(of.function))} makes of {whose}"
    said = {Model: "the sample", ModulatedInput: "the modulated input", Sigma: "the noise level"}
    return said.get(type(of)) or (of.name if isinstance(of, Output) else of.label)


@dataclass(frozen=True)
class Change(Rule):
    """Reuse while a signal has changed by little: FirstBlockCache, DBCache, TeaCache and their like.

    The change is `mean(abs(now - before)) / mean(abs(before))`, over all elements, where `before` is the signal of the
    last step that computed. With `accumulate` it is that of the step before, and the changes since the last step that
    computed are added up. A step reuses if the change is at most `threshold`; one that is not a finite number never is.
    The host reads one number in a step that may reuse, and waits for it.

    Args:
        of: whose signal: `Blocks(0, 1)` is what the first block adds to the stream of the sample
            (`diffusers/hooks/first_block_cache.py`), `ModulatedInput()` what its attention reads (TeaCache), `Model()`
            the sample that the model is given, `Output(name)` what a module yields, and `Computed(...)` what a function
            of yours makes of those.
        threshold: a number >= 0.
        accumulate: add up changes from step to step (TeaCache, arXiv 2411.19108).
        warmup: how many steps at the beginning compute.
        cooldown: how many steps at the end compute; asks for the number of steps.
        max_skips: how many steps in a row reuse; `None` for any number.
        share_decision: branches of guidance, called one after the other in cache contexts of their own, go by the
            change of the first, as cache-dit and SGLang have it; else each goes by its own.
        rescale: coefficients of a polynomial of the change, the highest power first, that takes its place.
        by_rate: the change is `mean(abs(now - before))` times the rate at which the part's output changes with it,
            which the policy's how keeps (`RatedResidual`): EasyCache, arXiv 2507.02860. Two steps compute before the
            rate is known, so `warmup` is at least 2.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> rule = Change(Blocks(0, 1), threshold=0.1, max_skips=2)
        >>> rule.decide(Step(5, 500.0), Progress(1, 520.0), 0.05), rule.decide(Step(5, 500.0), Progress(3, 560.0), 0.05)
        (True, False)
        >>> float(rule.measured(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])))
        0.5
    """

    of: Any = field(default_factory=lambda: Blocks(0, 1))
    threshold: float = 0.05
    accumulate: bool = False
    warmup: int = 1
    cooldown: int = 0
    max_skips: int | None = None
    rescale: Any = ()
    share_decision: bool = False
    by_rate: bool = False

    def __post_init__(self) -> None:
        if type(self.of) not in (*TENSORS, Computed):
            raise ValueError(
                "Change: of must be Blocks(...), ModulatedInput(), Model(), Output(name) or Computed(...), got "
                f"{self.of!r}."
            )
        if not is_number(self.threshold) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"Change: threshold must be a number >= 0, got {self.threshold!r}.")
        checked_flag("Change: accumulate", self.accumulate)
        checked_flag("Change: share_decision", self.share_decision)
        checked_flag("Change: by_rate", self.by_rate)
        if self.by_rate:  # which two steps tell
            check_integer("Change: warmup with by_rate=True", self.warmup, least=2)
        check_integer("Change: warmup", self.warmup)
        check_integer("Change: cooldown", self.cooldown, least=0)
        if self.max_skips is not None:
            check_integer("Change: max_skips", self.max_skips)
        given = tuple(self.rescale) if is_iterable(self.rescale) else (self.rescale,)
        if not all(map(is_number, given)):
            raise ValueError(f"Change: rescale must be the numbers of a polynomial, got {self.rescale!r}.")
        object.__setattr__(self, "rescale", tuple(float(each) for each in given))

    @property
    def signal(self) -> Any:  # type: ignore[override]
        """Whose signal it goes by."""
        return self.of

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """As `Rule.accumulates`."""
        return self.accumulate

    def measured(self, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """As `Rule.measured`: the relative change; 0 where nothing changed, whatever it is relative to.

        With `by_rate` the change itself.
        """
        difference, size = (now - before).abs().mean(), before.abs().mean()
        if self.by_rate:
            return difference
        return torch.where(difference > 0, difference / size, difference)

    def weighed(self, change: Any) -> Any:
        """As `Rule.weighed`: the polynomial of the change."""
        if not self.rescale:
            return change
        found: Any = self.rescale[0]
        for coefficient in self.rescale[1:]:
            found = found * change + coefficient
        return found

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """While the signal has changed by little; without a signal, where it may reuse if that has."""
        due = step.n >= self.warmup
        if self.max_skips is not None:
            due = due & (progress.age <= self.max_skips)
        if self.cooldown:
            due = due & (step.n < step.of - self.cooldown)
        return due if signal is None else due & (signal <= self.threshold)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`: timesteps do not matter."""
        return bool(self.decide(step, progress))

    def describe(self) -> str:
        """The rule in words.

        Example:
            >>> Change(Blocks(0, 1), 0.08, max_skips=3).describe()
            'reused up to 3 steps in a row while blocks(0, 1) changes by at most 0.08'
        """
        skips = "" if self.max_skips is None else f" up to {self.max_skips} steps in a row"
        whose = named(self.of)
        if self.by_rate:
            whose = f"the output, as {whose} predicts,"
        how = "the changes of {} add up to" if self.accumulate else "{} changes by"
        return f"reused{skips} while {how.format(whose)} at most {self.threshold:g}"

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """As `Rule.mismatch`: the number of steps is asked for, and is not known."""
        return unknown_end(self, self.cooldown, timesteps)
