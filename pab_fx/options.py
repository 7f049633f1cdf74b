"""What a backend is asked for: each option checked, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ._torch.dynamo import lookup_backend
from ._torch.inductor import has_cuda_graphs, inductor_patches
from .passes.compress import DTYPES


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


def _inductor(
    compiler: Callable[..., Any], patches: Mapping[str, Any], gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    return compiler(gm, example_inputs, config_patches=dict(patches))


def as_key(value: Any) -> Any:
    """A key for an option: of plain data, such as arrays and configs, by value; of other objects by identity.

    What is told apart by its identity is kept alive by the key, so that no other object gets its address.

    Example:
        >>> as_key([torch.ones(2)]) == as_key([torch.ones(2)]), as_key(1) == as_key(True)
        (True, False)
    """
    if hasattr(value, "tolist"):  # tensors, and numpy's arrays and numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return type(value), frozenset((as_key(name), as_key(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(as_key, value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(as_key, value))
    if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
        return type(value), *(as_key(getattr(value, field.name)) for field in dataclasses.fields(value))
    return (type(value), value) if isinstance(value, Hashable) else _Itself(value)


class _Itself:
    """An object that cannot be hashed, as a key."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
