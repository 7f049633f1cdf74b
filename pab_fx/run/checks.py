"""Check what compiled graphs return: an inner compiler, or a pass of the user's, may have made another graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..compile.specs import TensorSpec

OTHER_GRAPH = "the inner compiler, or a pass behind the rewrite, has made another graph of it"


def check_outputs(outputs: Any, returns: int, expected: Sequence[TensorSpec | None]) -> None:
    """Refuse what a compiled graph returned if it is not what the captured graph says.

    Raises:
        RuntimeError: naming what is wrong.
    """
    if not isinstance(outputs, (tuple, list)):
        raise RuntimeError(
            f"a compiled graph returned a {type(outputs).__name__} in place of {returns} values: {OTHER_GRAPH}."
        )
    if len(outputs) != returns:
        raise RuntimeError(f"a compiled graph returned {len(outputs)} values in place of {returns}: {OTHER_GRAPH}.")
    for output, spec in zip(outputs, expected, strict=False):
        if spec is not None and not spec.fits(output):
            refuse(output, spec, "an output")


def refuse(found: Any, spec: TensorSpec, what: str) -> None:
    """Raise `RuntimeError` for something that is not as it was expected."""
    given = getattr(found, "dtype", type(found).__name__), list(getattr(found, "shape", ()))
    wanted = spec.dtype, list(spec.shape)
    raise RuntimeError(f"a compiled graph returned {given} for {what} of {wanted}: {OTHER_GRAPH}.")
