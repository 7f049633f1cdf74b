"""Contact sheets: clips as rows of frames with their captions beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(frames: np.ndarray, labels: Sequence[str], scale: int = 3, label_width: int = 230) -> np.ndarray:
    """Lay clips out on one picture.

    Args:
        frames: `[N, F, H, W, 3]` RGB in [0, 1].
        labels: N texts.
        scale: Screen pixels, in each direction, for one pixel of a clip.
        label_width: Screen pixels left of the frames.

    Returns:
        `[N * (scale * H + 2), label_width + F * (scale * W + 2), 3]` uint8.
    """
    pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=64)  # a line between frames
    n, f, h, w, _ = pixels.shape
    sheet = Image.new("RGB", (label_width + f * w, n * h), (32, 32, 32))
    sheet.paste(Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, 3)), (label_width, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, label in enumerate(labels):
        pen.text((6, row * h + h // 2), label, fill=(235, 235, 235), font=font, anchor="lm")
    return np.asarray(sheet)
