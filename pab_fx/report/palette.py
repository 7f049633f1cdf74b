"""The colours of roles, wherever a report is shown in colour."""

from __future__ import annotations

ROLE_COLOURS = {"spatial": "#2f77c8", "temporal": "#8855c4", "cross": "#c77d0a", "mlp": "#2a8f6a"}
"""Dark enough for white text on them, and apart for eyes that see red and green alike."""

PLAIN_COLOUR = "#7a828c"
"""Of what is no attention, or is left alone."""
COMPUTE_COLOUR = "#c9ced6"
REUSE_COLOUR = "#35a26b"
PARTLY_COLOUR = "#d9b648"
