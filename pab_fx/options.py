"""What a backend is asked for: each option checked, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ._torch import has_cuda_graphs, inductor_patches, lookup_backend
from .passes.compress import DTYPES
from .policy.when import checked_timesteps


def inner_compiler(
    inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """What compiles the lowered graphs.

    Raises:
        ValueError: for a backend, a mode or an option that there is not, or that `inner` does not take.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options must be a mapping of Inductor's options, got {options!r}.")
    for name, given in (("mode", mode), ("options", options)):
        if given and inner != "inductor":
            raise ValueError(f"{name}={given!r} is for inner='inductor' only, and inner is {inner!r}.")
    if isinstance(inner, str):
        compiler = lookup_backend(inner)
        if inner == "inductor" and (mode or options):
            return partial(_inductor, compiler, inductor_patches(mode, options or {}))
        return compiler
    if not callable(inner):
        raise ValueError(f"inner must be the name of a backend or a callable (gm, example_inputs), got {inner!r}.")
    return inner


def records_cuda_graphs(inner: Any, mode: str | None, options: Mapping[str, Any] | None) -> bool:
    """Whether the inner compiler records CUDA graphs, where it compiles for a GPU; a callable says so itself."""
    if inner == "inductor":
        return has_cuda_graphs(inductor_patches(mode, options or {}))
    return inner == "cudagraphs" or getattr(inner, "records_graphs", False)


def cache_dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """What caches are kept in; `None` for what they are computed in.

    Raises:
        ValueError: for another dtype than those.
    """
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and found not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"cache_dtype={given!r} is none that caches are kept in: {names}.")
    return found


def cache_device_of(given: torch.device | str | None) -> torch.device | None:
    """Where caches are kept; `None` for where they are computed.

    Raises:
        ValueError: for what is no device, or holds nothing here.
    """
    if given is None:
        return None
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f"cache_device={given!r} is no device, such as 'cpu'.") from None
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # an assertion is what a torch without CUDA raises
        raise ValueError(f"cache_device={given!r} holds nothing here: {error}") from None
    return device


def falling_timesteps(given: Any) -> tuple[float, ...]:
    """The timesteps of a generation, which fall: one that rises begins another.

    Raises:
        ValueError: for timesteps that rise, or are none.
    """
    found = checked_timesteps(given)
    if found and found[0] < found[-1]:
        raise ValueError(
            f"timesteps begin at {found[0]:g} and end at {found[-1]:g}, and those of a generation fall: pass them in "
            "the order in which the steps run, scheduler.timesteps."
        )
    return found


def _inductor(
    compiler: Callable[..., Any], patches: Mapping[str, Any], gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    return compiler(gm, example_inputs, config_patches=dict(patches))
