"""Whole diffusers pipelines of tiny, randomly initialised components, and how to call them.

`tests/zoo` has the transformers alone; here they run as in use: the pipeline's own loop, its scheduler, its
branches of guidance and its cache contexts. Entries lie in one module per medium and are gathered on first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class PipelineEntry:
    """A pipeline of tiny random components and how to call it.

    Args:
        name: The pipeline's class name, with a suffix after `-` where several entries share a class.
        build: Makes the pipeline: seeded, float32, eval mode, no gradients.
        call: Makes fresh keyword arguments for `pipe(...)`, a new seeded `torch.Generator` each time.
        steps: `num_inference_steps` in `call`.
        denoisers: Names of the components that denoise.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], Kwargs]
    steps: int = 8
    denoisers: tuple[str, ...] = ("transformer",)

    @property
    def class_name(self) -> str:
        return self.name.split("-")[0]


def run(pipe: Any, entry: PipelineEntry, **overrides: Any) -> torch.Tensor:
    """The output tensor (frames, images or latents) of one call, without a progress bar.

    Where a pipeline returns a list of latents, section by section, each with those before, it is the last one.
    """
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        output = pipe(**{**entry.call(), **overrides, "return_dict": False})[0]
    if isinstance(output, list):
        output = output[-1]
    assert isinstance(output, torch.Tensor), type(output)
    return output


@cache
def _entries() -> tuple[PipelineEntry, ...]:
    from . import image, video

    return video.ENTRIES + image.ENTRIES


def __getattr__(name: str) -> Any:
    """`PIPELINES`, all entries, and `BY_NAME`, the same as a dict; late, since their modules import this one."""
    if name == "PIPELINES":
        return _entries()
    if name == "BY_NAME":
        return {entry.name: entry for entry in _entries()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
