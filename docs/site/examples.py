"""For the pages of docs/api: an `Example:` of a docstring is code, as Griffe takes an `Examples:` to be."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Reads the docstrings of pab_fx, which have the section names of diffusers'."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
