"""Call a model with the conditional half of its batch, and make up the other half of the prediction.

    a whole call     model(both halves) = uncond, cond    kept: low(uncond) - low(cond), high(uncond) - high(cond)
    half of one      model(cond half)   = cond            made: uncond, of low(cond) + high(cond) + what was kept

`low` and `high` are the frequencies of a frame. This is the part of `FasterCacheConfig` that is about the call of a
model and not about what is in it (`diffusers/hooks/faster_cache.py`, seen in 0.42; arXiv 2410.19355).
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._torch import mark_batch_static
from ..compile.specs import TensorSpec
from ..policy.checks import is_number
from ..policy.policy import Policy
from ..policy.when import SkipRange
from ..policy.where import UNCOND
from ..run.clock import Step, as_number, current_step, given_timestep, running_pipeline, timestep_from
from ..run.contexts import current_cache_context
from ..run.deciding import Call, Lockstep
from ..run.runtime import Runtime
from ..run.state import Cell, StateStore
from .faster_cache import FasterCacheConfig, batch_rule_of, number_from, policies_of_faster_cache
from .frequencies import DIMENSIONS, frames_of, from_low_and_high, low_and_high, prediction_of

WHERE_NAMED = "_unconditional_conditional_input_kwargs_identifiers"
"""The field that names the arguments that have both halves."""


@dataclass(frozen=True)
class HalfBatch:
    """A `FasterCacheConfig` of a model with guidance by batch: policies of its two kinds of calls, and when which is.

    Args:
        config: the config.

    Raises:
        ValueError: for fields that make no sense.
    """

    config: Any
    when: SkipRange = field(init=False, repr=False)
    whole: tuple[Policy, ...] = field(init=False, repr=False)
    half: tuple[Policy, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", policies_of_faster_cache(self.config, is_whole=True))
        object.__setattr__(self, "half", policies_of_faster_cache(self.config))
        object.__setattr__(self, "when", batch_rule_of(self.config))

    @property
    def current_timestep_callback(self) -> Callable[[], Any] | None:
        """That of the config."""
        callback: Callable[[], Any] | None = self.config.current_timestep_callback
        return callback

    def weight(self, frequency: str, model: nn.Module, t: float) -> float:
        """What the differences of "low" or "high" frequencies are multiplied by in a step."""
        name = f"{frequency}_frequency_weight_callback"
        callback = getattr(self.config, name)
        if callback is not None:
            return number_from(name, callback, model)
        low, high = getattr(self.config, f"{frequency}_frequency_weight_update_timestep_range")
        return float(getattr(self.config, f"alpha_{frequency}_frequency")) if low < t < high else 1.0


def with_halves(config: Any) -> Any:
    """A config as `enable` takes it: a `FasterCacheConfig` is more than policies, unless the model is distilled.

    Raises:
        ValueError: for one among several configs: what the others keep is of whole batches.
    """
    if isinstance(config, (list, tuple)) and any(map(_has_halves, config)):
        if len(config) > 1:
            raise ValueError(
                "FasterCacheConfig calls the model with half a batch, and what other policies keep is of a whole one: "
                "pass it alone, or set is_guidance_distilled=True, which leaves its attentions."
            )
        config = config[0]
    return HalfBatch(config) if _has_halves(config) else config


def _has_halves(config: Any) -> bool:
    return isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled


@dataclass
class _State:
    """What is found in a cache context of a request.

    Args:
        cell: counts the calls, and keeps the differences.
        modules: decides about the cell.
        shapes: of the inputs that have both halves.
        batch: size of a whole batch.
        halves: by the name of an input: the tensor, held weakly, its version and its half.
    """

    cell: Cell
    modules: Lockstep
    shapes: Sequence[torch.Size] = ()
    batch: int = 0
    halves: dict[Any, tuple[Any, Any, torch.Tensor]] = field(default_factory=dict)


class HalvingCall:
    """A model's compiled call that leaves out the unconditional half of the batch in some steps.

    Args:
        model: the model, held weakly.
        config: when and how.
        whole, half: its compiled calls, for a whole batch and for half of one.
        runtime: owner of the state.
        is_static: whether the size of a batch is a constant of the compiled graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HalfBatch,
        whole: Callable[..., Any],
        half: Callable[..., Any],
        runtime: Runtime,
        is_static: bool,
    ) -> None:
        self._model, self._config, self._runtime, self._is_static = weakref.ref(model), config, runtime, is_static
        self._whole, self._half = whole, half
        self._name, self._parameters = type(model).__name__, tuple(inspect.signature(model.forward).parameters)
        self._names = frozenset(getattr(config.config, WHERE_NAMED))
        self._format: str = config.config.tensor_format

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, runtime, step = self._model(), self._runtime, current_step.get() or Step()
        assert model is not None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            return self._whole(*args, **kwargs)  # for training nothing is kept
        given = self._with_halves(args, kwargs)
        store, context = runtime.store(step.request), (current_cache_context.get(), step.branch)
        state = self._state(model, store, context)
        shapes = [each.shape for each in given.values()]
        if shapes != state.shapes:
            state.cell.reset()
            state.shapes = shapes
        t = self._timestep(step, args, kwargs)
        call = Call(t, step.next_t, step.timesteps or runtime.known_timesteps(), step.generation)
        state.modules.begin(call, (state.cell.specs,))
        if state.cell.count.n == 0:
            self._check_guidance()
            store.forget_once(context)  # weights may be others than in the last generation
        (decision,) = state.modules.advance(call, lambda rule: None)
        decision.record(runtime.counts)
        if any(decision.reuses):
            weights = [self._config.weight(frequency, model, t) for frequency in ("low", "high")]
            return self._called_half(state, decision.keeps, weights, given, args, kwargs)
        return self._called_whole(state, decision.keeps, args, kwargs)

    def _state(self, model: nn.Module, store: StateStore, context: Any) -> _State:
        found: dict[Any, _State] = store.found.setdefault(self, {})
        if context not in found:
            cell = store.find(model, UNCOND, context)
            if cell is None:
                cell = store.add(model, UNCOND, context, Cell(UNCOND, self._config.when, name=UNCOND))
            found[context] = _State(cell, Lockstep((cell,), (1,), (False,), (None,), ()))
        return found[context]

    def _check_guidance(self) -> None:
        """Refuse a pipeline that says it has no guidance: the halves of its batch are different prompts."""
        pipeline = running_pipeline()
        has_guidance = getattr(pipeline, "do_classifier_free_guidance", None)
        if has_guidance is None:
            scale: Any = getattr(pipeline, "guidance_scale", None)
            has_guidance = not is_number(scale) or scale > 1
        if not has_guidance:
            raise ValueError(
                f"{type(pipeline).__name__} runs without guidance, as its guidance_scale says, so its batch has no "
                "unconditional half for FasterCacheConfig to leave out. Set a guidance_scale above 1, or "
                "is_guidance_distilled=True, which leaves the attentions."
            )

    def _timestep(self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """As the graphs of this call take it."""
        if step.t is not None:
            return step.t
        callback = self._runtime.callback
        given = given_timestep(self._parameters, args, kwargs) if callback is None else timestep_from(callback)
        return math.inf if given is None else as_number(given)

    # ------------------------------------------------------------------------------------------- the two calls

    def _called_whole(self, state: _State, keeps: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model as it was called, and keep how the halves of its prediction differ."""
        state.cell.caches = None
        outputs = self._whole(*args, **kwargs)
        prediction = self._prediction(outputs)
        state.batch = prediction.shape[0]
        if state.batch % 2:
            raise RuntimeError(
                f"{self._name} returned a prediction of shape {list(prediction.shape)}, which has no unconditional and "
                "conditional half. Set is_guidance_distilled=True if there is no unconditional half in the batch."
            )
        if keeps:
            uncond, cond = map(low_and_high, frames_of(prediction, self._format).chunk(2))
            self._keep(state.cell, [a - b for a, b in zip(uncond, cond, strict=True)])
        return outputs

    def _called_half(
        self,
        state: _State,
        keeps: bool,
        weights: Sequence[float],
        given: Mapping[Any, torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call the model with the conditional half, and make up the other half of the prediction."""
        halves = {name: self._half_of(state, name, tensor) for name, tensor in given.items()}
        kept = [self._runtime.lend(state.cell, i) for i in range(2)]
        state.cell.caches = None
        outputs = self._half(
            *(halves.get(i, each) for i, each in enumerate(args)),
            **{name: halves.get(name, each) for name, each in kwargs.items()},
        )
        prediction = self._prediction(outputs)
        batch = prediction.shape[0]
        if 2 * batch != state.batch:
            raise RuntimeError(
                f"{self._name} was called with half of a batch and returned {batch} predictions in place of "
                f"{state.batch // 2}: another argument has both halves of guidance. Add its name to {WHERE_NAMED}."
            )
        kept = [each * weight for each, weight in zip(kept, weights, strict=True)]
        if keeps:
            self._keep(state.cell, kept)
        cond = low_and_high(frames_of(prediction, self._format))
        low, high = (difference + each for difference, each in zip(kept, cond, strict=True))
        uncond = prediction_of(from_low_and_high(low, high), self._format, batch).to(prediction.dtype)
        return _with_prediction(outputs, torch.cat([uncond, prediction]))

    def _keep(self, cell: Cell, differences: Sequence[torch.Tensor]) -> None:
        cell.caches = self._runtime.hold(cell, tuple(differences))
        cell.specs = tuple(
            TensorSpec(tuple(each.shape), each.dtype, each.device, tuple(range(each.dim()))) for each in differences
        )

    # ------------------------------------------------------------------------------------------- inputs and outputs

    def _with_halves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
        """The inputs that have both halves, by name or position: those that are named, and all positional tensors.

        Raises:
            ValueError: if there are none by name, or one cannot be halved.
        """
        named = {name: each for name, each in kwargs.items() if name in self._names and each is not None}
        if not named:
            raise ValueError(
                f"{self._name} is called without any of the keyword arguments {', '.join(sorted(self._names))}, so its "
                "batch cannot be halved. Pass by name what has both halves of guidance, and say these names in "
                f"{WHERE_NAMED}; or set is_guidance_distilled=True if there is no unconditional half in the batch."
            )
        positional: dict[Any, Any] = {i: each for i, each in enumerate(args) if isinstance(each, torch.Tensor)}
        for name, each in (*named.items(), *positional.items()):
            if not isinstance(each, torch.Tensor) or not each.dim() or each.shape[0] % 2:
                shown = f"of shape {list(each.shape)}" if isinstance(each, torch.Tensor) else f"= {each!r}"
                label = self._parameters[name] if name in range(len(self._parameters)) else name
                raise ValueError(
                    f"{self._name} is called with {label} {shown}, which has no unconditional and no conditional half: "
                    "those are the halves of a first dimension of an even size. Set is_guidance_distilled=True if "
                    f"there is no unconditional half, or {WHERE_NAMED} to the names of those arguments that have both; "
                    "pass other tensors by name."
                )
        return {**named, **positional}

    def _half_of(self, state: _State, name: Any, tensor: torch.Tensor) -> torch.Tensor:
        """The conditional half of an input; the same object in each step for an input that is the same."""
        version = None if tensor.is_inference() else tensor._version
        if name in state.halves:
            seen, seen_version, half = state.halves[name]
            if seen() is tensor and seen_version == version:
                return half
        half = mark_batch_static(tensor.chunk(2)[1]) if self._is_static else tensor.chunk(2)[1]
        state.halves[name] = (weakref.ref(tensor), version, half)
        return half

    def _prediction(self, outputs: Any) -> torch.Tensor:
        """The prediction among what a model returned.

        Raises:
            RuntimeError: if there is none, or its dimensions are not those of the config.
        """
        found = outputs[0] if isinstance(outputs, tuple) else outputs
        found = found if isinstance(found, torch.Tensor) else getattr(found, "sample", None)
        if not isinstance(found, torch.Tensor):
            raise RuntimeError(
                f"{self._name} returned a {type(outputs).__name__} without a tensor called sample, of which the "
                "unconditional half could be made up. Call the model with return_dict=False."
            )
        dimensions = DIMENSIONS[self._format]
        if found.dim() < 4 or dimensions not in (None, found.dim()):
            raise RuntimeError(
                f"{self._name} returned a prediction of shape {list(found.shape)}, which is not tensor_format="
                f"{self._format!r}. Set that to how its dimensions lie, one of {', '.join(DIMENSIONS)}; a prediction "
                "without height and width has no such frequencies, and leaves is_guidance_distilled=True."
            )
        return found


def _with_prediction(outputs: Any, prediction: torch.Tensor) -> Any:
    """What a model returned, with another prediction."""
    if isinstance(outputs, torch.Tensor):
        return prediction
    if isinstance(outputs, tuple):
        return (prediction, *outputs[1:])
    outputs.sample = prediction
    return outputs
