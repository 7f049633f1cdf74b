"""Does a model that broadcasts do what a reference does, over whole generations?

assert_broadcasts_like(model, config, inputs=inputs, generations=[(900, 700, 600, 50)])

AssertionError: generation 0, step 2 (timestep 600): output 0 [2, 12, 4] is off by up to 0.031, 0.012 of its norm.
spatial     C C R C
reference   C C C C
                ^
To reproduce: ...
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor, nn

from ..backend import PABBackend
from ..export.rewrite import rewrite
from ..policy.config import PABConfig
from ..policy.where import ROLES
from ..run.contexts import cache_context
from .hooked import Clock, Counts, Hooked, told_by
from .repro import repro_of
from .tracing import traced

Inputs = Callable[[float, int], Any]


@dataclass(frozen=True)
class Step:
    """One call of a model.

    Args:
        generation: number of its generation.
        index: number of the step within that.
        t: its timestep.
        context: name of its cache context, or `None`.
        outputs: what it returned, by the place; then the inputs as the call left them.
        counts: how many calls of attentions of each role computed, and reused; `None` where that is not known.
    """

    generation: int
    index: int
    t: float
    context: str | None
    outputs: Mapping[str, Any]
    counts: Counts | None

    def __str__(self) -> str:
        context = f" in context {self.context!r}" if self.context is not None else ""
        return f"generation {self.generation}, step {self.index} (timestep {self.t:g}){context}"


@dataclass(frozen=True)
class Broadcast:
    """What `assert_broadcasts_like` has compared.

    Args:
        steps: of the model that broadcasts.
        reference: of the reference.
        backend: which broadcast, `None` for a rewritten graph.
    """

    steps: tuple[Step, ...]
    reference: tuple[Step, ...]
    backend: PABBackend | None


def assert_broadcasts_like(
    model: nn.Module,
    config: PABConfig | PyramidAttentionBroadcastConfig,
    reference: Callable[..., Any] | PyramidAttentionBroadcastConfig | None = None,
    *,
    inputs: Inputs,
    generations: Sequence[Sequence[float]],
    contexts: Sequence[str | None] = (None,),
    tracer: str | None = None,
    broadcast: Callable[[nn.Module, Any], Callable[..., Any]] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 0.0,
    reuses: bool = True,
    changes: bool = True,
    breaks: bool = False,
    mode: Callable[[], Any] = torch.no_grad,
    repro: str | None = None,
    **options: Any,
) -> Broadcast:
    """Assert that a model broadcasts as a reference does: every output of every step, and what is computed and reused.

    The model is compiled with `PABBackend(config, inner="eager", **options)`, or traced and rewritten, and run through
    whole generations; so is the reference, on inputs of its own. Updates of inputs are compared too.

    Args:
        model: is not changed.
        config: as for `PABBackend`. If it has a `current_timestep_callback`, one takes its place that tells the step's
            timestep; without one the model's own `timestep` input is read.
        reference: `None` for diffusers' hooks on a copy of the model, one for each cache context; a config of diffusers
            for the hooks with that one, which a `PABConfig` needs; or anything that can be called like the model. Its
            `reset()`, if it has one, is called before each generation.
        inputs: `inputs(t, seed)` are those of a step: a tuple, or a dict of keyword arguments. Equal seeds have to give
            equal tensors, each time new ones; every call has a seed of its own.
        generations: timesteps of each. Where one does not begin higher than the last one ended, `reset()` begins it.
        contexts: cache contexts, each of which is called in each step.
        tracer: "symbolic_trace", "export" or "dynamo": rewrite that trace of the model, do not compile it.
        broadcast: makes of the model and the config what is run, in place of both.
        dynamic: as for `torch.compile`.
        tolerance: largest relative L2 distance of any output. 0: equal to the bit.
        reuses: whether something has to be reused.
        changes: whether some output has to differ from those of the model without PAB, by more than the tolerance.
        breaks: whether attentions that are computed in every step since the graph breaks in them may be so in the
            reference too.
        mode: what the models run in.
        repro: Python that makes `model` and `inputs`, for the repro of a failure; the kit's own models need none.
        options: of `PABBackend`, such as `lowering` and `inner` (default: "eager").

    Returns:
        The steps of both, and the backend.

    Raises:
        AssertionError: with the step and the tensor that differ first, what was reused when, and code to reproduce it.
        ValueError: if the reference is to be the hooks, but there is no config of diffusers; without generations.

    Example:
        >>> from pab_fx.testing import Schedule, TransformerSpec
        >>> spec, schedule = TransformerSpec(), Schedule(ranges=(2, None, None))
        >>> found = assert_broadcasts_like(
        ...     spec.build(), schedule.config(), inputs=spec.inputs, generations=schedule.generations
        ... )
        >>> found.backend.report().reused
        3
    """
    clock = Clock()
    generations = _split(generations)
    own = config if config.current_timestep_callback is None else told_by(config, clock)  # type: ignore[union-attr]
    if broadcast is not None:
        running: Any = broadcast(model, own)
        backend = getattr(running, "backend", None)
    elif tracer is not None:
        running, backend = _rewritten(model, own, tracer, inputs, generations[0][0]), None
    else:
        torch.compiler.reset()
        backend = PABBackend(own, **{"inner": "eager", **options})
        running = torch.compile(model, backend=backend, dynamic=dynamic)
    run = _Run(inputs, generations, contexts, clock, mode)
    steps = run.steps([running] * len(contexts), backend)
    alone = _broken(backend) if breaks and backend is not None else []
    expected = run.steps(_references(model, config, reference, clock, alone, len(contexts)))
    plain = run.steps([copy.deepcopy(model)] * len(contexts)) if changes else ()

    problem: tuple[Step | None, str] | None = _first_difference(steps, expected, tolerance, backend)
    if problem is None and reuses and (nothing := _reuses_nothing(steps, expected)):
        problem = (None, nothing)
    if problem is None and changes and all(_distance(a, b)[0] <= tolerance for a, b in zip(steps, plain, strict=True)):
        problem = (None, "nothing is shown: without PAB the model has the same outputs (changes=False allows that).")
    if problem is not None:
        at, what = problem
        said: dict[str, Any] = {"contexts": tuple(contexts), "tracer": tracer, "dynamic": dynamic, "mode": mode}
        said |= {"tolerance": tolerance, "reuses": reuses, "changes": changes, "breaks": breaks, **options}
        code = repro_of(model, config, reference, inputs, _until(generations, at), said, repro)
        raise AssertionError("\n".join([what, *_strips(steps, expected, at), *_left_alone(backend), code]))
    return Broadcast(steps, expected, backend)


# --------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class _Run:
    """What both models are run through."""

    inputs: Inputs
    generations: Sequence[Sequence[float]]
    contexts: Sequence[str | None]
    clock: Clock
    mode: Callable[[], Any]

    def steps(self, models: Sequence[Any], backend: PABBackend | None = None) -> tuple[Step, ...]:
        """Every step of every generation, of a model for each context; `backend` is theirs."""
        found: list[Step] = []
        for generation, timesteps in enumerate(self.generations):
            self._begin(models, backend, generation)
            for index, t in enumerate(timesteps):
                self.clock.t = t
                for context, model in zip(self.contexts, models, strict=True):
                    before = _counts(model, backend)
                    with self.mode(), cache_context(context):
                        outputs = self._call(model, t, seed=len(found))
                    counts = _counts(model, backend)
                    if counts is not None and before is not None:
                        counts.subtract(before)
                    found.append(Step(generation, index, t, context, outputs, counts))
        return tuple(found)

    def _begin(self, models: Sequence[Any], backend: PABBackend | None, generation: int) -> None:
        """Begin a generation."""
        if generation == 0:
            return
        if backend is not None:
            if self.generations[generation][0] <= self.generations[generation - 1][-1]:  # else it sees it by itself
                backend.reset()
            return
        for model in models:
            if hasattr(model, "reset"):
                model.reset()

    def _call(self, model: Callable[..., Any], t: float, seed: int) -> dict[str, Any]:
        """What a call returns, and what it leaves of its inputs; copies, since later calls may update them."""
        given = self.inputs(t, seed)
        output = model(**given) if isinstance(given, Mapping) else model(*given)
        found = dict(_leaves(output, "output")) | dict(_leaves(given, "input"))
        return {place: each.clone() if isinstance(each, Tensor) else each for place, each in found.items()}


def _leaves(given: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers of a nest, by their places."""
    if isinstance(given, Mapping):
        for key, each in given.items():
            yield from _leaves(each, f"{place} {key}")
    elif isinstance(given, (tuple, list)):
        for i, each in enumerate(given):
            yield from _leaves(each, f"{place} {i}")
    elif isinstance(given, (Tensor, int, float)):
        yield place, given


