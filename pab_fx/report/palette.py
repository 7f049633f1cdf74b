"""How pictures look: the colours of roles, and what matplotlib needs."""

from __future__ import annotations

from typing import Any

ROLE_COLOURS = {
    "spatial": "#2f77c8",
    "temporal": "#8855c4",
    "cross": "#c77d0a",
    "mlp": "#2a8f6a",
    "blocks": "#3c4f8f",
    "model": "#5b5f66",
    "modules": "#a3476b",
    "uncond": "#8a5a2b",
}
"""Dark enough for white text on them, and apart for eyes that see red and green alike."""

PLAIN_COLOUR = "#7a828c"
"""Of what is no attention, or is left alone."""
COMPUTE_COLOUR = "#c9ced6"
REUSE_COLOUR = "#35a26b"
PARTLY_COLOUR = "#d9b648"


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files; it takes a second to import."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def bare(axis: Any) -> None:
    """Leave out the frame of an axis where nothing is read from it."""
    axis.spines[["top", "right"]].set_visible(False)
