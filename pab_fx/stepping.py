"""What an enabled model runs in place of its own call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._torch import cloned
from .backend import PABBackend
from .run.clock import Step, given_timestep, request_of, running, running_pipeline
from .run.contexts import current_cache_context


class SteppingCall:
    """A model's compiled call, which knows the step it belongs to; one that fails leaves no half-counted step behind.

    Args:
        model: the model, which is held weakly: it holds this.
        compiled: its call.
        backend: what it is compiled with.
        owner: the pipeline that was enabled, which the config's callback is about; `None` if it was a model.

    Attributes:
        before: what `compile()` made of the model's call, `None` if it was not compiled: to go back to.
    """

    before: Any = None

    def __init__(
        self,
        model: nn.Module,
        compiled: Callable[..., Any],
        backend: PABBackend,
        owner: weakref.ref[Any] | None,
    ) -> None:
        self._model, self._compiled, self._backend, self._owner = weakref.ref(model), compiled, backend, owner
        self._name, self._id = type(model).__name__, id(model)
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._has_broadcast = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime, pipeline, caller = self._backend.runtime, running_pipeline(), (self._id, current_cache_context.get())
        request = request_of(pipeline)
        store = runtime.store(request)
        store.enter(caller)
        try:
            step = self._step(pipeline, request, caller, args, kwargs)
            outputs = self._stepped(step, pipeline, caller, args, kwargs)
        finally:
            store.leave(caller)
        if runtime.has_cuda_graphs:  # the next call overwrites it: another branch's, or request's
            outputs = cloned(outputs)
        return outputs

    def _stepped(self, step: Step, pipeline: Any, caller: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        runtime = self._backend.runtime
        known, calls = len(self._backend.regions), runtime.calls
        try:
            with running(step):
                outputs = self._compiled(*args, **kwargs)
        except BaseException:
            self._forget(step.request)
            if pipeline is not None:
                runtime.clock(pipeline).retract(caller)
            raise
        if self._has_broadcast and runtime.calls == calls:  # what is kept is of another step than the last
            self._forget(step.request)
        self._warn(known, runtime.calls > calls)
        return outputs

    def _forget(self, request: Any) -> None:
        """Begin anew in one request; others are in the middle of theirs."""
        model = self._model()
        if model is not None:
            self._backend.runtime.store(request).reset([*model.parameters(), *model.modules()])

    def _step(self, pipeline: Any, request: Any, caller: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        if pipeline is None:
            return Step(request)
        given = given_timestep(self._parameters, args, kwargs)
        is_owner = self._owner is None or pipeline is self._owner()
        return self._backend.runtime.clock(pipeline).tick(pipeline, request, caller, given, is_owner)

    def _warn(self, known: int, broadcasts: bool) -> None:
        """Warn of a call that broadcast nothing, or of attentions that were left alone in it for the first time.

        Args:
            known: how many regions were known before the call.
            broadcasts: whether the call ran a graph that broadcasts.
        """
        backend, notices = self._backend, self._backend.notices
        if not backend.regions and not notices.messages:
            (notices.warn_of_no_attention if backend.captured else notices.warn_of_no_capture)(self._name)
        notices.warn_of_left_alone(backend.newly_left_alone(known))
        if not self._has_broadcast:
            called = {role for role, _ in list(backend.runtime.counts)}  # a list: another thread may count meanwhile
            notices.warn_of_unmatched_roles(self._name, backend.policies, backend.regions, called)
            if len(backend.roots) == 1:  # else they may be another model's
                notices.warn_of_unmatched_names(self._name, backend.policies, backend.regions)
        if self._has_broadcast and not broadcasts and not torch.is_grad_enabled():
            notices.warn_of_no_graph(self._name)
        self._has_broadcast |= broadcasts
