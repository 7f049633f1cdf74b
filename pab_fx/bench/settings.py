"""What to run, and how it is said on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..options import inner_compiler
from ..policy.config import PRESETS, PABConfig
from ..policy.where import ATTENTION_ROLES
from ..spelling import instead_of
from .apart import Inner
from .caches import CACHES
from .contenders import COLUMNS, SHORT_NAMES
from .models import NAMES, model_of


@dataclass(frozen=True)
class Settings:
    """What to run.

    Args:
        models: names of models.
        columns: names of columns.
        device: "cpu" or "cuda".
        size: "cpu", "cuda" or "quick".
        rounds: timed generations of each column.
        steps: of a generation; `None` for those of each model.
        policies: names of step caches, one after the other.
        pab: ranges of the policy "pab"; `None` for those of each model.
        inner: the compiler.
        mode: Inductor's mode, as in `torch.compile(mode=...)`.
        tell_timesteps: whether `pab_fx` knows the timesteps, as it does under a pipeline.
        minutes: how long a model may take: columns and rounds that do not fit are left out; `None` for no limit.
        command: for the record.

    Raises:
        ValueError: for a name that is unknown, or a number that is too small.
    """

    models: tuple[str, ...] = NAMES
    columns: tuple[str, ...] = COLUMNS
    device: str = "cpu"
    size: str = "cpu"
    rounds: int = 5
    steps: int | None = None
    policies: tuple[str, ...] = ("pab",)
    pab: PABConfig | None = None
    inner: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    tell_timesteps: bool = True
    minutes: float | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in self.models:
            model_of(name, self.size)
        for column in self.columns:
            if column not in COLUMNS:
                raise ValueError(f"unknown column {column!r}: {instead_of(column, COLUMNS, 'the columns are')}")
        for policy in self.policies:
            if policy not in CACHES:
                raise ValueError(f"unknown policy {policy!r}: {instead_of(policy, CACHES, 'the policies are')}")
            if self.pab is not None and policy != "pab":
                raise ValueError(f"a config is one of PAB, and the policy is {policy}.")
        for name, number in (("rounds", self.rounds), ("steps", 1 if self.steps is None else self.steps)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        inner_compiler(*self.compiler, None)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; run with --device cpu.")

    @property
    def compiler(self) -> Inner:
        """That all columns have."""
        return Inner(self.inner, self.mode)


def columns_of(text: str) -> tuple[str, ...]:
    """Columns from the command line: short names with commas between, in any order.

    Example:
        >>> columns_of("specialize,eager")
        ('eager', 'pab_fx specialize')

    Raises:
        ValueError: for a name that is none of them.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SHORT_NAMES:
            raise ValueError(f"unknown column {name!r}: {instead_of(name, SHORT_NAMES, 'the columns are')}")
    return tuple(column for name, column in SHORT_NAMES.items() if name in names)


def config_of(text: str) -> PABConfig:
    """A config from the command line: a preset's name, or ranges of roles and one window for all.

    Feed-forwards of a preset are left alone: diffusers' hooks cannot broadcast them.

    Example:
        >>> config_of("spatial=2,cross=6,window=100:850").window("cross")
        (100.0, 850.0)

    Raises:
        ValueError: for anything else.
    """
    if text in PRESETS:
        return PABConfig.preset(text, mlp=None)
    fields: dict[str, object] = {}
    for part in text.split(","):
        name, _, given = part.partition("=")
        try:
            if name == "window":
                low, _, high = given.partition(":")
                fields |= {f"{r}_attention_timestep_skip_range": (float(low), float(high)) for r in ATTENTION_ROLES}
            elif name in ATTENTION_ROLES:
                fields[f"{name}_attention_block_skip_range"] = int(given)
            else:
                raise ValueError
        except ValueError:
            presets = ", ".join(PRESETS)
            raise ValueError(
                f"cannot read {part!r} of config {text!r}: it is a preset ({presets}), or like "
                "spatial=2,temporal=3,cross=6,window=100:800."
            ) from None
    return PABConfig.of(fields)
