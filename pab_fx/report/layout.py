"""Where the boxes of an outline go: one below the other, as they run.

What is read by the next box comes to it from above. What is read further below goes around what lies between: on the
right within a block, on the left from one block to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .data import Box, Outline

WIDTH, HEIGHT, CONDITION = 260.0, 46.0, 92.0
GAP, FRAME, HEAD, LANE = 24.0, 14.0, 32.0, 16.0

Edge = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A rectangle by its upper left corner, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def low(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """Its middle."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """An outline that is laid out.

    Args:
        width: of the whole, in pixels.
        height: of the whole.
        places: of each box.
        straight: edges to the next box.
        detours: all others, each with how far out it leads.
        frames: what is drawn around the boxes of a block, each with its label.
    """

    width: float
    height: float
    places: tuple[Place, ...]
    straight: tuple[Edge, ...]
    detours: tuple[tuple[Edge, float], ...]
    frames: tuple[tuple[str, Place], ...]


def laid_out(outline: Outline) -> Layout:
    """An outline with a place for each of its boxes."""
    boxes = outline.boxes
    far = [(a, b) for a, b in outline.edges if b > a + 1]
    within = _lanes((a, b) for a, b in far if boxes[a].block and boxes[a].block == boxes[b].block)
    outside = _lanes(edge for edge in far if edge not in within)
    left = (1 + max(outside.values(), default=-1)) * LANE + FRAME
    right = left + WIDTH
    places = tuple(Place(left, y, WIDTH, height) for y, height in _rows(boxes))
    detours = [(edge, right + (1 + lane) * LANE) for edge, lane in within.items()]
    detours += [(edge, left - FRAME - (0.5 + lane) * LANE) for edge, lane in outside.items()]
    return Layout(
        right + (2 + max(within.values(), default=-1)) * LANE,
        places[-1].low,
        places,
        tuple((a, b) for a, b in outline.edges if b == a + 1),
        tuple(detours),
        tuple(_frames(boxes, places, within)),
    )


def _lanes(edges: Iterable[Edge]) -> dict[Edge, int]:
    """Edges beside each other, where they overlap: the shortest innermost."""
    lanes: dict[Edge, int] = {}
    for a, b in sorted(edges, key=lambda edge: (edge[1] - edge[0], edge)):
        taken = {lane for (c, d), lane in lanes.items() if a < d and c < b}
        lanes[a, b] = next(lane for lane in range(len(lanes) + 1) if lane not in taken)
    return lanes


def _rows(boxes: Sequence[Box]) -> Iterable[tuple[float, float]]:
    """Top and height of each box, with more room where a block begins or ends."""
    y = 0.0
    for i, box in enumerate(boxes):
        before = boxes[i - 1].block if i else ""
        if box.block != before:
            y += (HEAD if box.block else 0.0) + (FRAME if before else 0.0)
        height = CONDITION if box.region else HEIGHT
        yield y, height
        y += height + GAP


def _frames(boxes: Sequence[Box], places: Sequence[Place], within: Mapping[Edge, int]) -> Iterable[tuple[str, Place]]:
    of_block: dict[str, list[int]] = {}
    for i, box in enumerate(boxes):
        if box.block:
            of_block.setdefault(box.block, []).append(i)
    lanes = 1 + max(within.values(), default=-1)
    for block, own in of_block.items():
        first, last = places[own[0]], places[own[-1]]
        copies = boxes[own[0]].copies
        label = f"{block}   x {copies}" if copies > 1 else block
        width = WIDTH + 2 * FRAME + lanes * LANE
        yield label, Place(first.x - FRAME, first.y - HEAD, width, last.low - first.y + HEAD + FRAME)
