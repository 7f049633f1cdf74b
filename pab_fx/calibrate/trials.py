"""A model, run under one setting after another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import fx

from .._torch.dynamo import lookup_backend
from ..enable import PAB, enable
from ..policy.policy import Policy
from ..policy.when import Progress, Rule, Step
from ..policy.where import Attentions
from ..report.report import Report
from .prediction import Costs
from .samples import Batch, Generate, sampler
from .setting import observed
from .trajectory import Observer, Trajectory


@dataclass(frozen=True)
class ComputeAndKeep(Rule):
    """Compute in every step and hand on what it leaves, to be compared with what other steps leave."""

    def decide(self, step: Step, progress: Progress, signal: Any = None) -> bool:
        """Never reuse."""
        return False

    def keeps(self, step: Step, progress: Progress, next_t: float | None) -> bool:
        """Always, also after the last step."""
        return True


NOTHING = (Policy(Attentions(), None),)
"""Policies by which nothing is reused."""


@dataclass
class Stopwatch:
    """An inner compiler that has another one compile, and adds up how long the graphs run.

    Args:
        inner: the other one.
    """

    inner: Callable[..., Any]
    seconds: float = field(default=0.0, init=False)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        run = self.inner(gm, example_inputs)

        def timed(*args: Any) -> Any:
            _wait()
            start = time.perf_counter()
            outputs = run(*args)
            _wait()
            self.seconds += time.perf_counter() - start
            return outputs

        return timed


def _wait() -> None:
    """Until an accelerator has done what it was told to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Observed:
    """What a generation without a cache has shown.

    Args:
        samples: [N, ...].
        trajectories: what each part has left.
        costs: what each role costs.
    """

    samples: np.ndarray
    trajectories: tuple[Trajectory, ...]
    costs: Costs


@dataclass(frozen=True)
class Ran:
    """What a generation under a setting has come to.

    Args:
        samples: [N, ...].
        reused: how many calls of each role reused.
    """

    samples: np.ndarray
    reused: Mapping[str, int]


class Trials:
    """A model or pipeline under one config after another; a context manager that leaves it as it was.

    Args:
        model: a pipeline, or a model.
        generate: as for `calibrate`, and so are `call` and `inner`.

    Attributes:
        timesteps: those of a generation, once one was observed that no pipeline tells of; else `None`.
    """

    def __init__(self, model: Any, generate: Generate | None, call: Mapping[str, Any], inner: Any) -> None:
        self._stopwatch = Stopwatch(lookup_backend(inner) if isinstance(inner, str) else inner)
        self._model, self._sample = model, sampler(model, generate, call)
        self._config: Any = None
        self._pab: PAB | None = None
        self.timesteps: tuple[float, ...] | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *exception: object) -> None:
        self._disable()

    def observe(self, batch: Batch) -> Observed:
        """Generate without a cache, and look at each part."""
        pab = self._enabled(tuple(Policy(where, ComputeAndKeep(), how) for where, how in observed()))
        observer = pab.backend.runtime.holder = Observer()
        samples = self._generated(batch)
        report = pab.report()
        self._disable()
        trajectories = observer.trajectories()
        self.follow(trajectories)
        return Observed(samples, trajectories, _costs(report))

    def follow(self, trajectories: Sequence[Trajectory]) -> None:
        """Take the timesteps over from a generation that was observed, where no pipeline tells them."""
        if not isinstance(self._model, DiffusionPipeline):
            self.timesteps = tuple(sorted({t for each in trajectories for t in each.timesteps}, reverse=True))

    def run(self, config: Any, batch: Batch) -> Ran:
        """Generate under policies, or another config that `enable` takes."""
        pab = self._enabled(config)
        before = _reused(pab.report())
        samples = self._generated(batch)
        return Ran(samples, dict(_reused(pab.report()) - before))

    def seconds(self, config: Any, batch: Batch) -> float:
        """How long the graphs run in a generation."""
        self._enabled(config)
        self._stopwatch.seconds = 0.0
        self._generated(batch)
        return self._stopwatch.seconds

    def _generated(self, batch: Batch) -> np.ndarray:
        assert self._pab is not None
        with torch.no_grad():
            samples = self._sample(batch)
        self._pab.reset()
        return samples

    def _enabled(self, config: Any) -> PAB:
        if self._pab is not None and _captures(config) == _captures(self._config) is not None:
            self._pab.set_config(config)
        elif self._pab is None or config != self._config:
            self._disable()
            options: dict[str, Any] = {} if self.timesteps is None else {"timesteps": self.timesteps}
            self._pab = enable(self._model, config, inner=self._stopwatch, **options)
        self._config = config
        return self._pab

    def _disable(self) -> None:
        if self._pab is not None:
            self._pab.disable()
            self._pab = self._config = None


def _captures(config: Any) -> Any:
    """What has to be captured for policies, whatever their rules; `None` for other configs, and rules with signals."""
    if not isinstance(config, tuple) or any(each.when is None or each.when.signal is not None for each in config):
        return None
    return [(each.where, each.how) for each in config]


def _reused(report: Report) -> Counter[str]:
    return Counter({role.role: role.reused for role in report.roles})


def _costs(report: Report) -> Costs:
    shares: Counter[str] = Counter()
    for region in report.regions:
        if region.left_alone is None:
            shares[region.role] += region.flops_share or 0.0  # type: ignore[assignment]
    return Costs(dict(shares), {role.role: role.computed for role in report.roles})
