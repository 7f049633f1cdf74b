"""A small trained text-to-video model: what Pyramid Attention Broadcast does to pictures, seen on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pab_fx.demo.clips import CAPTIONS, Caption, draw, fit, recognise
from pab_fx.demo.pipeline import VOCABULARY, ClipPipeline, ClipPipelineOutput

WEIGHTS = Path(__file__).parent / "weights"

__all__ = [
    "CAPTIONS",
    "VOCABULARY",
    "WEIGHTS",
    "Caption",
    "ClipPipeline",
    "ClipPipelineOutput",
    "draw",
    "fit",
    "load_pipeline",
    "recognise",
]


def load_pipeline(**kwargs: Any) -> ClipPipeline:
    """The trained pipeline that comes with this package; `kwargs` go to `ClipPipeline.from_pretrained`."""
    return ClipPipeline.from_pretrained(WEIGHTS, **kwargs)