def _counts(model: Any, backend: PABBackend | None) -> Counts | None:
    """What was computed and reused so far by role, `None` where nobody counts."""
    if backend is None:
        found = getattr(model, "counts", None)
        return Counter(found) if isinstance(found, Counter) else None
    roles = backend.report().roles
    computed = {(role.role, False): role.computed for role in roles}
    return Counter(computed | {(role.role, True): role.reused for role in roles})


def _split(generations: Sequence[Sequence[float]]) -> list[list[float]]:
    """The generations, where a timestep that rises begins another."""
    is_nested = isinstance(generations, Sequence) and all(isinstance(each, Sequence) and each for each in generations)
    if not generations or not is_nested:
        raise ValueError(f"generations must be the timesteps of each, [(900, 600, 300)], got {generations!r}.")
    found: list[list[float]] = []
    for timesteps in generations:
        found.append([])
        for t in timesteps:
            if found[-1] and t > found[-1][-1]:
                found.append([])
            found[-1].append(t)
    return found


def _rewritten(model: nn.Module, config: Any, tracer: str, inputs: Inputs, t: float) -> Any:
    given = inputs(t, 0)
    kwargs = given if isinstance(given, Mapping) else {}
    gm = traced(model, tracer, () if kwargs else given, **kwargs)
    if tracer != "dynamo":
        return rewrite(gm, config, model=model)
    torch.compiler.reset()
    return torch.compile(model, backend=lambda gm, _: rewrite(gm, config, model=model))


