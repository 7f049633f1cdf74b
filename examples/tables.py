"""Tables in Markdown, printed and put into a page; for the examples beside this file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(table(("a", "b"), [("1", "2")]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def update(path: Path, mark: str, written: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a file."""
    old = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    path.write_text(old.sub(lambda m: f"{m[1]}\n{written}\n\n{m[2]}", path.read_text()))
