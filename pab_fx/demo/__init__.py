"""A small trained text-to-video model: what Pyramid Attention Broadcast does to pictures, seen on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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
    "one_thread",
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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: at the sizes of the demo's model a second one gains nothing.

    Threads wait for each other at the end of every operation, thousands of times a second here. Where another process
    has one of the cores, each of these waits may last until the scheduler takes that core from it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
