"""A report as JSON, and back: for dashboards, and for comparing two versions of a model."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .data import ReportData

Data = TypeVar("Data", bound=ReportData)

SCHEMA = "pab_fx.report/1"
"""Version of the layout; another number means that a reader of this one would misread it."""


def as_json(report: ReportData) -> dict[str, Any]:
    """All of a report as JSON has it, with the version of its layout under `schema`."""
    return {"schema": SCHEMA, **dataclasses.asdict(report)}


def of_json(kind: type[Data], found: Mapping[str, Any]) -> Data:
    """A report of that class from what `as_json` made of it.

    Raises:
        ValueError: for something else, or the JSON of another version.
    """
    schema = found.get("schema") if isinstance(found, Mapping) else None
    if schema != SCHEMA:
        raise ValueError(f"this is no report: its schema is {schema!r}, and must be {SCHEMA!r}.")
    given = {name: value for name, value in found.items() if name != "schema"}
    try:
        made: Data = _made(kind, given)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"this is no report of schema {SCHEMA}: {error}") from None
    return made


def _made(kind: Any, found: Any) -> Any:
    """A value of an annotated type from plain data."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _made(hints[name], value) for name, value in found.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        each = members[:1] * len(found) if members[-1] is Ellipsis else members
        return tuple(_made(member, value) for member, value in zip(each, found, strict=True))
    if isinstance(kind, types.UnionType):
        return None if found is None else _made(next(m for m in typing.get_args(kind) if m is not type(None)), found)
    return float(found) if kind is float else found
