"""Clips of one coloured shape that moves: drawn from a caption, and recognised from their pixels.

The demo's model is trained on what `draw` draws, and its samples are judged by `recognise`, which knows
nothing of the model: it measures the shape's colour, path and size, draws all four shapes there, and says
which one fits best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.color import rgb2hsv

FRAMES = 8
SIZE = 32  # pixels, height and width

COLOURS: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1]; hues are 60 degrees apart
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.1, 0.1, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "magenta": (1.0, 0.1, 1.0),
    "cyan": (0.1, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {  # unit (x, y); y grows down
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

BACKGROUND = 0.05  # grey level in [0, 1]
# Ranges that a clip's geometry is drawn from, in pixels.
RADII = (5.0, 6.0)
TRAVEL = (13.0, 15.0)  # from first to last frame
DELAY = (-0.75, 0.75)  # along the direction of motion
OFFSET = (-5.0, 5.0)  # across it


@dataclass(frozen=True)
class Caption:
    """What a clip shows. `str(caption)` is the prompt, `Caption.parse(prompt)` its inverse."""

    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """Read a prompt of the form `"a red circle moving left"`.

        Raises:
            ValueError: If the prompt has another form or an unknown word.
        """
        words = prompt.lower().split()
        caption = cls(words[1], words[2], words[4]) if len(words) == 5 else None
        if caption is None or caption not in CAPTIONS or str(caption).split() != words:
            raise ValueError(f"{prompt!r} is not of the form 'a red circle moving left'")
        return caption


CAPTIONS = tuple(Caption(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS)  # all 96


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels of the points (x, y) from the edge of a shape around (0, 0), negative inside.

    (0, 0) is the centroid of each shape. The factors give the four shapes about the same area, so that none
    is told by its size.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return _box(x, y, 0.9 * radius, 0.9 * radius)
    if shape == "triangle":  # point up; its three edges are `inner` away from the centroid
        inner, sin60 = 0.78 * radius, 3**0.5 / 2
        return np.maximum(y, np.abs(x) * sin60 - y / 2) - inner
    if shape == "cross":
        return np.minimum(_box(x, y, 1.2 * radius, 0.42 * radius), _box(x, y, 0.42 * radius, 1.2 * radius))
    raise ValueError(f"unknown shape {shape!r}, one of {SHAPES}")


def coverage(shape: str, centres: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, in [0, 1].

    Args:
        shape: One of `SHAPES`.
        centres: `[F, 2]`, the centroid's x and y in pixels in each frame.
        radius: Pixels.

    Returns:
        `[F, SIZE, SIZE]` float64. The edge is a ramp one pixel wide, which antialiases it.
    """
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5  # [SIZE, SIZE] pixel middles
    distance = signed_distance(shape, x - centres[:, 0, None, None], y - centres[:, 1, None, None], radius)
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """Draw a clip.

    The shape crosses the frame at constant speed from the side it leaves; its radius, its speed and its place
    across the direction of motion are random.

    Args:
        caption: What to draw.
        rng: The source of everything the caption leaves open.

    Returns:
        `[FRAMES, SIZE, SIZE, 3]` float32 RGB in [-1, 1].
    """
    radius = rng.uniform(*RADII)
    unit = np.array(DIRECTIONS[caption.direction], dtype=np.float64)  # [2]
    along = np.linspace(-0.5, 0.5, FRAMES) * rng.uniform(*TRAVEL) + rng.uniform(*DELAY)  # [F]
    centres = SIZE / 2 + along[:, None] * unit + rng.uniform(*OFFSET) * np.abs(unit[::-1])  # [F, 2]
    alpha = coverage(caption.shape, centres, radius)[..., None]  # [F, H, W, 1]
    clip = BACKGROUND + alpha * (np.array(COLOURS[caption.colour]) - BACKGROUND)
    return (2 * clip - 1).astype(np.float32)


def foreground(pixels: np.ndarray) -> np.ndarray:
    """How much of each pixel a colour covers, `[..., H, W]` in [0, 1], of RGB `[..., H, W, 3]` in [-1, 1]."""
    brightness = (np.clip(pixels, -1, 1).max(axis=-1) + 1) / 2  # a colour's strongest channel is 1
    alpha = np.clip((brightness - BACKGROUND) / (1 - BACKGROUND), 0, 1)
    return np.where(alpha > 0.25, alpha, 0.0)  # below: noise of a sampled background


def measure(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Find what stands out from the background.

    Args:
        clip: `[F, H, W, 3]` RGB in [-1, 1].

    Returns:
        The coverage `[F, H, W]` in [0, 1] and the centroids `[F, 2]` (x, y) in pixels; None if some frame
        shows nothing.
    """
    alpha = foreground(clip)  # [F, H, W]
    mass = alpha.sum(axis=(1, 2))  # [F] pixels
    if (mass < 4).any():
        return None
    y, x = np.mgrid[: clip.shape[1], : clip.shape[2]] + 0.5
    return alpha, np.stack([(alpha * x).sum((1, 2)), (alpha * y).sum((1, 2))], axis=-1) / mass[:, None]


def fit(clip: np.ndarray) -> dict[str, float]:
    """How well each shape explains a clip's foreground, over all frames.

    Returns:
        For each of `SHAPES` the best intersection over union, in [0, 1], of the clip's coverage with a drawn
        one at the measured centroids, over radii. Empty if some frame shows nothing.
    """
    measured = measure(clip)
    if measured is None:
        return {}
    alpha, centres = measured
    overlaps = {}
    radii = np.linspace(RADII[0] - 0.75, RADII[1] + 0.75, 13)
    for shape in SHAPES:
        drawn = [coverage(shape, centres, radius) for radius in radii]
        overlaps[shape] = max(float(np.minimum(alpha, d).sum() / np.maximum(alpha, d).sum()) for d in drawn)
    return overlaps


def overlap(clip: np.ndarray, caption: Caption) -> float:
    """How well the captioned shape explains a clip `[F, H, W, 3]`: its number in `fit`, 0 if a frame shows nothing."""
    return fit(clip).get(caption.shape, 0.0)


def recognise(clip: np.ndarray) -> Caption | None:
    """Say what a clip shows, from its pixels alone.

    Colour is the hue of the foreground, direction the slope of a line through the centroids of all frames,
    shape the one of `fit`.

    Args:
        clip: `[F, H, W, 3]` RGB in [-1, 1].

    Returns:
        The caption; None if some frame shows nothing.
    """
    measured = measure(clip)
    if measured is None:
        return None
    alpha, centres = measured
    rgb = (np.clip(clip, -1, 1) + 1) / 2
    colour = (alpha[..., None] * rgb).sum(axis=(0, 1, 2)) / alpha.sum()  # [3]
    velocity = np.polyfit(np.arange(len(centres)), centres, 1)[0]  # [2] pixels per frame
    overlaps = fit(clip)
    return Caption(
        colour=min(COLOURS, key=lambda name: float(hue_distance(colour, COLOURS[name]))),
        shape=max(overlaps, key=lambda name: overlaps[name]),
        direction=max(DIRECTIONS, key=lambda name: float(velocity @ np.array(DIRECTIONS[name]))),
    )


def hue_distance(rgb: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Distance `[...]` of colours `[..., 3]` from one, on the circle of hues, in turns (0 to 0.5)."""
    difference = np.abs(rgb2hsv(np.asarray(rgb))[..., 0] - rgb2hsv(np.asarray(colour))[0])
    return np.minimum(difference, 1 - difference)
