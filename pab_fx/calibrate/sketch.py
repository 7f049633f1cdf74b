"""Random projections: tensors of any size in a few thousand numbers that keep their distances.

A kept output of a video transformer has hundreds of megabytes, and comparing a step with ten steps before it would take
ten of each. A projection onto 4096 random directions keeps every distance and every inner product, to one or two
percent (Johnson and Lindenstrauss; the one here is the count sketch of Charikar, Chen and Farach-Colton).
"""

from __future__ import annotations

import torch

SIZE = 4096


class Sketcher:
    """Makes sketches that can be compared with each other.

    Args:
        size: how many numbers a sketch has at most; a smaller tensor is its own sketch. Distances are right to about
            `1 / sqrt(size)`.

    Example:
        >>> sketch = Sketcher(size=1024)
        >>> a, b = torch.randn(2, 100_000)
        >>> abs(float((sketch(a) - sketch(b)).norm() / (a - b).norm()) - 1) < 0.1
        True
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._signs: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sketch, [size] float32 on the CPU; the tensor itself, flat, if that is no larger."""
        flat = tensor.detach().reshape(-1)  # [N]
        if flat.numel() > self.size:
            flat = flat.float() * self._random_signs(flat.numel(), flat.device)
            padding = -flat.numel() % self.size
            flat = torch.nn.functional.pad(flat, (0, padding)).view(-1, self.size).sum(0)  # [size]
        return flat.float().cpu()

    def _random_signs(self, count: int, device: torch.device) -> torch.Tensor:
        """The same `count` values of -1 and 1 for every tensor of that many elements: [N] int8."""
        if (count, device) not in self._signs:
            generator = torch.Generator().manual_seed(count)
            signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            self._signs[count, device] = signs.to(device)
        return self._signs[count, device]
