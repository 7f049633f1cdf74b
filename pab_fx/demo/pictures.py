"""Pictures of two coloured digits: drawn from a caption, and recognised from their pixels.

The second model is trained on what `draw` draws, and its samples are judged by `recognise`, which knows nothing of the
model: it separates the two colours, draws all ten digits where each colour is, and says which one fits best.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from pab_fx.demo.clips import BACKGROUND, COLOURS, SIZE, foreground, hue_distance

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS: dict[str, tuple[int, int]] = {  # unit (x, y) from the first digit to the second; y grows down
    "before": (1, 0),
    "above": (0, 1),
}

# A picture's geometry, in pixels. Places are steps of a patch of the model and little besides: that trains in minutes.
APART = 8.0  # of a digit from the middle, along the relation
OFFSETS = (-4.0, 0.0, 4.0)  # across it
JITTER = (-0.5, 0.5)  # in both directions
HEIGHTS = (11.5, 12.5)
STROKE = 1.1  # half the width of a line


@dataclass(frozen=True)
class Caption:
    """What a picture shows. `str(caption)` is the prompt, `Caption.parse(prompt)` its inverse."""

    first: tuple[str, str]  # colour and digit
    relation: str
    second: tuple[str, str]

    def __str__(self) -> str:
        return f"a {' '.join(self.first)} {self.relation} a {' '.join(self.second)}"

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """Read a prompt of the form `"a red three above a blue seven"`.

        Raises:
            ValueError: If the prompt has another form, an unknown word or one colour twice.
        """
        words = prompt.lower().split()
        caption = cls((words[1], words[2]), words[3], (words[5], words[6])) if len(words) == 7 else None
        if caption is None or caption not in _KNOWN or str(caption).split() != words:
            raise ValueError(f"{prompt!r} is not of the form 'a red three above a blue seven', in two colours")
        return caption


_ALL = [
    Caption((colour, digit), relation, (other, another))
    for colour in COLOURS
    for digit in DIGITS
    for relation in RELATIONS
    for other in COLOURS
    for another in DIGITS
    if colour != other
]
_KNOWN = frozenset(_ALL)
CAPTIONS = tuple(_ALL[i] for i in np.random.default_rng(0).permutation(len(_ALL)))  # all 6000, shuffled: any few differ


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse around (x, y) from one angle to another, in degrees: 0 is right, 90 is down."""
    angles = np.radians(np.linspace(start, end, 3 + int(abs(end - start) / 30)))
    return [(float(x + rx * np.cos(a)), float(y + ry * np.sin(a))) for a in angles]


_TAIL = [(0.2, -0.5), (0.0, -0.4), (-0.17, -0.22), (-0.27, 0.0), (-0.3, 0.2)]  # of a six
_LINES: dict[str, list[list[tuple[float, float]]]] = {  # polylines of a digit of height 1 around (0, 0)
    "zero": [_arc(0, 0, 0.3, 0.5, 0, 360)],
    "one": [[(-0.2, -0.28), (0.06, -0.5), (0.06, 0.5)]],
    "two": [[*_arc(0, -0.22, 0.28, 0.28, -170, 30), (-0.3, 0.5), (0.3, 0.5)]],
    "three": [[*_arc(0, -0.26, 0.25, 0.24, -160, 90), *_arc(0, 0.24, 0.3, 0.26, -80, 160)]],
    "four": [[(0.14, 0.5), (0.14, -0.5), (-0.3, 0.2), (0.34, 0.2)]],
    "five": [[(0.27, -0.5), (-0.22, -0.5), (-0.26, 0.0), *_arc(-0.02, 0.19, 0.31, 0.31, -120, 150)]],
    "six": [_arc(0, 0.2, 0.3, 0.3, 0, 360), _TAIL],
    "seven": [[(-0.3, -0.5), (0.3, -0.5), (-0.08, 0.5)]],
    "eight": [_arc(0, -0.26, 0.23, 0.24, 0, 360), _arc(0, 0.22, 0.29, 0.28, 0, 360)],
    "nine": [_arc(0, -0.2, 0.3, 0.3, 0, 360), [(-x, -y) for x, y in _TAIL]],
}
_ENDS = {  # [2, S, 2]: both ends of every segment
    digit: np.array([pair for line in lines for pair in itertools.pairwise(line)]).transpose(1, 2, 0)
    for digit, lines in _LINES.items()
}
_SEGMENTS = {digit: np.stack([start, end - start]) for digit, (start, end) in _ENDS.items()}


