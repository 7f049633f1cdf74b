"""Which request, generation and step a call of a model belongs to, read off the pipeline that makes it.

A pipeline of diffusers tells all of it without being asked:

    scheduler.timesteps        a new tensor from each `set_timesteps`: a new generation, and its whole plan
    pipe._current_timestep     mostly a view of that tensor, whose offset is the step; else a new object in each
                               step, also where Heun's method repeats a value
    scheduler.step_index       the step, for pipelines that have no current timestep
    the model's timestep       a view too, for schedulers that do not count

No tensor is read more than once in a generation: the plan, and where a current timestep that is no view of it
lies in it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import isfinite
from types import FrameType
from typing import Any, Literal

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..passes.counting import TIMESTEP_NAMES
from ..policy.when import END, evenly_spaced


@dataclass(frozen=True)
class Step:
    """A call of a model within a generation.

    Args:
        request: whose state it reads and writes: a session, a pipeline, or `None` for the model's own.
        generation: number of the generation, which no other has; `None` where that is not known.
        branch: how many calls of the model this step has seen before, in the same cache context: guidance that
            calls once per branch without naming the branches.
        t: the timestep on the windows' scale, `None` where the pipeline does not tell.
        timesteps: those of the whole generation, on that scale; empty where they are not known.
        index: position of `t` in them.
    """

    request: Any = None
    generation: int | None = None
    branch: int = 0
    t: float | None = None
    timesteps: tuple[float, ...] = ()
    index: int | None = None

    @property
    def next_t(self) -> float | None:
        """The timestep after this one: `END` after the last, `None` where it is not known."""
        if self.index is None:
            return None
        return self.timesteps[self.index + 1] if self.index + 1 < len(self.timesteps) else END


current_step: ContextVar[Step | None] = ContextVar("pab_fx_step", default=None)
"""The step that the running call of an enabled model belongs to; `None` outside of one."""

_entered: ContextVar[tuple[Session, ...]] = ContextVar("pab_fx_sessions", default=())
# one count for all pipelines: two of them may run in one session, and share its state
_generations = itertools.count(1)


class Session:
    """A request: what is counted and kept inside is its own, and goes when the session does.

    Entering it again continues it, so that requests may take turns on one model.

    Example:
        >>> first, second = Session(), Session()
        >>> with first:
        ...     current_session() is first
        True
    """

    def __init__(self) -> None:
        self._of_pipelines: Any = WeakIdKeyDictionary()

    def of(self, pipeline: Any) -> Session:
        """The request of a pipeline that runs in this session; the session itself for a loop of one's own."""
        return self if pipeline is None else self._of_pipelines.setdefault(pipeline, Session())

    def __enter__(self) -> Session:
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        # no token of the context variable: threads and tasks may be in one session at a time, each in its context
        _entered.set(_entered.get()[:-1])


def current_session() -> Session | None:
    """The session around this call, `None` outside of one."""
    return next(reversed(_entered.get()), None)


def request_of(pipeline: Any) -> Any:
    """Whose state a call that a pipeline makes (`None`: that you make) reads and writes; `None` for the model's own."""
    session = current_session()
    return pipeline if session is None else session.of(pipeline)


Source = Literal["known", "seen", "assumed"]

PIPELINES: list[type] = []
"""Classes whose running `__call__` is a request: diffusers' pipelines, once `pab_fx.diffusers` is imported."""


def running_pipeline() -> Any:
    """The innermost pipeline whose `__call__` is on this thread's Python stack, `None` if there is none.

    Or the one that is told to free its hooks, as servers do after an error: that is about no other pipeline.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # a frame's locals are asked for only where they matter: up to Python 3.12 that keeps what they hold alive
        if code.co_name in ("__call__", "maybe_free_model_hooks") and code.co_argcount:
            receiver = frame.f_locals.get(code.co_varnames[0])
            if isinstance(receiver, tuple(PIPELINES)):
                return receiver
        frame = frame.f_back
    return None


@contextlib.contextmanager
def running(step: Step) -> Iterator[None]:
    """Run a model's call as that step."""
    token = current_step.set(step)
    try:
        yield
    finally:
        current_step.reset(token)


