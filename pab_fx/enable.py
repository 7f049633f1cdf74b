"""Turn PAB on for a model or pipeline, in place, and off again."""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ._torch.dynamo import recompiles_of_its_own
from .backend import PABBackend, backend_that_captured
from .diffusers import listen
from .diffusers.configs import HOOKS_CONFIGS
from .diffusers.half_batch import HalfBatch, HalvingCall, with_halves
from .diffusers.hooks import is_offloaded_by_layer, other_cache, prepare_split_hooks
from .graph.modules import repeated_blocks
from .policy.checks import checked_flag
from .report.report import Report
from .run.clock import Session
from .stepping import SteppingCall

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "transformer_2", "unet")
_enabled: weakref.WeakKeyDictionary[nn.Module, PAB] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Enabled:
    """A model that PAB is on, its call, both held weakly, and the config of diffusers' hooks to restore."""

    model: weakref.ref[nn.Module]
    call: weakref.ref[SteppingCall]
    hooks: Any


class PAB:
    """PAB on one or more models; made by `enable`. Also a context manager that disables at its end.

    Args:
        backend: the backend that the models are compiled with; it owns graphs and state.
        compile_options: arguments of `torch.compile`.
    """

    def __init__(self, backend: PABBackend, **compile_options: Any) -> None:
        self.backend = backend
        # one call for all models, which share what is compiled if they are of one class
        compile_call: Any = partial(torch.compile, nn.Module._call_impl, **recompiles_of_its_own(), **compile_options)
        self._compiled = compile_call(backend=backend)
        self._half: Any = None
        if isinstance(backend.config, HalfBatch):
            self._half = compile_call(backend=partial(backend.compile_for, policies=backend.config.half))
        self._is_dynamic = compile_options.get("dynamic") is True
        self._models: list[_Enabled] = []
        self._last_report: Report | None = None

    def __repr__(self) -> str:
        models = [type(each.model()).__name__ for each in self._models if each.model() is not None]
        return f"PAB({', '.join(models) or 'disabled'}; {self.backend!r})"

    def reset(self) -> None:
        """Start a new generation: counters are 0 and caches are given back.

        A timestep that rises, tensors of another shape and the end of a pipeline's call do that too.
        """
        self.backend.reset()

    def session(self) -> Session:
        """A request of its own, for a model that several share: `with pab.session(): ...`.

        What is counted and kept inside belongs to the session and goes with it; entering it again continues it.
        Pipelines that share a model are requests of their own without that.

        Raises:
            RuntimeError: after `disable`.
        """
        self._check_enabled()
        return Session()

    def warmup(self, timesteps: Any = None) -> None:
        """Compile ahead of time the graphs that generations to come need; as `PABBackend.warmup`.

        Inputs have to have been seen: call the model or the pipeline once before, for a single step will do.

        Raises:
            RuntimeError: after `disable`.
        """
        self._check_enabled()
        self.backend.warmup(timesteps)

    def set_config(self, config: Any) -> None:
        """Go by another config from now on, in generations that begin afresh.

        What is captured stays. A set of reusing parts that was compiled for one config serves every other one, so that
        a sweep over settings compiles each set once.

        Args:
            config: as for `enable`. It may give other rules to the parts that are conditional already, or leave them
                alone. For parts that were left alone, and for another how, call `disable` and `enable`.

        Raises:
            ValueError: for a bad config, or one that has to be captured anew, naming the part.
            RuntimeError: after `disable`.

        Warns:
            UserWarning: if it matches nothing of what is captured.

        Example:
            >>> from pab_fx import Attentions, Every, Policy
            >>> pab = enable(torch.nn.Linear(2, 2), Policy(Attentions(), Every(2)), inner="eager")
            >>> pab.set_config(Policy(Attentions(), Every(3)))
        """
        self._check_enabled()
        given = with_halves(config)
        if isinstance(given, HalfBatch) or self._half is not None:
            raise ValueError(
                f"{type(config).__name__} in place of {type(self.backend.config).__name__} changes how the model is "
                "called, by half of its batch: call disable() and enable()."
            )
        self.backend.set_config(config)

    def report(self) -> Report:
        """What is broadcast, what is left alone and why, what was computed and reused so far (or up to `disable`)."""
        return self._last_report or self.backend.report()

    def disable(self) -> None:
        """Restore the models as they were before `enable`; doing so twice does nothing."""
        self._last_report = self.report()
        while self._models:
            enabled = self._models.pop()
            model: Any = enabled.model()
            if model is None:
                continue
            call = enabled.call()
            if call is not None:
                vars(model).pop("_compiled_call_impl", None)
                if call.before is not None:
                    model._compiled_call_impl = call.before
            _enabled.pop(model, None)
            if enabled.hooks is not None:
                model.enable_cache(enabled.hooks)
        self.backend.clear()

    def __enter__(self) -> PAB:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def _check_enabled(self) -> None:
        if self._last_report is not None:
            raise RuntimeError("PAB was disabled on this model, which runs as it did before: call pab_fx.enable again.")

    def _enable(
        self,
        model: Any,
        hooks: Any,
        owner: weakref.ref[DiffusionPipeline] | None,
    ) -> None:
        prepare_split_hooks(model)
        compiled: Any = partial(self._compiled, model)
        if self._half is not None:
            config: Any = self.backend.config
            half = partial(self._half, model)
            compiled = HalvingCall(model, config, compiled, half, self.backend.runtime, not self._is_dynamic)
        call = SteppingCall(model, compiled, self.backend, owner)
        call.before = model._compiled_call_impl
        # a torch.compile around the model has to run this call, not to trace into it
        model._compiled_call_impl = torch.compiler.disable(call)
        self._models.append(_Enabled(weakref.ref(model), weakref.ref(call), hooks))
        self.backend.roots.add(model)
        _enabled[model] = self

    def _keep_call(self, model: Any, call: Any) -> None:
        """Let a model that was compiled since go on with this call; `disable` goes back to what `compile` has made."""
        (own,) = (each.call() for each in self._models if each.model() is model)
        if own is not None:
            own.before, model._compiled_call_impl = model._compiled_call_impl, call


