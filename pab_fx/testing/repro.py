"""Code that makes a failure of `assert_broadcasts_like` again, to paste into a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import nn

from ..policy.config import PABConfig
from .transformers import Transformer

IMPORTS = """\
import torch
from diffusers import PyramidAttentionBroadcastConfig
from pab_fx import LayerBroadcast, MLPBroadcast, PABConfig
from pab_fx.testing import *
"""
DEFAULTS: dict[str, Any] = {"contexts": (None,), "tracer": None, "dynamic": None, "mode": torch.no_grad}
DEFAULTS |= {"tolerance": 0.0, "reuses": True, "changes": True, "breaks": False}


def repro_of(
    model: nn.Module,
    config: Any,
    reference: Any,
    inputs: Callable[..., Any],
    generations: Sequence[Sequence[float]],
    options: Mapping[str, Any],
    setup: str | None,
) -> str:
    """The call of `assert_broadcasts_like`, with what makes its arguments.

    Args:
        model: of which the kit's own are written down.
        config: what is broadcast.
        reference: as the call has it.
        inputs: as the call has them.
        generations: timesteps of each.
        options: further arguments; those at their defaults are left out.
        setup: code that makes `model` and `inputs`, for models that are not the kit's.
    """
    if setup is None and isinstance(model, Transformer):
        setup = f"spec = {model.spec!r}\nmodel, inputs = spec.build(), spec.inputs"
    elif setup is None:
        setup = f"model = ...  # a {type(model).__name__}\ninputs = ...  # {getattr(inputs, '__name__', inputs)}"
    given = {name: each for name, each in options.items() if name not in DEFAULTS or each != DEFAULTS[name]}
    lines = [f"    {name}={_source(each)}," for name, each in {"generations": generations, **given}.items()]
    of = "" if reference is None else f"\n    {_source(reference)},"
    call = f"assert_broadcasts_like(\n    model,\n    {_source(config)},{of}\n    inputs=inputs,\n"
    return "To reproduce:\n\n" + IMPORTS + "\n" + setup.strip() + "\n" + call + "\n".join(lines) + "\n)\n"


def _source(given: Any) -> str:
    """A value as Python that makes it."""
    if isinstance(given, (PABConfig, PyramidAttentionBroadcastConfig)):
        return config_source(given)
    if isinstance(given, list) and any(map(callable, given)):  # passes
        return f"[{', '.join(getattr(each, '__name__', repr(each)) for each in given)}]  # functions of yours\n   "
    if isinstance(given, type):
        return f"{'torch.' if given.__module__.startswith('torch') else ''}{given.__name__}"
    if isinstance(given, (nn.Module, Callable)):  # type: ignore[arg-type]
        return f"...  # {getattr(given, '__name__', type(given).__name__)}\n   "
    return repr(given)


def config_source(config: PABConfig | PyramidAttentionBroadcastConfig) -> str:
    """A config as Python that makes it, without what is left at its default.

    Example:
        >>> config_source(PABConfig(cross_attention_block_skip_range=3))
        'PABConfig(cross_attention_block_skip_range=3)'
    """
    said = []
    fields: Any = dataclasses.fields(config)  # type: ignore[arg-type]
    for each in fields:
        value = getattr(config, each.name)
        if each.name == "current_timestep_callback" and value is not None:
            said.append(f"{each.name}=Clock()")
        elif value != each.default and not (each.name in ("layers", "mlp") and not value):
            said.append(f"{each.name}={value!r}")
    return f"{type(config).__name__}({', '.join(said)})"
