"""What a tensor looks like: for checking what compiled graphs return, and whether what is held fits a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape (-1: any), dtype and device of a cache, and its dimensions as they lie in memory, outermost first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    def matches(self, other: TensorSpec) -> bool:
        """Whether a tensor of one may be read in place of one of the other, apart from its strides."""
        sizes = len(other.shape) == len(self.shape) and all(
            size == found or -1 in (size, found) for size, found in zip(self.shape, other.shape, strict=True)
        )
        return sizes and other.dtype == self.dtype and other.device == self.device

    def fits(self, tensor: Any) -> bool:
        """Whether that is such a tensor, apart from its strides."""
        return isinstance(tensor, torch.Tensor) and self.matches(
            TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, ())
        )

    @property
    def size(self) -> int:
        """In bytes; 0 where only the data tell."""
        return 0 if -1 in self.shape else math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> torch.Tensor:
        """Such a tensor, with arbitrary values."""
        shape = [max(size, 1) for size in self.shape]
        return torch.empty_permuted(shape, self.order, dtype=self.dtype, device=self.device)
