"""Two small trained models: what step caches do to clips and to pictures, seen on a CPU.

"clips" is a Latte that makes clips of a moving shape, "pictures" a Stable Diffusion 3 that makes pictures of two
digits. Each has its captions, drawings and judge in a module (`clips`, `pictures`) and a pipeline (`ClipPipeline`,
`PicturePipeline`). `CAPTIONS`, `Caption`, `VOCABULARY`, `draw`, `fit` and `recognise` of this package are those of the
clips.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

import torch
from diffusers.utils import logging

from pab_fx.demo.clip_pipeline import VOCABULARY, ClipPipeline, ClipPipelineOutput
from pab_fx.demo.clips import CAPTIONS, Caption, draw, fit, recognise
from pab_fx.demo.picture_pipeline import PicturePipeline

WEIGHTS = Path(__file__).parent / "weights"
PIPELINES: dict[str, type[ClipPipeline | PicturePipeline]] = {"clips": ClipPipeline, "pictures": PicturePipeline}

__all__ = [
    "CAPTIONS",
    "PIPELINES",
    "VOCABULARY",
    "WEIGHTS",
    "Caption",
    "ClipPipeline",
    "ClipPipelineOutput",
    "PicturePipeline",
    "draw",
    "fit",
    "load_pipeline",
    "one_thread",
    "recognise",
]


@overload
def load_pipeline(name: Literal["clips"] = "clips", **kwargs: Any) -> ClipPipeline: ...


@overload
def load_pipeline(name: Literal["pictures"], **kwargs: Any) -> PicturePipeline: ...


@overload
def load_pipeline(name: str, **kwargs: Any) -> ClipPipeline | PicturePipeline: ...


def load_pipeline(name: str = "clips", **kwargs: Any) -> ClipPipeline | PicturePipeline:
    """A trained pipeline that comes with this package.

    Args:
        name: "clips" or "pictures".
        kwargs: go to `from_pretrained`.

    Raises:
        ValueError: for another name.
    """
    if name not in PIPELINES:
        raise ValueError(f"there is no pipeline {name!r}, only {', '.join(PIPELINES)}")
    # a few MB: no progress bar, and no advice to install what loads large checkpoints in little memory
    logging.disable_progress_bar()
    try:
        return PIPELINES[name].from_pretrained(WEIGHTS / name, **{"low_cpu_mem_usage": False, **kwargs})
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
