"""A captured graph in outline, for drawing: attentions one by one, the rest by block, and blocks that are alike once.

hundreds of nodes                         ->    a dozen boxes

norm, linear, chunk, ...  of blocks.0           blocks.{0-27}, x 28:    norm1
attention                 of blocks.0                                   attn1   (spatial)
add, norm, linear, gelu   of blocks.0                                   norm3, ff
the same                  of blocks.1 ...
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
from torch import fx

from ..graph.dataflow import is_state, is_tensor, is_tuple, op_name
from ..graph.effects import returns_operand
from ..graph.modules import joined, qualified_name
from ..report.captured import Captured
from ..report.costs import operations
from ..report.data import Box, Outline, RegionReport
from ..report.groups import joined_names, without_numbers
from ..select.region import Region


def outlines_of(graphs: Iterable[Captured], regions: Iterable[RegionReport]) -> tuple[Outline, ...]:
    """The graphs that hold attentions or feed-forwards in outline.

    Args:
        graphs: what was captured.
        regions: what is said of what was found in them.
    """
    by_name = {region.name: region for region in regions}
    return tuple(_outline(captured, by_name) for captured in graphs if captured.regions)


# ------------------------------------------------------------------------------------------ from nodes to pieces


@dataclass
class _Piece:
    """Nodes that follow each other and belong together."""

    block: str
    region: Region | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    label: str = ""

    def kind(self) -> object:
        """What two pieces of blocks that are alike have in common."""
        role = None if self.region is None else (self.region.role, self.region.policy, self.region.unsafe)
        return role, without_numbers(self.label)


def _outline(captured: Captured, regions: Mapping[str, RegionReport]) -> Outline:
    graph, pieces = captured.gm.graph, _pieces(captured)
    first_of, copies = _folded(pieces)
    kept = sorted(set(first_of))
    boxes = [Box(", ".join(_inputs(graph)) or "inputs"), *(_box(pieces[i], copies[i], regions) for i in kept)]
    boxes.append(Box("outputs"))
    position = {first: 1 + i for i, first in enumerate(kept)}
    owner = {node: position[first_of[i]] for i, piece in enumerate(pieces) for node in piece.nodes}
    edges = _edges(graph, owner, boxes)
    read = {of for of, _ in edges}
    # what leads from one copy of a block to the next leads nowhere where it is drawn once
    drawn = [i for i, box in enumerate(boxes) if i in read or box.region or i == len(boxes) - 1]
    place = {i: new for new, i in enumerate(drawn)}
    return Outline(
        captured.frame or "the model",
        tuple(boxes[i] for i in drawn),
        tuple((place[of], place[to]) for of, to in edges if of in place and to in place),
    )


def _box(piece: _Piece, copies: Sequence[str], regions: Mapping[str, RegionReport]) -> Box:
    region = None if piece.region is None else regions.get(piece.region.name)
    block, count = (joined_names(copies), len(copies)) if piece.block else ("", 1)
    return Box(piece.label, block, count, operations(piece.nodes), region)


def _pieces(captured: Captured) -> list[_Piece]:
    """The operations of a graph in pieces, each attention one of them where it ends."""
    modules = {node: _module(node, captured.frame) for node in captured.gm.graph.nodes if node.op.startswith("call")}
    region_of = {node: region for region, nodes in captured.spared.items() for node in nodes}
    ends = {region.nodes[-1]: region for region in captured.regions}
    pieces: list[_Piece] = []
    for node, block in _blocks(modules).items():
        if node in ends:
            region = ends[node]
            block_of_region = _block(region.name)
            label = region.name.removeprefix(block_of_region).strip(".:") or region.name
            pieces.append(_Piece(block_of_region, region, list(captured.spared[region]), label))
        if node in region_of:
            continue
        if not pieces or pieces[-1].region is not None or pieces[-1].block != block:
            pieces.append(_Piece(block))
        pieces[-1].nodes.append(node)
    attended = {region.name for region in captured.regions}
    for piece in pieces:
        piece.label = piece.label or _label(piece, modules, attended)
    return pieces


def _module(node: fx.Node, frame: str) -> str | None:
    """Qualified name of the innermost module that a node was emitted in; `None` where none is recorded."""
    stack = node.meta.get("nn_module_stack")
    return joined(frame, qualified_name(next(reversed(stack.values()))[0])) if stack else None


def _blocks(modules: Mapping[fx.Node, str | None]) -> dict[fx.Node, str]:
    """The block that each operation is in, in graph order; for some of those in a block, no module is recorded."""
    last = {_block(name): node for node, name in modules.items() if name is not None}
    found: dict[fx.Node, str] = {}
    current = ""
    for node, name in modules.items():
        if name is not None:
            current = _block(name)
        elif last.get(current) in found:
            current = ""
        found[node] = current
    return found


def _block(name: str) -> str:
    """The outermost numbered part of a model that a name lies in, "" if it lies in none.

    Example:
        >>> _block("blocks.3.attn1"), _block("down_blocks.0.attentions.1.proj"), _block("norm_out")
        ('blocks.3', 'down_blocks.0', '')
    """
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|:|$)", name)
    return found[0] if found else ""


def _label(piece: _Piece, modules: Mapping[fx.Node, str | None], attended: Collection[str]) -> str:
    """The parts of its block that a piece runs through, but for attentions, whose views are left; else what it does."""
    parts: dict[str, None] = {}
    for node in piece.nodes:
        name = modules[node] or ""
        part = name.removeprefix(piece.block).strip(".").partition(".")[0]
        if part and not any(f"{name}.".startswith(f"{attention}.") for attention in attended):
            parts[part] = None
    done = [op_name(node) for node in piece.nodes if not returns_operand(node)]
    return ", ".join(parts or list(dict.fromkeys(done))[:3])


# ------------------------------------------------------------------------------------------- what is alike, once


def _folded(pieces: Sequence[_Piece]) -> tuple[list[int], dict[int, list[str]]]:
    """For each piece the first that is like it, and for each of those the blocks that they stand for.

    Blocks with attentions are alike if their pieces are; others if what is around them is alike, too. Of what lies
    between two blocks, only these are looked at.
    """
    # the pieces of each block, or between two, by their positions
    stretches = [list(of) for _, of in itertools.groupby(range(len(pieces)), key=lambda i: pieces[i].block)]
    kinds = [(without_numbers(pieces[each[0]].block), *(pieces[i].kind() for i in each)) for each in stretches]
    around = list(zip([None, *kinds], [*kinds[1:], None], strict=False))
    kinds = [
        kind if any(pieces[i].region for i in each) else (kind if kind[0] else None, near)
        for kind, each, near in zip(kinds, stretches, around, strict=True)
    ]
    first: dict[object, list[int]] = {}
    first_of: list[int] = []
    copies: dict[int, list[str]] = {}
    for kind, stretch in zip(kinds, stretches, strict=True):
        like = first.setdefault(kind, stretch)
        first_of += like
        for i in like:
            copies.setdefault(i, []).append(pieces[stretch[0]].block)
    return first_of, copies


# ------------------------------------------------------------------------------------------------------- edges


def _edges(graph: fx.Graph, owner: Mapping[fx.Node, int], boxes: Sequence[Box]) -> list[tuple[int, int]]:
    """Who reads what: not what another way shows anyway, unless it leads around an attention of the same block."""
    found, last = networkx.DiGraph(), len(boxes) - 1
    found.add_nodes_from(range(len(boxes)))
    for node in graph.nodes:
        to = last if node.op == "output" else owner.get(node)
        for source in node.all_input_nodes:
            of = 0 if source.op == "placeholder" and not is_state(source) else owner.get(source)
            if of is not None and to is not None and of < to and (is_tensor(source) or is_tuple(source)):
                found.add_edge(of, to)
    reduced = networkx.transitive_reduction(found)
    inside = [(a, b) for a, b in found.edges if boxes[a].block and boxes[a].block == boxes[b].block]
    return sorted({*reduced.edges, *inside})


def _inputs(graph: fx.Graph) -> list[str]:
    """The arguments that a graph reads, by their names; those without a name, and parts of tuples, are left out."""
    names = [
        re.sub(r"^l_(kwargs_|args_)?|_+$", "", str(node.target).lower())
        for node in graph.find_nodes(op="placeholder")
        if node.users and not is_state(node) and is_tensor(node)
    ]
    return [name for name in dict.fromkeys(re.sub(r"_\d+$", "", name) for name in names) if not name.isdigit()]
