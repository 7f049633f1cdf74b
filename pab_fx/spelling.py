"""What to say of a name that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLOSE = 0.5
"""Of all letters: names that share as many are proposed. An option called `spatial_range` is meant to be found."""

MANY = 40
"""More names than anyone reads."""


def instead_of(name: object, known: Iterable[object], what: str = "there are") -> str:
    """The names that are most like an unknown one; all that there are, if none is and they can be read.

    Args:
        name: the unknown one.
        known: those that there are.
        what: what is said before all of them.

    Example:
        >>> instead_of("lowring", ["lowering", "inner"])
        "did you mean 'lowering'?"
        >>> instead_of("xyz", ["lowering", "inner"], "it takes")
        "it takes 'inner', 'lowering'."
    """
    names = sorted(str(each) for each in known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=CLOSE)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"{what} {', '.join(map(repr, names))}." if len(names) <= MANY else f"{what} none like it."
