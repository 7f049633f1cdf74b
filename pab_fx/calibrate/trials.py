"""One captured model, run under many settings: what a setting generates, and how long each of its steps takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from .._torch import lookup_backend
from ..enable import PAB, enable
from ..policy.config import LayerBroadcast, MLPBroadcast, PABConfig
from ..policy.when import Progress, Rule, SkipRange, Step
from ..policy.where import ATTENTION_ROLES
from .changes import ModuleChanges, Observer
from .samples import Batch, Generate, sampler
from .settings import rule_of

COMPUTED = SkipRange(1, 0.0, 0.0)
"""The rule of what is counted and never reused."""


@dataclass(frozen=True)
class ComputeAndKeep(Rule):
    """Compute in every step and hand on what it leaves, to be compared with what other steps leave."""

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> bool:
        """Never reuse."""
        return False

    def keeps(self, step: Step, progress: Progress, next_t: float | None) -> bool:
        """Always, also after the last step."""
        return True


@dataclass
class Stopwatch:
    """An inner compiler that has another one compile, and notes how long each run of a graph takes.

    Args:
        inner: the other one.
    """

    inner: Callable[..., Any]
    seconds: list[float] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        run = self.inner(gm, example_inputs)

        def timed(*args: Any) -> Any:
            _wait()
            start = time.perf_counter()
            outputs = run(*args)
            _wait()
            self.seconds.append(time.perf_counter() - start)
            return outputs

        return timed


def _wait() -> None:
    """Until an accelerator has done what it was told to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Trials:
    """A model or pipeline under one setting after another; a context manager that leaves it as it was.

    It is captured once, with every attention and feed-forward conditional. A setting only gives them other rules, so
    each set of reusing modules is lowered once for all settings.

    Args:
        model: a pipeline, or a model.
        generate: as for `calibrate`, and so are `call` and `inner`.
        base: the config whose identifiers and timestep callback are taken over.

    Raises:
        ValueError, TypeError: as `enable`.
    """

    def __init__(
        self, model: Any, generate: Generate | None, call: Mapping[str, Any], base: PABConfig, inner: Any
    ) -> None:
        self._stopwatch = Stopwatch(lookup_backend(inner) if isinstance(inner, str) else inner)
        self._model, self._config, self._sample = model, everything(base), sampler(model, generate, call)
        self._pab: PAB | None = None

    def __enter__(self) -> Trials:
        self._pab = enable(self._model, self._config, inner=self._stopwatch)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pab is not None:
            self._pab.disable()
            self._pab = None

    def observe(self, batch: Batch, lags: int) -> tuple[np.ndarray, tuple[ModuleChanges, ...]]:
        """Samples without PAB, [N, ...], and how much each output changes in their generation."""
        assert self._pab is not None
        observer = self._pab.backend.runtime.holder = Observer(lags)
        try:
            samples, _ = self._run(lambda role, name: ComputeAndKeep(), batch)
        finally:
            self._pab.backend.runtime.holder = None
        return samples, observer.changes()

    def run(self, config: PABConfig | None, batch: Batch) -> tuple[np.ndarray, tuple[float, ...]]:
        """Samples under a setting, `None` for none, and the seconds of each run of a graph, in order."""
        return self._run(lambda role, name: (config and rule_of(config, role, name)) or COMPUTED, batch)

    def _run(self, rules: Callable[[str, str], Rule], batch: Batch) -> tuple[np.ndarray, tuple[float, ...]]:
        assert self._pab is not None
        self._pab.backend.assign(rules)
        self._stopwatch.seconds.clear()
        with torch.no_grad():
            samples = self._sample(batch)
        self._pab.reset()
        return samples, tuple(self._stopwatch.seconds)


def everything(base: PABConfig) -> PABConfig:
    """A config by which every attention and feed-forward is conditional; its rules are replaced in each trial."""
    identifiers: dict[str, Any] = {f"{r}_attention_block_identifiers": base.identifiers(r) for r in ATTENTION_ROLES}
    return PABConfig(
        layers=LayerBroadcast(("",), skip_range=2),
        mlp=MLPBroadcast(timesteps=(0,)),
        current_timestep_callback=base.current_timestep_callback,
        **identifiers,
    )