def _broken(backend: PABBackend) -> list[str]:
    """Attentions of which no graph holds the whole, or the part that yields the output."""
    regions = backend.report().regions
    whole = {region.name for region in regions if region.left_alone is None}
    return [
        region.name for region in regions if "breaks inside" in (region.left_alone or "") and region.name not in whole
    ]


def _references(
    model: nn.Module, config: Any, reference: Any, clock: Clock, alone: Sequence[str], count: int
) -> list[Callable[..., Any]]:
    """What the model is compared with, for each context."""
    hooks = config if reference is None else reference
    if isinstance(hooks, PyramidAttentionBroadcastConfig):
        return [Hooked(model, told_by(hooks, clock), alone) for _ in range(count)]
    if reference is None:
        raise ValueError(
            "a PABConfig says nothing of diffusers' hooks: give reference=PyramidAttentionBroadcastConfig(...), with "
            "identifiers that give the modules the roles they should have, or a model of your own."
        )
    return [reference] * count


# ------------------------------------------------------------------------------------------------- comparing


def _distance(one: Step, other: Step, places: str = "output") -> tuple[float, str]:
    """The largest relative L2 distance of two steps, infinite where they do not compare, and what is so far apart."""
    found = [(0.0, "")]
    for place in dict.fromkeys((*one.outputs, *other.outputs)):
        if place.startswith(places):
            distance, what = _distance_of(one.outputs.get(place), other.outputs.get(place))
            found.append((distance, f"{place} {what}"))
    return max(found, key=lambda each: each[0])


