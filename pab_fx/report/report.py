"""A report for people: its data, every form that it can be rendered in, and JSON that is read back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from .data import ReportData
from .drawing import drawing
from .html import page
from .markdown import markdown
from .text import plain, tables

SCHEMA = "pab_fx.report/1"
"""Version of the JSON's layout; another number means that a reader of this one would misread it."""


@dataclass(frozen=True)
class Report(ReportData):
    """What a backend broadcasts. `str(report)` is for a terminal, and so is `rich.print(report)`, in colour.

    Its fields are those of `ReportData`.
    """

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> RenderableType:
        return tables(self)

    def markdown(self) -> str:
        """The report in Markdown."""
        return markdown(self)

    def html(self) -> str:
        """The report as a page of HTML that needs nothing else, with the drawing of the graphs where there is one."""
        return page(self)

    def svg(self) -> str:
        """The graphs before and after the rewrite, drawn; what is alike is drawn once.

        Raises:
            ValueError: if the report holds no graphs: `pab_fx.explain` makes one that does.
        """
        return drawing(self)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it, with the version of its layout under `schema`; `Report.of_json` reads it back."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Report:
        """A report from what `as_json` made of it.

        Raises:
            ValueError: for something else, or the JSON of another version.
        """
        schema = found.get("schema") if isinstance(found, Mapping) else None
        if schema != SCHEMA:
            raise ValueError(f"this is no report: its schema is {schema!r}, and must be {SCHEMA!r}.")
        try:
            made: Report = _made(cls, {name: value for name, value in found.items() if name != "schema"})
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
