"""Which part of a video an attention attends: a dimension's frames and space, followed through a graph."""

from __future__ import annotations

import math
import operator

from torch import fx

from ..graph.dataflow import PERMUTATIONS, Core, is_projection, op_name, permutation, shape

Axis = tuple[tuple[frozenset[str], int], ...]  # one dimension as factors: (labels, size), outer to inner


def attends_frames(core: Core, axes: dict[fx.Node, tuple[Axis, ...]]) -> bool:
    """Whether the attended axis is the frames of a video, and nothing else: temporal attention."""
    query = axes.get(core.query)
    if query is None or len(query) < 2:
        return False
    factors = [factor for factor in query[-2] if factor[1] != 1] or list(query[-2])
    labels = frozenset().union(*(names for names, _ in factors))
    return bool(labels) and labels <= {"frames"}


def video_axes(graph: fx.Graph, acts: set[fx.Node]) -> dict[fx.Node, tuple[Axis, ...]]:
    """For each node that carries video, which part of the video each of its dimensions runs over.

    A video is an input of rank 5, `[B, C, F, H, W]` or `[B, F, C, H, W]`. Whichever of dimensions 1 and 2
    is the channels, a projection consumes it before any attention; so both are labelled "frames", the
    one that is left is the frames. Labels follow reshapes by factors, permutations by position,
    convolutions and slices by dimension; every other operation keeps what has kept its size.
    """
    axes: dict[fx.Node, tuple[Axis, ...]] = {}
    for node in graph.nodes:
        size = shape(node)
        if node not in acts or size is None:
            continue
        if node.op == "placeholder":
            if len(size) == 5:
                labels = ("batch", "frames", "frames", "space", "space")
                axes[node] = tuple(((frozenset((label,)), s),) for label, s in zip(labels, size, strict=True))
            continue
        found = _axes_after(node, size, axes)
        if found is not None:
            axes[node] = found
    return axes


RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "contiguous", "clone"}


def _axes_after(node: fx.Node, size: tuple[int, ...], axes: dict[fx.Node, tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    labelled = [source for source in node.all_input_nodes if source in axes]
    if not labelled:
        return _axes_of_item(node, axes)
    source = max(labelled, key=lambda s: (shape(s) == size, math.prod(shape(s) or ())))
    before, extents = axes[source], shape(source) or ()
    name = op_name(node)
    if name in PERMUTATIONS:
        return tuple(before[dim] for dim in permutation(node, source))
    if name in RESHAPES and math.prod(size) == math.prod(extents):
        return _reshaped(before, size)
    if len(size) != len(before):
        return None
    if "conv" in name:
        channels = ((frozenset[str](), size[1]),)
        return (before[0], channels, *(_resized(axis, s) for axis, s in zip(before[2:], size[2:], strict=True)))
    if is_projection(node, set(node.all_input_nodes) | {node}):
        return (*before[:-1], ((frozenset(), size[-1]),))
    return tuple(_resized(axis, s) for axis, s in zip(before, size, strict=True))


def _axes_of_item(node: fx.Node, axes: dict[fx.Node, tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    """Axes of one part of a chunk, split or unbind: `node` takes an item of a tuple made from a video."""
    if node.target is not operator.getitem or not node.all_input_nodes:
        return None
    whole = [source for source in node.all_input_nodes[0].all_input_nodes if source in axes]
    size = shape(node) or ()
    if not whole or len(axes[whole[0]]) != len(size):
        return None
    return tuple(_resized(axis, s) for axis, s in zip(axes[whole[0]], size, strict=True))


def _resized(axis: Axis, size: int) -> Axis:
    """The axis at another size: the same labels, as one factor; unchanged where the size is the same."""
    if math.prod(extent for _, extent in axis) == size:
        return axis
    return ((frozenset().union(*(labels for labels, _ in axis)), size),)


def _reshaped(axes: tuple[Axis, ...], size: tuple[int, ...]) -> tuple[Axis, ...]:
    """Distribute the factors of all axes, in order, over dimensions of the given sizes."""
    factors = [factor for axis in axes for factor in axis]
    result: list[Axis] = []
    for target in size:
        taken: list[tuple[frozenset[str], int]] = []
        have = 1
        while factors and have < target:
            labels, extent = factors.pop(0)
            need = target // have
            if extent > need:
                if target % have or extent % need:
                    return tuple(((frozenset(), whole),) for whole in size)
                factors.insert(0, (labels, extent // need))
                extent = need
            taken.append((labels, extent))
            have *= extent
        if have != target:
            return tuple(((frozenset(), whole),) for whole in size)
        if target == 1 and factors and factors[0][1] == 1:
            taken.append(factors.pop(0))
        result.append(tuple(taken))
    return tuple(result)