class PipelineClock:
    """Follows one pipeline through its generations.

    Args:
        callback: yields the current timestep in place of the pipeline's own.
    """

    def __init__(self, callback: Callable[[], Any] | None = None) -> None:
        self._callback = callback
        self.end()

    def end(self) -> None:
        """Let the generation be over: the next call starts one."""
        self._generation = next(_generations)
        self._plan: Any = None
        self._token: Any = None
        self._has_started = False
        self._t: float | None = None
        self._timesteps: tuple[float, ...] = ()
        self._index: int | None = None
        self._calls: Counter[Hashable] = Counter()

    def tick(self, pipeline: Any, request: Any, caller: Hashable, given: Any = None, is_callbacks: bool = True) -> Step:
        """The step that a call belongs to; counts the call.

        Args:
            pipeline: whose step it is.
            request: whose state it reads and writes.
            caller: the model in its cache context; a further call by it in a step is another branch.
            given: the timestep that the model is given.
            is_callbacks: whether the config's callback is about this pipeline. Of another one that shares the model
                it is asked only where that has no current timestep.
        """
        scheduler = getattr(pipeline, "scheduler", None)
        plan = getattr(scheduler, "timesteps", None)
        if plan is not self._plan:
            self.end()
            self._plan, self._timesteps = plan, _numbers(plan)
        current = getattr(pipeline, "_current_timestep", None)
        index = self._offset(given if current is None else current)
        if index is None and current is None:
            index = _step_index(scheduler)
        token = current if index is None else index
        # where nothing changes from step to step, every call is taken for a step
        if not self._has_started or token is None or not _is_same(token, self._token):
            self._calls.clear()
            if self._callback is not None and (is_callbacks or current is None):
                current = timestep_from(self._callback)
                index = self._offset(current)
            self._move(index, current, scheduler)
        self._token, self._has_started = token, True
        branch = self._calls[caller]
        self._calls[caller] += 1
        timesteps = () if self._index is None else self._timesteps
        return Step(request, self._generation, branch, self._t, timesteps, self._index)

    def retract(self, caller: Hashable) -> None:
        """Take back the last tick of a caller whose call failed, for it to be tried again."""
        self._calls[caller] = max(self._calls[caller] - 1, 0)

    def _offset(self, timestep: Any) -> int | None:
        """The position of a timestep in the plan if it is a view of it: known without reading either."""
        plan = self._plan
        if not isinstance(timestep, torch.Tensor) or not isinstance(plan, torch.Tensor) or plan.dim() != 1:
            return None
        if timestep.untyped_storage().data_ptr() != plan.untyped_storage().data_ptr() or timestep.dtype != plan.dtype:
            return None
        if any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1):
            return None  # more than one of them
        return (timestep.storage_offset() - plan.storage_offset()) // max(plan.stride(0), 1)

    def _move(self, index: int | None, current: Any, scheduler: Any) -> None:
        """Go to the next step: by its position in the plan, or find that by the current timestep."""
        if index is None and isinstance(current, torch.Tensor) and self._index is not None:
            index = self._index + 1
        elif index is None and current is not None:
            index = self._found(as_number(current), scheduler)
        self._index = index if index is not None and index < len(self._timesteps) else None
        if self._index is not None:
            self._t = self._timesteps[self._index]
        else:
            self._t = None if current is None else as_number(current)

    def _found(self, t: float, scheduler: Any) -> int | None:
        """The position of the next step at timestep `t`; Mochi's pipeline counts timesteps from the other end."""
        if not self._has_started and t not in self._timesteps:
            last = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
            mirrored = tuple(last - each for each in self._timesteps)
            self._timesteps = mirrored if t in mirrored else self._timesteps
        first = 0 if self._index is None else self._index + 1
        return next((i for i in range(first, len(self._timesteps)) if self._timesteps[i] == t), None)


def given_timestep(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The timestep that a model is called with, by whichever of its names; `None` if there is none.

    Args:
        parameters: names of the model's positional parameters.
        args, kwargs: what it is called with.

    Example:
        >>> given_timestep(("hidden_states", "timestep"), ("latents", 900), {})
        900
    """
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    return next((given[name] for name in TIMESTEP_NAMES if given.get(name) is not None), None)


def _step_index(scheduler: Any) -> int | None:
    """How many steps a scheduler has made, from where the pipeline let it begin; `None` if it does not count them."""
    if not hasattr(scheduler, "_step_index"):
        return None
    if scheduler._step_index is None:  # until the first step
        return getattr(scheduler, "_begin_index", None) or 0
    return int(scheduler._step_index)


def as_number(timestep: Any) -> float:
    """A timestep as a number: of a tensor its largest element (image-conditioned tokens are at 0)."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.detach().amax())
    return float(timestep)


def timestep_from(callback: Callable[[], Any]) -> Any:
    """What a config's `current_timestep_callback` returns: a number, or a tensor that holds one.

    Raises:
        RuntimeError: if it is neither.
    """
    current = callback()
    if isinstance(current, torch.Tensor) and current.numel():
        return current
    try:
        return float(current)
    except (TypeError, ValueError, RuntimeError):
        raise RuntimeError(
            f"current_timestep_callback returned {current!r}: it must return the timestep of the running "
            "step, a number on the windows' scale."
        ) from None


def _numbers(plan: Any) -> tuple[float, ...]:
    if plan is None:
        return ()
    return tuple(map(float, plan.tolist() if hasattr(plan, "tolist") else plan))


def _is_same(token: Any, other: Any) -> bool:
    """Whether two steps' tokens are one step's: counts by value, timesteps by identity (Heun's come twice)."""
    return token is other or (isinstance(token, int) and isinstance(other, int) and token == other)


class SeenTimesteps:
    """The timesteps of the generation that ran last: all of them where they are known, else those seen so far."""

    def __init__(self) -> None:
        self._known: tuple[float, ...] = ()
        self._seen: list[float] = []

    def see(self, t: float, known: Sequence[float] | None, is_first: bool) -> None:
        """Take note of a call of a graph at timestep `t`; `is_first` if a generation begins with it.

        Branches of guidance, and parts of a model that was captured in pieces, are called at one timestep.
        """
        if known is not self._known:
            self._known = tuple(known or ())
        if is_first and t not in self._seen[-1:]:
            self._seen.clear()
        if not self._seen or t < self._seen[-1]:
            self._seen.append(t)

    def timesteps(self, assumed: Sequence[float] = ()) -> tuple[tuple[float, ...], Source]:
        """The timesteps, and how they are known.

        Args:
            assumed: what to take where not all are known; default: those seen, or evenly spaced ones.
        """
        if self._known:
            return self._known, "known"
        seen = tuple(filter(isfinite, self._seen))
        return (seen, "seen") if seen and not assumed else (tuple(assumed) or evenly_spaced(20), "assumed")