def enable(
    model: Any,
    config: Any = None,
    *,
    regional: bool = False,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> PAB:
    """Compile a model in place so that it broadcasts attention.

    The model keeps its class, parameters, `config` and `save_pretrained`; only its call is compiled. If diffusers'
    hooks for PAB, TaylorSeer, MagCache, the first block, SeaCache or FasterCache are on, they are taken off and, with
    `config=None`, their config is used.

    Args:
        model: a transformer, or a pipeline that holds one as `transformer`, `transformer_2` or `unet`.
        config: as for `PABBackend`; or give fields of `PABConfig` by name.
        regional: compile each repeated block once for all its siblings, each with its own cache and role,
            instead of the whole model: a fraction of the compile time, for a little of the speed.
        fullgraph: as for `torch.compile`.
        dynamic: as for `torch.compile`.
        options: arguments of `PABBackend`: `inner`, `lowering`, `passes`, `timesteps`, `mode`, `options`,
            `cache_dtype`, `cache_device`, `step_invariants`.

    Returns:
        The handle with `reset()`, `report()` and `disable()`; as a context manager it disables at the end.

    Raises:
        ValueError: for bad options, `regional` for a model without repeated blocks, a model on which PAB is
            enabled already or that is offloaded layer by layer, or another cache of diffusers.
        TypeError: for something that is neither a model nor a pipeline with one.

    Example:
        >>> with enable(torch.nn.Linear(2, 2), inner="eager") as pab:
        ...     print(pab.report())
        Nothing has run yet, so nothing was looked for. Planned:
        Attentions(roles=('spatial',)): computed every 2nd step in (100, 800)
    """
    models = [getattr(each, "_orig_mod", each) for each in denoisers(model)]
    for each in models:
        if each in _enabled:
            raise ValueError(f"PAB is enabled on this {type(each).__name__} already: call disable() on it first.")
        if is_offloaded_by_layer(each):
            raise ValueError(
                f"{type(each).__name__} is offloaded layer by layer (enable_sequential_cpu_offload), and torch.compile "
                "gives up on hooks around every layer: offload by block (enable_group_offload) or the whole model "
                "(enable_model_cpu_offload), or use diffusers' own enable_cache."
            )
    checked_flag("fullgraph", fullgraph)
    if dynamic is not None:
        checked_flag("dynamic", dynamic)
    for each in models if regional else ():
        repeated_blocks(each)  # raises where there are none
    hooked = [_hooks_config(each) for each in models]
    if config is None:
        config = next((each for each in hooked if each is not None), None)
    backend = PABBackend.of({**options, "config": with_halves(config), "regional": regional})
    pab = PAB(backend, fullgraph=fullgraph, dynamic=dynamic)
    owner = weakref.ref(model) if isinstance(model, DiffusionPipeline) else None
    for each, hooks in zip(models, hooked, strict=True):
        if hooks is not None:
            each.disable_cache()
            logger.info("took over from diffusers' hooks on %s", type(each).__name__)
        pab._enable(each, hooks, owner)
    return pab


def disable(model: Any) -> None:
    """Turn PAB off on a model or pipeline; nothing happens where it is not on.

    Args:
        model: what `enable` was given.

    Raises:
        TypeError: for something that is neither a model nor a pipeline with one.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> pab = enable(model, inner="eager"); disable(model)
    """
    for each in denoisers(model):
        own = getattr(each, "_orig_mod", each)
        if own in _enabled:
            _enabled[own].disable()


def report(model: Any) -> Report:
    """What a compiled model broadcasts and has broadcast, whichever way it was compiled, also by `backend="pab"`.

    Args:
        model: the model, or what `torch.compile` made of it; a pipeline with one.

    Raises:
        ValueError: if `pab_fx` has captured no graph of it.
        TypeError: for something that is neither a model nor a pipeline with one.

    Example:
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend="pab", options={"inner": "eager"})
        >>> report(model)
        Traceback (most recent call last):
        ...
        ValueError: pab_fx has captured no graph of this Linear yet: compile it with the backend "pab" and call it.
    """
    models = [getattr(each, "_orig_mod", each) for each in denoisers(model)]
    for own in models:
        backend = _enabled[own].backend if own in _enabled else backend_that_captured(own)
        if backend is not None:
            return backend.report()
    name = type(models[-1]).__name__
    raise ValueError(f'pab_fx has captured no graph of this {name} yet: compile it with the backend "pab" and call it.')


def denoisers(model: Any) -> list[Any]:
    """The models of a model or pipeline that denoise."""
    if isinstance(model, nn.Module):
        return [model]
    found = [getattr(model, name, None) for name in DENOISERS]
    models = [each for each in found if isinstance(each, nn.Module)]
    if not models:
        names = ", ".join(DENOISERS)
        raise TypeError(f"expected a model, or a pipeline with one of {names}; got {type(model).__name__}.")
    return models


def _hooks_config(model: Any) -> Any:
    """The config of diffusers' hooks on a model, `None` if they are off."""
    config = getattr(model, "_cache_config", None)
    if config is not None and not isinstance(config, HOOKS_CONFIGS):
        raise ValueError(
            f"{type(model).__name__} has another cache of diffusers enabled ({type(config).__name__}): "
            "call its disable_cache() first."
        )
    other = other_cache(model) if config is None else None
    if other is not None:
        raise ValueError(
            f"{type(model).__name__} has another cache of diffusers applied (its hook {other!r}): take it off first."
        )
    return config


def _refuse_cache(model: Any, config: Any) -> None:
    """Listens to `model.enable_cache(config)`: two caches do not mix."""
    if model in _enabled:
        raise ValueError(
            f"PAB is enabled on this {type(model).__name__} by pab_fx, and caches cannot be combined: call "
            f"pab_fx.disable(...) on it before enable_cache({type(config).__name__}(...))."
        )


_compile = nn.Module.compile


@functools.wraps(_compile)
def _compile_module(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In place of `Module.compile`: an enabled model, which is compiled already, stays so. Either order works."""
    call = vars(self).get("_compiled_call_impl")
    _compile(self, *args, **kwargs)
    if self in _enabled:
        _enabled[self]._keep_call(self, call)


nn.Module.compile = _compile_module  # type: ignore[method-assign]
listen.on_enable_cache.append(_refuse_cache)
