"""When a part reuses what was kept of it: rules, as pure functions. Nothing here knows a graph.

A rule is asked in a step in which something is kept, and never in the first step of a generation. It decides by the
step and by the progress since the last step that computed:

    decide(step, progress, signal) -> reuse

The same function decides on the host, where its arguments hold numbers, and in a graph, where they hold
`torch.fx.Proxy`s: so it joins conditions by `&` and `|`, and branches on nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from .checks import check_integer, checked_window, is_iterable, is_number

NEVER = -math.inf
"""The timestep of the last step that computed, where none has."""

END = -math.inf
"""The timestep that follows the last one of a generation."""


class Step(NamedTuple):
    """A step of a generation.

    Args:
        n: how many steps there were before it. Calls of the module instead, where a step calls it several times and
            the config is diffusers', whose hooks count calls, or the calls lie in several graphs.
        t: its timestep, on the scheduler's scale.
        of: how many steps the generation has; infinity where that is not known.
    """

    n: Any
    t: Any
    of: Any = math.inf


class Progress(NamedTuple):
    """What happened so far, seen from a step.

    Args:
        age: steps since the last one that computed; 1 in the step after it.
        t: timestep of that one.
    """

    age: Any
    t: Any


class Rule(ABC):
    """When a part is computed and when what was kept is read. Subclasses are frozen dataclasses with a `decide`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Late(Rule):
        ...     below: float
        ...     def decide(self, step, progress, signal=None):
        ...         return (step.t < self.below) & (progress.age < 3)
        >>> reused_calls(Late(500), (900, 700, 400, 300, 200, 100))
        (False, False, True, True, False, True)

    Attributes:
        signal: whose tensor the rule looks at, a selector as in a policy; `None` where it looks at none.
        accumulates: whether `signal` is what was measured since the last step that computed, added up, each time
            against the step before; otherwise it is measured against that step.
        share_decision: whether all cache contexts go by what the first one of a step has measured.
        by_rate: whether what is measured counts times the rate that the how keeps, see `How.keeps_rate`.
    """

    signal: Any = None
    accumulates: bool = False
    share_decision: bool = False
    by_rate: bool = False

    def measured(self, now: Any, before: Any) -> Any:
        """The number that is measured, a tensor of shape []; asked for in a graph, if there is a `signal`.

        Args:
            now, before: the tensor in this step and in an earlier one, see `accumulates`.
        """
        raise TypeError(f"{self!r} has a signal, and no function measured(now, before) that measures it.")

    def weighed(self, number: Any) -> Any:
        """What counts of a number that was measured; on the host or in a graph, as for `decide`."""
        return number

    @abstractmethod
    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Whether a step reuses what is kept: a bool, or a node where the arguments are nodes.

        Args:
            step, progress: where the generation is.
            signal: what was measured, if the rule looks at a signal; `None` to ask whether a step may reuse.
        """

    def to_graph(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """`decide` as nodes of a graph.

        Args:
            step, progress: hold `torch.fx.Proxy`s of tensors of shape [] and dtype float64 on the CPU.
        """
        return self.decide(step, progress, signal)

    def describe(self) -> str:
        """The rule in words, for reports."""
        return repr(self)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """Whether a step reuses for some timestep up to `step.t`; asked where the timestep to come is not known."""
        return True

    def is_over(self, t: float) -> bool:
        """Whether no step after one at timestep `t` reuses any more, where the timesteps to come are not known."""
        return False

    def keeps(self, step: Step, progress: Progress, next_t: float | None) -> bool:
        """Whether the step after `step` may reuse what is there after it, so that it has to be kept.

        Args:
            step: the step that has run.
            progress: seen from the step after it.
            next_t: timestep of the step after it, `END` if there is none, `None` where it is not known: timesteps do
                not rise within a generation, so it is at most `step.t` then.
        """
        if next_t == END:
            return False
        if next_t is None:
            return bool(self.may_reuse(Step(step.n + 1, step.t, step.of), progress))
        return decided(self, Step(step.n + 1, next_t, step.of), progress)

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """Why nothing will be reused in a generation that begins at `t`, and what to do; `None` where it may be."""
        return None


def decided(rule: Rule, step: Step, progress: Progress, signal: float | None = None) -> bool:
    """What a rule decides on the host; see `Rule.decide`.

    Raises:
        TypeError: if that is neither true nor false.

    Example:
        >>> decided(Every(2), Step(2, 500.0), Progress(1, 600.0))
        True
    """
    found = rule.decide(step, progress, signal)
    if found in (True, False):  # numpy's too
        return bool(found)
    raise TypeError(f"{rule!r}: decide must return whether a step reuses, True or False, got {found!r}.")


@dataclass(frozen=True)
class SkipRange(Rule):
    """Compute every `skip_range`-th step and reuse between, inside the open timestep window `(low, high)`.

    The rule of the paper's section 3.2 as `diffusers/hooks/pyramid_attention_broadcast.py` spells it.

    Args:
        skip_range: the range `N`, an integer >= 1.
        low, high: the window, on the scheduler's scale, 0 to 1000.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> reused_calls(SkipRange(2, 100, 800), (700, 600, 500, 50))
        (False, True, False, False)
    """

    skip_range: int
    low: float = 100
    high: float = 800

    def __post_init__(self) -> None:
        check_integer("SkipRange: skip_range", self.skip_range)
        checked_window("SkipRange: (low, high)", (self.low, self.high))

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Inside of the window, all but every `skip_range`-th step."""
        return (step.t > self.low) & (step.t < self.high) & (step.n % self.skip_range != 0)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`: timesteps may fall into the window yet."""
        return step.n % self.skip_range != 0 and step.t > self.low

    def is_over(self, t: float) -> bool:
        """As `Rule.is_over`: below the window nothing reuses."""
        return t <= self.low

    def describe(self) -> str:
        """The rule in words.

        Example:
            >>> SkipRange(3, 100, 800).describe()
            'computed every 3rd step in (100, 800)'
        """
        if self.skip_range == 1:
            return "computed every step"
        return f"computed every {_ordinal(self.skip_range)} step in ({self.low:g}, {self.high:g})"

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """As `Rule.mismatch`: the window is on another scale than the timesteps, or lies between two of them."""
        if t > 1 or self.high <= 1:
            is_idle = self.skip_range > 1 and not any(self.low < each < self.high for each in timesteps or (self.high,))
            if not timesteps or len(timesteps) < 2 or not is_idle:
                return None
            return (
                f"none of the generation's {len(timesteps)} timesteps, {timesteps[0]:g} to {timesteps[-1]:g}, lies in "
                f"the window ({self.low:g}, {self.high:g}), so nothing will be reused. Choose a wider window."
            )
        return (
            f"the generation starts at timestep {t:g}, but the windows (up to {self.high:g}) are on the "
            "scheduler's scale, 0 to 1000: nothing will be reused. Set current_timestep_callback to a function "
            "that returns the scheduler's timestep, for example lambda: pipe.current_timestep."
        )


@dataclass(frozen=True)
class AfterTimesteps(Rule):
    """Compute at each listed timestep and reuse for the given number of steps after it: `((720.0, 2), ...)`.

    The rule of VideoSys' `mlp_broadcast` for feed-forwards.

    Args:
        skip_counts: pairs of a timestep, on the scheduler's scale, and how many steps reuse what it computes.

    Raises:
        ValueError: for anything but such pairs, or a count that is no integer >= 1.

    Example:
        >>> reused_calls(AfterTimesteps(((700.0, 2),)), (700, 600, 500, 400))
        (False, True, True, False)
    """

    skip_counts: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        most: dict[float, int] = {}
        given: tuple[Any, ...] = tuple(self.skip_counts) if is_iterable(self.skip_counts) else (self.skip_counts,)
        if not all(isinstance(each, Sequence) and len(each) == 2 and is_number(each[0]) for each in given):
            raise ValueError(
                f"AfterTimesteps takes pairs of a timestep and a count, ((720.0, 2), ...), got {self.skip_counts!r}."
            )
        for timestep, count in given:
            check_integer("AfterTimesteps: a skip count", count)
            most[float(timestep)] = max(count, most.get(float(timestep), 0))
        object.__setattr__(self, "skip_counts", tuple(most.items()))

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """As long as what was computed at a listed timestep lasts, and at none of those."""
        return (progress.age <= self._count(progress.t)) & (self._count(step.t) == 0)

    def _count(self, t: Any) -> Any:
        """How many steps reuse what is computed at timestep `t`."""
        return sum((t == listed) * count for listed, count in self.skip_counts)

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`."""
        return bool(progress.age <= self._count(progress.t))

    def describe(self) -> str:
        """The rule in words; "up to", since the next listed timestep computes anew.

        Example:
            >>> AfterTimesteps(((720.0, 2), (640.0, 2))).describe()
            'reused up to 2 steps after 720, 640'
        """
        after: dict[int, list[str]] = {}
        for timestep, count in self.skip_counts:
            after.setdefault(count, []).append(f"{timestep:g}")
        said = (
            f"{'1 step' if count == 1 else f'up to {count} steps'} after {', '.join(listed)}"
            for count, listed in after.items()
        )
        return f"reused {'; '.join(said)}"

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """As `Rule.mismatch`: the generation has none of the listed timesteps."""
        listed = sorted(timestep for timestep, _ in self.skip_counts)
        if not timesteps or not set(listed).isdisjoint(timesteps):
            return None
        return (
            f"none of the timesteps {listed} is among the generation's {list(timesteps)}, so nothing will be "
            "reused. List timesteps of the scheduler."
        )


@dataclass(frozen=True)
class Every(Rule):
    """Compute every `n`-th step and reuse between, whatever the timesteps.

    Step `i` computes if `i < warmup`, if `(i - warmup) mod n = 0`, or if it is one of the last `cooldown`: `Every(3)`
    computes steps 0, 1, 4, 7. Two steps compute before the first one that reuses: enough for a forecast of order 1.

    Args:
        n: an integer >= 1.
        warmup: how many steps compute at the beginning, an integer >= 1.
        cooldown: how many steps compute at the end. The number of steps has to be known then: from the pipeline,
            or from `timesteps=`.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> reused_calls(Every(3, warmup=2, cooldown=1), (900, 800, 700, 600, 500, 400, 300, 200))
        (False, False, False, True, True, False, True, False)
    """

    n: int
    warmup: int = 1
    cooldown: int = 0

    def __post_init__(self) -> None:
        check_integer("Every: n", self.n)
        check_integer("Every: warmup", self.warmup)
        check_integer("Every: cooldown", self.cooldown, least=0)

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> Any:
        """Between the steps that compute."""
        due = (step.n >= self.warmup) & ((step.n - self.warmup) % self.n != 0)
        return due & (step.n < step.of - self.cooldown) if self.cooldown else due

    def may_reuse(self, step: Step, progress: Progress) -> bool:
        """As `Rule.may_reuse`: timesteps do not matter."""
        return bool(self.decide(step, progress))

    def describe(self) -> str:
        """The rule in words.

        Example:
            >>> Every(3, warmup=2, cooldown=1).describe()
            'computed every 3rd step, in the first 2 and in the last 1'
        """
        if self.n == 1:
            return "computed every step"
        ends = [f"in the first {self.warmup}"] if self.warmup > 1 else []
        ends += [f"in the last {self.cooldown}"] if self.cooldown else []
        return ", ".join([f"computed every {_ordinal(self.n)} step", " and ".join(ends)]).removesuffix(", ")

    def mismatch(self, t: float, timesteps: Sequence[float] | None) -> str | None:
        """As `Rule.mismatch`: the number of steps is asked for, and is not known."""
        return unknown_end(self, self.cooldown, timesteps)


def unknown_end(rule: Rule, cooldown: int, timesteps: Sequence[float] | None) -> str | None:
    """`Rule.mismatch` of a rule that computes the last steps: it has to know how many there are."""
    if not cooldown or timesteps:
        return None
    return (
        f"{rule!r} computes the last {cooldown} steps, and how many steps the generation has is not known: none of "
        "them counts as one of the last. Pass timesteps=, such as scheduler.timesteps."
    )


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def checked_timesteps(timesteps: Any) -> tuple[float, ...]:
    """The timesteps of a whole generation, as they were given.

    Args:
        timesteps: numbers on the scheduler's scale, or tensors, in the order of the steps.

    Raises:
        ValueError: if they are no such numbers.

    Example:
        >>> checked_timesteps([900, 600, 300])
        (900.0, 600.0, 300.0)
    """
    listed = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise ValueError(
            f"timesteps must be those of a whole generation, such as scheduler.timesteps, got {timesteps!r}."
        )
    listed = [t.item() if hasattr(t, "item") else t for t in listed]
    for t in listed:
        if not isinstance(t, Real) or isinstance(t, bool) or not math.isfinite(t):
            raise ValueError(f"timesteps must be numbers on the scheduler's scale, 0 to 1000, got {t!r}.")
    return tuple(map(float, listed))


def reused_calls(
    rule: Rule, timesteps: Sequence[float], calls: int = 1, rests: Sequence[bool] = ()
) -> tuple[bool, ...]:
    """The plan of a whole generation: for each call of a module, whether the rule reuses there.

    Args:
        rule: the rule.
        timesteps: one per step, in the order of the generation.
        calls: how often a step calls the module; its calls are counted.
        rests: for each step, whether a part around it reuses there, so that it is neither run nor read; none for never.

    Example:
        >>> reused_calls(SkipRange(3, 100, 800), (900, 700, 600, 500, 400, 50))
        (False, True, True, False, True, False)
    """
    plan: list[bool] = []
    computed, computed_t = 0, NEVER
    every = [t for t in timesteps for _ in range(calls)]
    for n, t in enumerate(every):
        if rests and rests[n // calls]:
            plan.append(False)
            continue
        reuse = n > 0 and decided(rule, Step(n, t, len(every)), Progress(n - computed, computed_t))
        if not reuse:
            computed, computed_t = n, t
        plan.append(reuse)
    return tuple(plan)


def evenly_spaced(steps: int) -> tuple[float, ...]:
    """Timesteps for a generation of which none are known, from 1000 down.

    Example:
        >>> evenly_spaced(4)
        (1000.0, 750.0, 500.0, 250.0)
    """
    return tuple(1000.0 * (steps - i) / steps for i in range(steps))


def falling_timesteps(given: Any) -> tuple[float, ...]:
    """The timesteps of a generation, which fall: one that rises begins another.

    Raises:
        ValueError: for timesteps that rise, or are none.
    """
    found = checked_timesteps(given)
    if found and found[0] < found[-1]:
        raise ValueError(
            f"timesteps begin at {found[0]:g} and end at {found[-1]:g}, and those of a generation fall: pass them in "
            "the order in which the steps run, scheduler.timesteps."
        )
    return found