def _distance_of(a: Any, b: Any) -> tuple[float, str]:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return (0.0, "") if type(a) is type(b) and a == b else (float("inf"), f"is {a!r} in place of {b!r}")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), f"is {list(a.shape)} {a.dtype} in place of {list(b.shape)} {b.dtype}"
    if torch.equal(a, b):
        return 0.0, ""
    one, other = a.double(), b.double()
    off = torch.where(one.isnan() & other.isnan(), 0.0, one - other)
    if not off.any():
        return 0.0, ""
    distance = float(off.norm() / other.nan_to_num().norm().clamp(min=1e-30))
    distance = distance if distance == distance else float("inf")
    count, most = f"{int((off != 0).sum())} of {off.numel()}", float(off.abs().max())
    return distance, f"{list(a.shape)}: {count} are off, by up to {most:.3g}; {distance:.3g} of its norm"


def _first_difference(
    steps: Sequence[Step], expected: Sequence[Step], tolerance: float, backend: PABBackend | None
) -> tuple[Step, str] | None:
    """The first step that differs, and in what."""
    regions = backend.report().regions if backend is not None else ()
    # what cannot be broadcast is computed in every step, and the hooks broadcast it all the same
    unlike = any(region.left_alone not in (None, "the config leaves it alone") for region in regions)
    for step, other in zip(steps, expected, strict=True):
        for places in ("output", "input"):
            distance, what = _distance(step, other, places)
            if distance > tolerance:
                return step, f"{step}: {what}."
        if step.counts is not None and other.counts is not None and not unlike and +step.counts != +other.counts:
            return step, f"{step}: {_said(step.counts)}; the reference: {_said(other.counts)}."
    return None


def _said(counts: Counts) -> str:
    return ", ".join(
        f"{n} {role} {'reused' if reused else 'computed'}" for (role, reused), n in sorted((+counts).items())
    )


def _reuses_nothing(steps: Sequence[Step], expected: Sequence[Step]) -> str | None:
    """A complaint, if what was counted has no reuse in it."""
    counted = [step.counts for step in steps if step.counts is not None]
    counted = counted or [step.counts for step in expected if step.counts is not None]
    if not counted or any(n for counts in counted for (_, reused), n in counts.items() if reused):
        return None
    return "nothing is shown: no attention was reused in any step (reuses=False allows that)."


# -------------------------------------------------------------------------------------------------- failures


def _strips(steps: Sequence[Step], expected: Sequence[Step], at: Step | None) -> list[str]:
    """What was computed (C), reused (R) and both (M) in each step, by role; generations stand apart."""
    context = at.context if at is not None else steps[0].context
    lines, mark = [], ""
    for name, run in (("", steps), ("reference", expected)):
        counted = [step for step in run if step.context == context and step.counts is not None]
        for role in ROLES:
            if any(step.counts[role, reused] for step in counted for reused in (True, False)):  # type: ignore[index]
                cells = [
                    ("| " if step.index == 0 and step.generation else "") + _cell(step.counts, role) for step in counted
                ]
                lines.append(f"{role:<10}{name:<11}{' '.join(cells)}")
                before = [
                    c for c, step in zip(cells, counted, strict=True) if at is not None and _order(step) <= _order(at)
                ]
                mark = " " * 21 + " " * (len(" ".join(before)) - 1) + "^" if before else ""
    return [*lines, mark] if mark else lines


def _order(step: Step) -> tuple[int, int]:
    return step.generation, step.index


def _cell(counts: Counts | None, role: str) -> str:
    reused, computed = (counts[role, True], counts[role, False]) if counts is not None else (0, 0)
    return "M" if reused and computed else "R" if reused else "C" if computed else "."


def _left_alone(backend: PABBackend | None) -> list[str]:
    regions = backend.report().regions if backend is not None else ()
    return [f"left alone: {each.name} ({each.role}): {each.left_alone}" for each in regions if each.left_alone]


def _until(generations: Sequence[Sequence[float]], at: Step | None) -> list[tuple[float, ...]]:
    """The generations up to a step: what comes later has no part in its failure."""
    if at is None:
        return list(map(tuple, generations))
    return [*map(tuple, generations[: at.generation]), tuple(generations[at.generation][: at.index + 1])]
