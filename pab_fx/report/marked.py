"""Tables in Markdown, and pages whose parts between marks a command writes."""

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
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a file.

    Raises:
        ValueError: if the file has no such marks.
    """
    check(path, mark)
    text = _between(mark).sub(lambda m: f"{m[1]}\n{written}\n\n{m[2]}", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def check(path: Path, mark: str) -> None:
    """Refuse a file without these marks.

    Raises:
        ValueError: if it has none.
    """
    if not _between(mark).search(path.read_text(encoding="utf-8")):
        raise ValueError(f"{path} has no place for a table: it needs a line <!-- {mark} --> and one <!-- /{mark} -->.")


def _between(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- /{re.escape(mark)} -->)", re.DOTALL)
