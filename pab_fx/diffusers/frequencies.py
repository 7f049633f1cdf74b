"""Low and high frequencies of the frames of a prediction (arXiv 2410.19355, section 3.3).

As `_split_low_high_freq` of `diffusers/hooks/faster_cache.py` (seen in 0.42) splits them, to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch

DIMENSIONS = {"BCFHW": 5, "BFCHW": 5, "BCHW": None}
"""The formats of predictions that the hooks know, and how many dimensions one has; `None` for at least four."""


def frames_of(prediction: torch.Tensor, tensor_format: str) -> torch.Tensor:
    """[B, C, F, H, W] -> [B * F, C, H, W], float32; as it is with "BCHW".

    Example:
        >>> frames_of(torch.zeros(2, 4, 3, 8, 8), "BCFHW").shape
        torch.Size([6, 4, 8, 8])
    """
    if tensor_format == "BCHW":
        return prediction.float()
    if tensor_format == "BCFHW":
        prediction = prediction.permute(0, 2, 1, 3, 4)
    return prediction.flatten(0, 1).float()


def prediction_of(frames: torch.Tensor, tensor_format: str, batch: int) -> torch.Tensor:
    """[B * F, C, H, W] -> [B, C, F, H, W]; as it is with "BCHW"."""
    if tensor_format == "BCHW":
        return frames
    frames = frames.unflatten(0, (batch, -1))
    return frames.permute(0, 2, 1, 3, 4) if tensor_format == "BCFHW" else frames


def low_and_high(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high frequencies of frames [..., H, W], complex64, the lowest in the middle.

    Example:
        >>> low, high = low_and_high(torch.ones(1, 1, 8, 8))
        >>> bool(low.abs().sum() == 64), bool(high.abs().sum() == 0)
        (True, True)
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(frames))
    is_low = _disk(frames.shape[-2], frames.shape[-1], frames.device)
    return spectrum * is_low, spectrum * ~is_low


def from_low_and_high(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The frames of these frequencies, float32."""
    return torch.fft.ifft2(torch.fft.ifftshift(low + high)).real


@lru_cache(maxsize=16)
def _disk(height: int, width: int, device: torch.device) -> torch.Tensor:
    """A disk in the middle, with a fifth of the shorter side for a radius: bool [1, 1, H, W]."""
    with torch.inference_mode(False):
        y, x = torch.arange(height)[:, None] - height // 2, torch.arange(width)[None] - width // 2
        return (x**2 + y**2 <= (min(height, width) // 5) ** 2)[None, None].to(device)
