"""Generates with settings, each once, and says how far the samples are from those without a cache."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from ..policy.files import as_json
from ..policy.policy import Policy
from .files import Folder
from .prediction import Costs
from .result import Outcome
from .samples import Batch, Difference
from .trajectory import Trajectory, summed
from .trials import NOTHING, Trials


class Laboratory:
    """Generates with settings, each once: what is in the folder is not run again.

    Args:
        folder: where results are kept.
        trials: runs the model.
        searched: what settings are searched with.
        held: what the search does not see, and decides.
        progress: shows how far it is.
        total: how many batches are generated at most.

    Attributes:
        costs: what each role costs.
        seconds: how long all prompts took without a cache.
    """

    def __init__(
        self,
        folder: Folder,
        trials: Trials,
        searched: Sequence[Batch],
        held: Sequence[Batch],
        progress: Progress,
        total: int,
    ) -> None:
        self._folder, self._trials = folder, trials
        self._searched, self._held = tuple(searched), tuple(held)
        self._progress, self._task = progress, progress.add_task("", total=total)
        self._references: dict[Batch, np.ndarray] = {}
        self.costs, self.seconds = Costs({}, {}), 0.0

    def observe(self) -> tuple[Trajectory, ...]:
        """What the parts leave without a cache, summed over prompts; keeps the samples to compare others with.

        Raises:
            ValueError: if nothing was found that could be reused, or a generation is too short.
        """
        found: list[Trajectory] = []
        for batch in self._shown("observing", (*self._searched, *self._held)):
            known = self._folder.load(f"observed-{batch.label}")
            if known is None:
                known = self._observed(batch)
            self._references[batch] = self._array(f"reference-{batch.label}")
            products = iter(self._array(f"products-{batch.label}"))
            steps = [tuple(each["timesteps"]) for each in known["parts"]]
            found += [
                Trajectory(each["name"], each["role"], plan, next(products)[: len(plan), : len(plan)])
                for each, plan in zip(known["parts"], steps, strict=True)
                if batch in self._searched
            ]
            self.costs = Costs(known["shares"], known["calls"])
            self.seconds += known["seconds"]
        trajectories = summed(found)
        self._trials.follow(trajectories)
        return trajectories

    def outcome(self, label: str, config: Any, on_held: bool = False) -> Outcome:
        """What a config does to the samples of the prompts that are searched with, or of those held out.

        Args:
            label: what it is called.
            config: policies, or another config that `enable` takes.
            on_held: which prompts.
        """
        batches = self._held if on_held else self._searched
        name = hashlib.sha256(_written(config).encode()).hexdigest()[:16]
        differences: list[Difference] = []
        left = []
        for batch in self._shown(label + (", held out" if on_held else ""), batches):
            key = f"{name}-{batch.label}"
            entry = self._folder.load(key) or self._generated(config, batch, key)
            differences += [Difference(*each) for each in entry["differences"]]
            left.append(self.costs.left(Counter(entry["reused"])))
        return Outcome(label, config, tuple(differences), statistics.fmean(left))

    def measured_speedup(self, config: Any, rounds: int) -> float | None:
        """The ratio of the seconds of denoising without and with a config, in turns; median over rounds."""
        ratios = []
        for _ in self._shown("timing", range(rounds)):
            without, within = (self._trials.seconds(each, self._searched[0]) for each in (NOTHING, config))
            ratios.append(without / within)
        return statistics.median(ratios) if ratios else None

    def _observed(self, batch: Batch) -> dict[str, Any]:
        start = time.perf_counter()
        observed = self._trials.observe(batch)
        seconds = time.perf_counter() - start
        _check_observed(observed.trajectories, observed.costs)
        steps = max(len(each.timesteps) for each in observed.trajectories)
        products = np.zeros((len(observed.trajectories), steps, steps))
        for own, each in zip(products, observed.trajectories, strict=True):
            own[: len(each.timesteps), : len(each.timesteps)] = each.products
        self._folder.save_array(f"products-{batch.label}", products)
        self._folder.save_array(f"reference-{batch.label}", observed.samples)
        entry = {
            "parts": [{"name": t.name, "role": t.role, "timesteps": t.timesteps} for t in observed.trajectories],
            "shares": observed.costs.shares,
            "calls": observed.costs.calls,
            "seconds": seconds,
        }
        self._folder.save(f"observed-{batch.label}", entry)
        return entry

    def _generated(self, config: Any, batch: Batch, key: str) -> dict[str, Any]:
        ran = self._trials.run(config, batch)
        found = [Difference.between(a, b) for a, b in zip(ran.samples, self._references[batch], strict=True)]
        entry = {
            "config": _written(config),
            "differences": [[each.squared, each.norm, each.size] for each in found],
            "reused": ran.reused,
        }
        self._folder.save(key, entry)
        return entry

    def _array(self, name: str) -> np.ndarray:
        found = self._folder.load_array(name)
        if found is None:
            raise ValueError(f"{name}.npy is missing in {self._folder.entries}: name another folder, or delete it.")
        return found

    def _shown(self, label: str, items: Sequence[Any]) -> Iterator[Any]:
        """The items, while a line tells what is done, and how much of it."""
        self._progress.update(self._task, description=label)
        for each in items:
            yield each
            self._progress.advance(self._task)


def _written(config: Any) -> str:
    """A config as text, the same for equal ones."""
    if isinstance(config, tuple) and all(isinstance(each, Policy) for each in config):
        return json.dumps(as_json(config), sort_keys=True)
    return repr(config)


def _check_observed(trajectories: Sequence[Trajectory], costs: Costs) -> None:
    """Refuse a model in which nothing was found, or of whose operations nothing is known."""
    if not trajectories:
        raise ValueError("no attention and no block was found in the model, so there is nothing to calibrate.")
    steps = max(len(each.timesteps) for each in trajectories)
    if steps < 4:
        raise ValueError(f"a generation of {steps} steps is too short for anything to be reused: 4 is the least.")
    if not any(costs.shares.values()):
        raise ValueError(
            "of the model's operations none has a known count of floating-point operations, which settings are chosen "
            "by: torch.utils.flop_counter.register_flop_formula tells those of a kernel."
        )
