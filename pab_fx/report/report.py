"""A report for people: its data, and every form that it can be rendered in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from .data import ReportData
from .drawing import drawing
from .html import page
from .json import as_json, of_json
from .markdown import markdown
from .text import plain, tables


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
        """All of it as JSON has it; `Report.of_json` reads it back."""
        return as_json(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Report:
        """A report from what `as_json` made of it.

        Raises:
            ValueError: for something else, or the JSON of another version.
        """
        return of_json(cls, found)