def coverage(digit: str, centre: np.ndarray, height: float) -> np.ndarray:
    """How much of each pixel a digit covers, in [0, 1].

    Args:
        digit: One of `DIGITS`.
        centre: `[2]`, the x and y of the middle of its box in pixels.
        height: Pixels, from the middle of the highest line to that of the lowest.

    Returns:
        `[SIZE, SIZE]` float32. The edge is a ramp one pixel wide, which antialiases it.
    """
    (x, y), (dx, dy) = (_SEGMENTS[digit] * height).astype(np.float32)[..., None, None]  # [S, 1, 1] each
    along, down = np.float32(np.arange(SIZE) + 0.5), np.float32(np.arange(SIZE) + 0.5)[:, None]  # pixel middles
    x, y = along - np.float32(centre[0]) - x, down - np.float32(centre[1]) - y  # [S, 1, SIZE], [S, SIZE, 1]
    share = np.clip((x * dx + y * dy) / (dx**2 + dy**2), 0, 1)  # of the way along a segment, to its nearest point
    squared = (x - share * dx) ** 2 + (y - share * dy) ** 2  # [S, SIZE, SIZE]
    return np.clip(0.5 + STROKE - np.sqrt(squared.min(axis=0)), 0.0, 1.0)


def draw(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture; each digit's height and its exact place are random.

    Args:
        caption: What to draw.
        rng: The source of everything the caption leaves open.

    Returns:
        `[SIZE, SIZE, 3]` float32 RGB in [-1, 1].
    """
    unit = np.array(RELATIONS[caption.relation])
    picture = np.full((SIZE, SIZE, 3), BACKGROUND)
    for (colour, digit), side in ((caption.first, -1), (caption.second, 1)):
        centre = SIZE / 2 + side * APART * unit + rng.choice(OFFSETS) * unit[::-1] + rng.uniform(*JITTER, size=2)
        alpha = coverage(digit, centre, rng.uniform(*HEIGHTS))[..., None]
        picture += alpha * (np.array(COLOURS[colour]) - picture)
    return (2 * picture - 1).astype(np.float32)


def measure(picture: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Find the two colours that stand out most from the background.

    Args:
        picture: `[H, W, 3]` RGB in [-1, 1].

    Returns:
        For each its name, the coverage `[H, W]` in [0, 1] and the centroid `[2]` (x, y) in pixels; in the order of
        reading. Empty if fewer than two colours cover 4 pixels.
    """
    alpha = foreground(picture)
    rgb = (np.clip(picture, -1, 1) + 1) / 2
    nearest = np.argmin([hue_distance(rgb, colour) for colour in COLOURS.values()], axis=0)  # [H, W]
    masks = [np.where(nearest == i, alpha, 0.0) for i in range(len(COLOURS))]
    masses = [float(mask.sum()) for mask in masks]
    chosen = sorted(range(len(COLOURS)), key=lambda i: -masses[i])[:2]
    if masses[chosen[1]] < 4:
        return []
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    found = [
        (tuple(COLOURS)[i], masks[i], np.array([(masks[i] * x).sum(), (masks[i] * y).sum()]) / masses[i])
        for i in chosen
    ]
    (_, _, one), (_, _, other) = found
    return found if (other - one).sum() > 0 else found[::-1]


def fit(alpha: np.ndarray, centroid: np.ndarray) -> dict[str, float]:
    """How well each digit explains a coverage.

    Args:
        alpha: `[SIZE, SIZE]` in [0, 1].
        centroid: `[2]`, its x and y in pixels.

    Returns:
        For each of `DIGITS` the best intersection over union, in [0, 1], with a drawn one of the same centroid, over
        heights.
    """
    overlaps = {}
    for digit, middle in _CENTROIDS.items():
        drawn = [coverage(digit, centroid - middle * h, h) for h in np.linspace(HEIGHTS[0] - 0.5, HEIGHTS[1] + 0.5, 7)]
        overlaps[digit] = max(float(np.minimum(alpha, d).sum() / np.maximum(alpha, d).sum()) for d in drawn)
    return overlaps


def overlap(picture: np.ndarray, caption: Caption) -> float:
    """How well the captioned digits explain a picture `[H, W, 3]`: the worse of the two in `fit`, or 0."""
    found = measure(picture)
    digits = (caption.first[1], caption.second[1])
    return min((fit(a, c)[digit] for (_, a, c), digit in zip(found, digits, strict=False)), default=0.0)


def recognise(picture: np.ndarray) -> Caption | None:
    """Say what a picture shows, from its pixels alone.

    The colours are the two that cover most, the relation is the direction from one centroid to the other, the digits
    are those of `fit`.

    Args:
        picture: `[H, W, 3]` RGB in [-1, 1].

    Returns:
        The caption; None if there are not two colours.
    """
    found = measure(picture)
    if not found:
        return None
    (colour, mask, centre), (other, other_mask, other_centre) = found
    overlaps, other_overlaps = fit(mask, centre), fit(other_mask, other_centre)
    way = other_centre - centre
    return Caption(
        first=(colour, max(overlaps, key=lambda name: overlaps[name])),
        relation=max(RELATIONS, key=lambda name: float(way @ np.array(RELATIONS[name]))),
        second=(other, max(other_overlaps, key=lambda name: other_overlaps[name])),
    )


def _centroid(digit: str) -> np.ndarray:
    """`[2]`, of a digit of height 1 around (0, 0)."""
    height = 12.0
    alpha = coverage(digit, np.array([SIZE / 2, SIZE / 2]), height)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return (np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum() - SIZE / 2) / height


_CENTROIDS = {digit: _centroid(digit) for digit in DIGITS}
