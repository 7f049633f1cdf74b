"""A small trained text-to-video model: what Pyramid Attention Broadcast does to pictures, seen on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import logging

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
    # 6 MB: no progress bar, and no advice to install what loads large checkpoints in little memory
    logging.disable_progress_bar()
    try:
        return ClipPipeline.from_pretrained(WEIGHTS, **{"low_cpu_mem_usage": False, **kwargs})
    finally:
        logging.enable_progress_bar()
