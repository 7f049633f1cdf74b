"""Generates with settings, each once, and turns what comes of it into what a search needs."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from ..policy.config import PABConfig
from .changes import ModuleChanges, mean_changes
from .files import Folder
from .prediction import CostModel, ErrorModel, share_of_step, step_seconds
from .samples import Batch, Difference
from .settings import Group, Option, Setting, config_of, window
from .sketch import Sketcher
from .trials import Trials

LAGS = 11
"""Over how many steps outputs are compared: up to a skip range of 12."""


class Laboratory:
    """Generates with settings, each once: what is in the folder is not run again.

    Args:
        folder: where results are kept.
        trials: runs the model.
        batches: what is generated.
        progress: shows how far it is.
    """

    def __init__(self, folder: Folder, trials: Trials, batches: Sequence[Batch], progress: Progress) -> None:
        self._folder, self._trials, self._batches, self._progress = folder, trials, batches, progress
        self._sketch = Sketcher()
        self._references: dict[Batch, np.ndarray] = {}

    def changes(self) -> tuple[ModuleChanges, ...]:
        """How much each output changes without PAB, mean over prompts; keeps the samples to compare others with."""
        found: list[ModuleChanges] = []
        for batch in self._shown("measuring changes", self._batches):
            known = self._folder.load(f"changes-{batch.label}")
            reference = self._folder.load_array(f"reference-{batch.label}")
            if known is None or reference is None:
                reference, measured = self._trials.observe(batch, LAGS)
                _check_measured(measured)
                self._folder.save_array(f"reference-{batch.label}", reference)
                known = [each.as_json() for each in measured]
                self._folder.save(f"changes-{batch.label}", known)
            self._references[batch] = reference
            found += map(ModuleChanges.from_json, known)
        return mean_changes(found)

    def differences(self, config: PABConfig, label: str | None = None) -> tuple[Difference, ...]:
        """What a setting does to the sample of each prompt."""
        return tuple(Difference(*each) for entry in self._entries(config, label) for each in entry["differences"])

    def probe(
        self, groups: Sequence[Group], segments: Sequence[tuple[int, int]], base: PABConfig
    ) -> tuple[ErrorModel, CostModel]:
        """Let each group alone reuse every second step, in each segment alone."""
        sketches = []
        probes = [(group, segment) for group in groups for segment in segments]
        seconds: dict[str, list[float]] = {group.label: [] for group in groups}
        for group, segment in self._shown("probing", probes):
            option = Option(2, *window(group.timesteps, *segment))
            alone: Setting = tuple(option if each is group else None for each in groups)
            config = config_of(groups, alone, base)
            entries = list(self._entries(config, None))
            sketches.append(np.concatenate([self._folder.load_array(entry["sketches"]) for entry in entries]))
            for entry in entries:
                steps = step_seconds(entry["seconds"], len(group.timesteps))
                seconds[group.label] += share_of_step(steps, group.reuses(option))
        vectors = np.stack(sketches, axis=1).astype(np.float64)  # [N, P, sketch]
        differences = self.differences(config)  # of the last one: what it tells of the samples holds for all
        shares = [max(statistics.median(seconds[group.label]), 0.0) for group in groups]
        errors = ErrorModel(
            products=vectors @ vectors.transpose(0, 2, 1),
            norms=np.array([each.norm for each in differences]),
            size=differences[0].size,
            segments=tuple(segments),
            groups=tuple(groups),
        )
        return errors, CostModel(tuple(shares), tuple(groups))

    def measured_speedup(self, config: PABConfig, rounds: int) -> float | None:
        """The ratio of the seconds of denoising without and with a setting, in turns; median over rounds."""
        ratios = []
        for _ in self._shown("timing", range(rounds)):
            without, within = (sum(self._trials.run(each, self._batches[0])[1]) for each in (None, config))
            ratios.append(without / within)
        return statistics.median(ratios) if ratios else None

    def _entries(self, config: PABConfig, label: str | None) -> Iterator[dict[str, Any]]:
        """The results of a setting, batch by batch; with a label they are shown as they come."""
        name = hashlib.sha256(json.dumps(config.as_json(), sort_keys=True).encode()).hexdigest()[:16]
        for batch in self._batches if label is None else self._shown(label, self._batches):
            key = f"{name}-{batch.label}"
            yield self._folder.load(key) or self._generated(config, batch, key)

    def _generated(self, config: PABConfig, batch: Batch, key: str) -> dict[str, Any]:
        samples, seconds = self._trials.run(config, batch)
        reference = self._references[batch]
        found = [Difference.between(a, b) for a, b in zip(samples, reference, strict=True)]
        sketches = [self._sketch(torch.from_numpy(a - b)) for a, b in zip(samples, reference, strict=True)]
        self._folder.save_array(f"{key}-sketches", torch.stack(sketches).numpy())
        entry = {
            "config": config.as_json(),
            "differences": [[each.squared, each.norm, each.size] for each in found],
            "seconds": list(seconds),
            "sketches": f"{key}-sketches",
        }
        self._folder.save(key, entry)
        return entry

    def _shown(self, label: str, items: Sequence[Any]) -> Iterator[Any]:
        """The items, with a line that tells how many are finished."""
        return iter(self._progress.track(items, description=label) if items else ())


def _check_measured(changes: Sequence[ModuleChanges]) -> None:
    """Refuse a model in which nothing was found, or whose timesteps are on another scale than windows are."""
    if not changes:
        raise ValueError("no attention was found in the model, so there is nothing to calibrate.")
    steps = max(len(each.timesteps) for each in changes)
    if steps < 3:
        raise ValueError(f"a generation of {steps} steps is too short for anything to be reused: 3 is the least.")
    highest = max(t for each in changes for t in each.timesteps)
    if not 1 < highest < float("inf"):
        raise ValueError(
            f"the generation begins at timestep {highest:g}, but windows are on the scheduler's scale, 0 to 1000: "
            "pass config=PABConfig(current_timestep_callback=...), a function that returns the scheduler's timestep."
        )
