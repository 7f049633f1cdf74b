"""Parts of tensors along a dimension: what is taken out of one, and what was joined into one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import fx

from .._torch import size_hint, symbol_of
from . import effects
from .dataflow import PRODUCTS, PROJECTIONS, is_tuple, op_name, value

JOINS = ("cat", "concat", "concatenate")


class Part(NamedTuple):
    """A range of a dimension of a tensor.

    Args:
        of: the tensor.
        along: the dimension.
        start, extent: sizes, symbolic ones where the graph's are.
    """

    of: fx.Node
    along: int
    start: Any
    extent: Any

    @property
    def span(self) -> tuple[int, int, int]:
        """The dimension and the half-open range, as they were traced."""
        start = size_hint(self.start)
        return self.along, start, start + size_hint(self.extent)

    def is_at(self, other: Part) -> bool:
        """Whether another part, of whichever tensor, lies at the same place."""
        return self.along == other.along and exact((self.start, self.extent)) == exact((other.start, other.extent))


def taken(node: fx.Node) -> Part | None:
    """What a view takes out of its source: a slice, or an item of a split; `None` if it is no range of one dimension.

    Read from the recorded tensors, so it does not matter which operation it was.
    """
    source = next(iter(node.all_input_nodes), None)
    if source is None or not effects.is_view(node):
        return None
    source = source.all_input_nodes[0] if is_tuple(source) and source.all_input_nodes else source
    mine, whole = value(node), value(source)
    if not isinstance(mine, torch.Tensor) or not isinstance(whole, torch.Tensor) or mine.dim() != whole.dim():
        return None
    extents = zip(exact(mine.shape), exact(whole.shape), strict=True)
    cut = [d for d, (part, all_of_it) in enumerate(extents) if part != all_of_it]
    if len(cut) != 1 or exact(mine.stride()) != exact(whole.stride()):
        return None
    (along,) = cut
    start = (mine.storage_offset() - whole.storage_offset()) // whole.stride(along)
    return Part(source, along, start, mine.shape[along])


def stands_alone(node: fx.Node) -> bool:
    """Whether a node takes a part of a tensor that may as well lie by itself in memory.

    The last bit of a product depends on how its operand lies, so no product may read the part.
    """
    return taken(node) is not None and not any(op_name(user) in PROJECTIONS | PRODUCTS for user in node.users)


def joined(node: fx.Node) -> list[tuple[fx.Node, Part]]:
    """The operands of a concatenation, each with the part of the result that it becomes; none for another node."""
    recorded = value(node)
    if op_name(node) not in JOINS or not isinstance(recorded, torch.Tensor):
        return []
    operands: Any = node.args[0] if node.args else node.kwargs["tensors"]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    along = int(given) % max(recorded.dim(), 1)
    if not all(isinstance(value(each), torch.Tensor) for each in operands):
        return []
    extents = [value(each).shape[along] for each in operands]
    starts = accumulate(extents, initial=0)
    return [(each, Part(node, along, *at)) for each, *at in zip(operands, starts, extents, strict=False)]


def exact(extents: Iterable[Any]) -> list[Any]:
    """Sizes as numbers, or as what they are traced as: to compare symbolic ones themselves would add guards."""
    return [extent if isinstance(extent, int) else symbol_of(extent) for extent in extents]


def sizes(node: fx.Node) -> list[Any] | None:
    """The exact shape of a node's value, `None` where none was recorded; two sizes that only data tell may differ."""
    recorded = value(node)
    return exact(recorded.shape) if isinstance(recorded, torch.Tensor) else None
