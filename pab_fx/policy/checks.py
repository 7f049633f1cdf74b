"""Checks of what users give; each error names the field, the value and what it must be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from ..spelling import instead_of


def check_integer(name: str, value: Any, least: int = 1, most: float = math.inf) -> None:
    """Raise `ValueError` for anything but an integer of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        bounds = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}.")


def checked_flag(name: str, given: Any) -> bool:
    """A flag.

    Raises:
        ValueError: for anything but True and False.
    """
    if not isinstance(given, bool):
        raise ValueError(f"{name} must be True or False, got {given!r}.")
    return given


def checked_window(name: str, window: Any) -> tuple[float, float]:
    """The open window `(lo, hi)` of timesteps.

    Raises:
        ValueError: if it is not two numbers, or is reversed.
    """
    edges = tuple(window) if is_iterable(window) else ()
    if len(edges) != 2 or not all(is_number(edge) for edge in edges):
        raise ValueError(f"{name} must be two numbers (lo, hi), got {window!r}.")
    low, high = edges
    if low > high:
        raise ValueError(f"{name} is reversed: {window!r}; write it as ({high!r}, {low!r}).")
    return low, high


def checked_identifiers(name: str, identifiers: Any) -> tuple[str, ...]:
    """Regular expressions as a tuple.

    Raises:
        ValueError: if there is something else among them.
    """
    if isinstance(identifiers, str) or not is_iterable(identifiers):
        raise ValueError(f"{name} must be a tuple of regular expressions, got {identifiers!r}.")
    identifiers = tuple(identifiers)
    for identifier in identifiers:
        if not isinstance(identifier, str):
            raise ValueError(f"{name} must hold strings, got {identifier!r}.")
        try:
            re.compile(identifier)
        except re.error as error:
            raise ValueError(f"{name} holds {identifier!r}, which is no regular expression: {error}.") from None
    return identifiers


def checked_blocks(name: str, blocks: Any) -> tuple[int, ...] | None:
    """Indices of blocks as a tuple; `None` for every block.

    Raises:
        ValueError: if there is something other than integers >= 0 among them.
    """
    if blocks is None:
        return None
    found = tuple(blocks) if is_iterable(blocks) else (blocks,)
    for block in found:
        check_integer(name, block, least=0)
    return found


def check_fields(where: str, given: Mapping[str, Any], cls: type) -> None:
    """Raise `ValueError` for a name that is no field of `cls`."""
    known = {field.name for field in dataclasses.fields(cls)}
    for name in given:
        if name not in known:
            raise ValueError(f"unknown option {name!r} in {where}: {instead_of(name, known, 'it has')}")


def check_callback(callback: Any) -> None:
    """Raise `ValueError` for a `current_timestep_callback` that cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(f"current_timestep_callback must be callable, got {callback!r}.")


def is_number(value: Any) -> bool:
    """Whether that is a real number; no bool, no nan."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def is_iterable(value: Any) -> bool:
    """Whether that is several values; no text and no mapping."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def checked_dtype(name: str, given: Any) -> torch.dtype | None:
    """A floating-point dtype by itself or by its name.

    Raises:
        ValueError: for anything else.

    Example:
        >>> checked_dtype("forecast_dtype", "bfloat16")
        torch.bfloat16
    """
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is not None and isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if given is None:
        return None
    raise ValueError(f"{name} must be a floating-point dtype of torch, such as 'bfloat16', got {given!r}.")
