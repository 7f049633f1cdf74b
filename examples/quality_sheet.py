"""The picture of `measure_quality.py`: the same frames in every way, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Column:
    """A way to make clips.

    Args:
        name: what stands above it.
        clips: [N, F, H, W, 3] in 0 to 1.
        psnr: of each clip against the first column's, in dB; `None` for that one.
        is_cached: whether it has a cache.
    """

    name: str
    clips: np.ndarray
    psnr: Sequence[float] | None
    is_cached: bool


SCALE, GAP, LINE, LABEL = 4, 6, 16, 130  # screen pixels for one of a clip; between tiles; of a line of text; of a row's
GAIN = 4


def picture(columns: Sequence[Column], captions: Sequence[Any]) -> np.ndarray:
    """The middle frame in each way, and below it what differs, `GAIN` times: of the worst, the median, the best clip.

    Clips are ordered by their PSNR under the config that changes most.
    """
    psnr = [each.psnr for each in columns if each.psnr is not None and each.is_cached]
    order = np.argsort(min(psnr, key=np.mean))
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    size = columns[0].clips.shape[2] * SCALE
    width, height = size + GAP, 2 * size + LINE + 3 * GAP
    sheet = Image.new("RGB", (LABEL + len(columns) * width, 2 * LINE + len(chosen) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, each in enumerate(columns):
        pen.text((LABEL + column * width, 0), each.name.replace(", ", ",\n"), "black", font)
    for row, (which, i) in enumerate(chosen.items()):
        top, middle = 2 * LINE + row * height, columns[0].clips.shape[1] // 2
        said = str(captions[i]).removeprefix("a ").replace(" moving", "\nmoving")
        pen.text((GAP, top), f"{which}:\n{said}", "black", font)
        pen.text((GAP, top + width), f"difference,\n{GAIN} times", "black", font)
        for column, each in enumerate(columns):
            left, difference = LABEL + column * width, each.clips[i][middle] - columns[0].clips[i][middle]
            sheet.paste(_tile(each.clips[i][middle], size), (left, top))
            if each.psnr is not None:
                sheet.paste(_tile(GAIN * np.abs(difference), size), (left, top + width))
                pen.text((left, top + 2 * width), f"{each.psnr[i]:.1f} dB", "black", font)
    return np.asarray(sheet)


def _tile(frame: np.ndarray, size: int) -> Image.Image:
    pixels = (np.clip(frame, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
