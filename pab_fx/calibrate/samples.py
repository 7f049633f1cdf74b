"""What is generated, and how far two samples are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Generate = Callable[[Any, str, int], Any]
"""`generate(pipe_or_model, prompt, seed)` returns a sample: an array or a tensor of any shape."""


@dataclass(frozen=True)
class Difference:
    """How far a sample is from the one without PAB.

    Args:
        squared: sum of the squared differences of all elements.
        norm: sum of the squared elements of the sample without PAB.
        size: number of elements.
    """

    squared: float
    norm: float
    size: int

    @classmethod
    def between(cls, sample: np.ndarray, reference: np.ndarray) -> Difference:
        """The difference of two samples of one shape.

        Example:
            >>> Difference.between(np.array([1.0, 2.0]), np.array([1.0, 1.0])).relative_l2
            0.7071067811865476
        """
        reference = reference.astype(np.float64)
        return cls(float(((sample - reference) ** 2).sum()), float((reference**2).sum()), reference.size)

    @property
    def relative_l2(self) -> float:
        """`norm(sample - reference) / norm(reference)`."""
        return math.sqrt(self.squared / self.norm) if self.norm else math.inf if self.squared else 0.0

    def psnr(self, peak: float = 1.0) -> float:
        """The peak signal-to-noise ratio in dB, infinite for equal samples.

        Args:
            peak: the largest difference that two elements can have.

        Example:
            >>> round(Difference(squared=0.01, norm=1.0, size=1).psnr())
            20
        """
        return 10 * math.log10(peak**2 * self.size / self.squared) if self.squared else math.inf


@dataclass(frozen=True)
class Batch:
    """What one generation makes: prompts, and the seed of each one's noise."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def label(self) -> str:
        """What tells it from others, in the name of a file."""
        return f"{self.seeds[0]:06d}"


def batches_of(prompts: Sequence[str], seed: int, size: int) -> tuple[Batch, ...]:
    """The prompts in batches; the i-th has the noise of `seed + i`.

    Example:
        >>> [batch.seeds for batch in batches_of(["a", "b", "c"], seed=5, size=2)]
        [(5, 6), (7,)]
    """
    seeded = [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    return tuple(
        Batch(*map(tuple, zip(*seeded[start : start + size], strict=True))) for start in range(0, len(seeded), size)
    )


def sampler(model: Any, generate: Generate | None, call: Mapping[str, Any]) -> Callable[[Batch], np.ndarray]:
    """What makes the samples of a batch, [N, ...].

    Args:
        model: the pipeline or model that is calibrated.
        generate: a loop of one's own, called prompt by prompt; `None` calls the pipeline.
        call: arguments of the pipeline's call beside prompt and generator; the output type is "np" if it has none.
    """
    if generate is not None:
        own = generate  # for the type checker
        return lambda batch: np.stack(
            [_array(own(model, prompt, seed)) for prompt, seed in zip(batch.prompts, batch.seeds, strict=True)]
        )

    def run(batch: Batch) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        single = len(batch.prompts) == 1
        arguments = {
            "prompt": batch.prompts[0] if single else list(batch.prompts),
            "generator": generators[0] if single else generators,
            "output_type": "np",
            **call,
        }
        samples = _array(model(**arguments)[0])
        if len(samples) != len(batch.prompts):
            raise ValueError(
                f"{type(model).__name__} returned {len(samples)} samples for {len(batch.prompts)} prompts: pass "
                "generate=, a function (pipe, prompt, seed) that returns one sample."
            )
        return samples

    return run


def _array(sample: Any) -> np.ndarray:
    """A sample as an array of floats."""
    found = sample.detach().float().cpu().numpy() if isinstance(sample, torch.Tensor) else sample
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.number):
        raise ValueError(
            f"a generation returned a {type(sample).__name__}, where an array or a tensor is compared: set output_type "
            "to 'np', 'pt' or 'latent' in call=, or pass generate=, a function (pipe, prompt, seed) that returns one."
        )
    if not np.isfinite(found).all():
        raise ValueError("a generation returned values that are not finite, with nothing reused or within a setting.")
    return found.astype(np.float32) if found.dtype != np.uint8 else found.astype(np.float32) / 255
