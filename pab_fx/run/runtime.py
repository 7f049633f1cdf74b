"""The state of a backend while models run: one owner, which every call of a graph is handed."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..compile.specs import TensorSpec
from ..policy.when import Rule, falling_timesteps
from .clock import PipelineClock, SeenTimesteps, request_of, running_pipeline
from .holding import Holder
from .running import TiedParameters
from .state import Cell, StateStore

Assigned = Callable[[str, str], "Rule | None"]
"""The rule for a role and a qualified name, `None` to leave that part alone."""


MOST_DECISIONS = 256
"""How many decisions by a signal are remembered, for reports."""

MOST_SCALARS = 4096
"""How many numbers are held as tensors: a weight may be another one in each step of each generation."""


class Runtime:
    """Counters, caches and clocks of a backend, by request.

    Args:
        timesteps: those of the generation, or a function that returns them; `None` where they are not known.
        callback: yields the current timestep in place of the model's own input.
        holder: holds what is kept; `None` where it stays as the graphs leave it.
        warn_once: warns, the first time there is that to say, by a key.
        checks_invariants: whether what is computed once a generation is computed in each step too, and compared.
        has_cuda_graphs: whether the next call of a compiled graph overwrites what it returned.

    Attributes:
        roots: models that are known to be whole.
        rule_of: rules that take the place of the captured ones.
        at_end: called with what a request has, as `cells` yields it, before it is given back at the end of a
            pipeline's call.
        on_number: called with a cache context, a rule and the number that was read for it.
        counts: calls of each role, by whether they reused.
        calls: calls of graphs that broadcast.
        computed_once: how often what does not change was computed.
        taken_as_kept: how often it was taken instead.
        left_alone: by name, why parts that were captured to be broadcast are computed in every step.
        decisions: the last ones by a signal: cache context, timestep, rule, what it went by, and whether it reused.
        restarts: generations that began in the middle of another, because a timestep rose a little.
    """

    def __init__(
        self,
        timesteps: tuple[float, ...] | Callable[[], Any] | None,
        callback: Callable[[], Any] | None,
        holder: Holder | None,
        warn_once: Callable[[str, str], None],
        checks_invariants: bool = False,
        has_cuda_graphs: bool = False,
    ) -> None:
        self.timesteps, self.callback, self.holder, self.warn_once = timesteps, callback, holder, warn_once
        self.checks_invariants, self.has_cuda_graphs = checks_invariants, has_cuda_graphs
        self.rule_of: Assigned | None = None
        self.at_end: Callable[[Iterable[tuple[Any, Any, Cell]]], object] = lambda cells: None
        self.on_number: Callable[[Any, Rule, float], object] = lambda context, rule, number: None
        self.roots: Any = ()
        self.clear()

    def clear(self) -> None:
        """Forget all state, as for a new backend."""
        self.forget_state()
        self._clocks: Any = WeakIdKeyDictionary()
        self.counts: Counter[tuple[str, bool]] = Counter()
        self.seen = SeenTimesteps()
        self.tied = TiedParameters()
        self.left_alone: dict[str, str] = {}
        self.decisions: deque[tuple[Any, float, Rule, float, bool]] = deque(maxlen=MOST_DECISIONS)
        self._unread: weakref.WeakValueDictionary[TensorSpec, torch.Tensor] = weakref.WeakValueDictionary()
        self._scalars: dict[tuple[float, torch.device], torch.Tensor] = {}
        self.calls = self.computed_once = self.taken_as_kept = self.restarts = self.numbers_read = 0

    def forget_state(self) -> None:
        """Forget what is counted and kept; generations begin afresh."""
        self.state = StateStore()
        self._stores: Any = WeakIdKeyDictionary()
        self._spare: list[StateStore] = []  # of requests that are over

    def known_timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of the running generation, `None` if they were not given."""
        return falling_timesteps(self.timesteps()) if callable(self.timesteps) else self.timesteps

    def store(self, request: Any) -> StateStore:
        """The state of a request (a session or a pipeline), or what belongs to none; it goes with the request."""
        if request is None:
            return self.state
        found = self._stores.get(request)
        return self._begun(request) if found is None else found

    def _begun(self, request: Any) -> StateStore:
        """The state of a new request. With CUDA graphs it takes over the buffers of a request that is over.

        The graphs were recorded for their addresses: with others, each request would have them recorded again.
        """
        try:
            new = self._spare.pop()
        except IndexError:
            new = StateStore()
        found: StateStore = self._stores.setdefault(request, new)
        if found is new and self.holder is not None and self.holder.at_one_address:
            weakref.finalize(request, _give_back, weakref.ref(new), self._spare).atexit = False
        return found

    def stores(self) -> list[StateStore]:
        """The state of every request, and what belongs to none."""
        return [self.state, *self._stores.data.copy().values()]  # another thread may begin a request meanwhile

    def clock(self, pipeline: Any) -> PipelineClock:
        """The clock that follows a pipeline."""
        found = self._clocks.get(pipeline)
        return found or self._clocks.setdefault(pipeline, PipelineClock(self.callback))

    def reset(self) -> None:
        """Start a new generation in every request: all counters are 0 and all caches are given back."""
        for store in self.stores():
            store.reset()

    def reset_model(self, model: nn.Module) -> None:
        """`reset` for the modules of one model, in the request that runs, or in all if none does."""
        request = request_of(running_pipeline())
        for store in self.stores() if request is None else [self.store(request)]:
            store.reset([*model.parameters(), *model.modules()])

    def end_generation(self, pipeline: Any) -> None:
        """A pipeline's call is over: give back what its request keeps."""
        if pipeline in self._clocks:
            self.clock(pipeline).end()
            store = self.store(request_of(pipeline))
            self.at_end(store.cells())
            store.reset()

    def note_decision(self, context: Any, t: float, rule: Rule | None, by: float | None, reuses: bool) -> None:
        """Note what a rule was decided by, if something was measured for it; once for all parts that go by it."""
        if rule is not None and by is not None:
            found = (context, t, rule, by, reuses)
            if not self.decisions or self.decisions[-1] != found:
                self.decisions.append(found)

    def leave_alone(self, name: str, why: str) -> None:
        """Note why a part is computed in every step though it was captured to be broadcast; the user is told."""
        self.left_alone[name] = why
        self.warn_once(f"left alone {name}", f"pab_fx: {name} is computed in every step: {why}.")

    def hold(self, cell: Cell, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """What a cell keeps of these tensors, where caches are to lie."""
        return tensors if self.holder is None else self.holder.hold(cell, tensors)

    def lend(self, cell: Cell, i: int) -> torch.Tensor:
        """One of the tensors that a cell keeps, as it was kept."""
        kept = cell.caches[i]  # type: ignore[index]
        return kept if self.holder is None else self.holder.lend(kept)

    def unread(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor to pass where a slot is demanded but not read; it goes with what holds it."""
        found = self._unread.get(spec)
        if found is None:
            found = self._unread[spec] = spec.empty()
        return found

    def scalar(self, number: float, device: torch.device) -> torch.Tensor:
        """A number as a tensor of shape [] and dtype float32 on a device, made once for each of those used lately."""
        key = (number, device)
        if key not in self._scalars:
            if len(self._scalars) >= MOST_SCALARS:
                self._scalars.clear()
            self._scalars[key] = torch.tensor(number, dtype=torch.float32, device=device)
        return self._scalars[key]

    def cells(self) -> Iterator[tuple[Any, Any, Any]]:
        """Every cell of every request, as `StateStore.cells` yields them."""
        for store in self.stores():
            yield from store.cells()


def _give_back(state: weakref.ref[StateStore], spare: list[StateStore]) -> None:
    """Called when a request is over, before its state goes."""
    found = state()
    if found is not None:
        found.reset()
        spare.append(found)
