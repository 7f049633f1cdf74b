"""Contenders for one model: set up one by one and checked, then run in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ._torch import captured_frames, cold_compiler, default_recompile_limit, graph_breaks
from .contenders import (
    CACHE_DIT_AND_COMPILE,
    HOOKS_AND_COMPILE,
    PLAIN,
    Contender,
    LowerBound,
    Setting,
    contender,
    is_installed,
    is_ours,
    reference,
)
from .measure import Generation, Spread, Trajectory, by_kind, distance, ratios
from .results import ColumnResult
from .settings import Settings

Say = Callable[[str], None]
"""Tells what happens, for people who wait."""


class BenchError(RuntimeError):
    """What was measured means nothing: a contender did not do what it is compared for."""


class Entrant:
    """A contender and what was seen of it."""

    def __init__(self, column: str, runs: Contender) -> None:
        self.column, self.contender = column, runs
        self.captures = self.late_captures = self.breaks = self.peak_bytes = 0
        self.cold = Generation(())
        self.rounds: list[Generation] = []

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each round."""
        return tuple(each.seconds for each in self.rounds)


class Race:
    """One model and all that run it.

    Args:
        setting: what contenders are set up from.
        trajectory: what they run.
        settings: of the benchmark.
        tolerance: how far apart equal outputs may be.
        say: is told what happens.
    """

    def __init__(
        self, setting: Setting, trajectory: Trajectory, settings: Settings, tolerance: float, say: Say
    ) -> None:
        self.setting, self.trajectory, self.settings, self.say = setting, trajectory, settings, say
        self.tolerance = tolerance
        self.entrants: dict[str, Entrant] = {}
        self.notes: list[str] = []
        self.failed: list[str] = []
        self._start = time.monotonic()
        self.reference = trajectory.run(reference(setting), watch=True).outputs

    def seconds(self, column: str) -> tuple[float, ...]:
        """Of each round of a column; none if it does not run."""
        return self.entrants[column].seconds if column in self.entrants else ()

    def left(self, share: float = 1.0) -> float:
        """Seconds that are left of a share of the time."""
        limit = self.settings.minutes
        return float("inf") if limit is None else 60 * limit * share - (time.monotonic() - self._start)

    def fits(self, column: str) -> bool:
        """Whether there is time to set a column up; the rounds are to have the last two fifths of it."""
        compiled = self.entrants.get("compile")
        if column == HOOKS_AND_COMPILE and compiled is not None:  # which compiles until Dynamo's limit
            return self.left() > default_recompile_limit() * compiled.cold.seconds
        return self.left(share=0.6) > 0

    def enter(self, columns: Sequence[str]) -> None:
        """Set columns up, one after the other."""
        for column in columns:
            if not is_installed(column):
                self.notes.append(f'{column} was left out: pip install "pab-fx[bench]" installs it')
                continue
            if not self.fits(column):
                self.notes.append(f"{column} was left out: {self.settings.minutes:g} minutes do not suffice")
                continue
            with self._noting_failures(column):
                self.entrants[column] = self._set_up(column)

    def _set_up(self, column: str) -> Entrant:
        """A column after its first generation, with cold caches, which is checked, and one for memory."""
        self.say(f"{column}: first generation")
        with cold_compiler():
            entrant = Entrant(column, contender(column, self.setting))
            if isinstance(entrant.contender, LowerBound) and "compile" in self.entrants:
                entrant.contender.use(self.entrants["compile"].contender.call)
            entrant.cold = self._counted(entrant, partial(self.trajectory.run, watch=True))
        self._learn_rounding(entrant)
        self._check(entrant)
        self.say(f"{column}: memory")
        entrant.peak_bytes = self._counted(entrant, self.trajectory.peak_bytes)
        return entrant

    @contextlib.contextmanager
    def _noting_failures(self, column: str) -> Iterator[None]:
        """Leave a column out that fails, such as one that a GPU has no memory for: the others are worth their time."""
        try:
            yield
        except BenchError:
            raise
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            self.failed.append(column)
            self.notes.append(f"{column} failed: {type(error).__name__}: {said[0]}")
            self.entrants.pop(column, None)

    def take_turns(self, columns: Sequence[str]) -> None:
        """The timed rounds of the given columns, each of which runs once in each."""
        running = [self.entrants[column] for column in columns if column in self.entrants]
        longest = 0.0
        for turn in range(self.settings.rounds if running else 0):
            if turn and self.left() < longest:
                self.notes.append(
                    f"{turn} of {self.settings.rounds} rounds: {self.settings.minutes:g} minutes are over"
                )
                return
            start = time.monotonic()
            self.say(f"round {turn + 1} of {self.settings.rounds}")
            if self.trajectory.timing.can_pause:
                self._step_by_step(running, turn)
            else:
                for entrant in running:
                    with self._noting_failures(entrant.column):
                        entrant.rounds.append(self._counted(entrant, self.trajectory.run))
                running = [entrant for entrant in running if entrant.column in self.entrants]
            longest = max(longest, time.monotonic() - start)

    def _step_by_step(self, running: Sequence[Entrant], turn: int) -> None:
        """A generation of each, in turns of one step: a machine that is slow for a second is slow for all.

        Who begins changes from step to step.
        """
        for entrant in running:
            entrant.contender.reset()
        steps: dict[str, list[float]] = {entrant.column: [] for entrant in running}
        for i in range(len(self.trajectory.timesteps)):
            first = (turn + i) % len(running)
            for entrant in (*running[first:], *running[:first]):
                steps[entrant.column].append(self._counted(entrant, partial(self.trajectory.step, i=i)))
        for entrant in running:
            entrant.contender.reset()
            entrant.rounds.append(Generation(tuple(steps[entrant.column])))

    def _counted(self, entrant: Entrant, run: Callable[[Contender], Any]) -> Any:
        frames, breaks = captured_frames(), graph_breaks()
        result = run(entrant.contender)
        captures = captured_frames() - frames
        entrant.breaks += graph_breaks() - breaks
        entrant.late_captures += captures if entrant.captures else 0
        entrant.captures += captures
        return result

    def _learn_rounding(self, entrant: Entrant) -> None:
        """What `compile` alone changes is rounding."""
        eager = self.entrants.get("eager")
        if entrant.column != "compile" or eager is None:
            return
        self.tolerance = max(self.tolerance, 3 * distance(entrant.cold.outputs, eager.cold.outputs))
        if self.tolerance > distance(eager.cold.outputs, self.reference):
            self.notes.append(
                "rounding changes outputs as much as reuse does: that they are those of the reference is not shown"
            )

    def _check(self, entrant: Entrant) -> None:
        """Refuse a contender that reuses not what the schedule says, or whose outputs are not the reference's.

        Outputs of others are their own, and are only noted: with CUDA graphs, hooks keep what the next step overwrites.
        """
        reused, expected = entrant.cold.reused, self.setting.plan.reused
        if entrant.column in PLAIN:
            expected = (0,) * len(expected)
        if reused != expected:
            raise BenchError(
                f"{entrant.column} reused {sum(reused)} parts in a generation, by step {list(reused)}; "
                f"the schedule says {sum(expected)}, {list(expected)}."
            )
        found = distance(entrant.cold.outputs, self.reference)
        if entrant.column in (*PLAIN, "lower bound") or found <= self.tolerance:
            return
        wrong = (
            f"the outputs of {entrant.column} are {found:.1e} from the reference's, which is more than rounding "
            f"({self.tolerance:.0e})"
        )
        if is_ours(entrant.column):
            raise BenchError(f"{wrong}.")
        self.notes.append(wrong)

    def result(self, column: str) -> ColumnResult:
        """What was seen of a column, against others in the same rounds, if they run."""
        entrant = self.entrants[column]
        seconds = entrant.seconds
        compiled, both, bound = map(self.seconds, ("compile", HOOKS_AND_COMPILE, "lower bound"))
        cache_dit = self.seconds(CACHE_DIT_AND_COMPILE)
        # the bound runs what `compile` has compiled
        is_cold = column not in ("eager", "hooks", "cache-dit", "lower bound")
        return ColumnResult(
            column=column,
            seconds=seconds,
            generation=Spread.of(seconds),
            speedup=Spread.of(ratios(compiled, seconds)) if compiled else None,
            over_hooks=Spread.of(ratios(both, seconds)) if both else None,
            over_cache_dit=Spread.of(ratios(cache_dit, seconds)) if cache_dit else None,
            of_bound=Spread.of(ratios(seconds, bound)) if bound else None,
            step_seconds=by_kind(self.setting.plan.kinds, [each.steps for each in entrant.rounds]),
            cold_start=entrant.cold.seconds - Spread.of(seconds).median if is_cold else None,
            captures=entrant.captures,
            graphs=entrant.contender.compiler.graphs,
            late_captures=entrant.late_captures,
            breaks=entrant.breaks,
            peak_bytes=entrant.peak_bytes,
            distance=None if column == "lower bound" else distance(entrant.cold.outputs, self.reference),
            reused=sum(entrant.cold.reused),
        )
