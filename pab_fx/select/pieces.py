"""Blocks of a range of which a captured graph holds only some, since the graph breaks between them.

    for block in blocks:    # Dynamo cannot resume in a loop after a break, so it captures blocks.0 alone
        x = block(x)

    graph of blocks.0, which blocks.1 runs too:     %y : blocks(%x)     # stream 0 enters as input 0
                                                    return (%y,)        # and leaves as output 0

Which part of the range a graph is follows from which block runs it: where the range begins, goes on, or ends. What
lies between two graphs is not seen here; that a stream goes on unchanged is for `run` to watch. No graph is changed
here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from ..graph import effects
from ..graph.dataflow import op_name
from ..graph.modules import ModuleCall, argument_of, list_of
from ..policy.where import Blocks
from .region import Piece, Region
from .streams import DIFFERENCES, SUMS, streams
from .view import View


def every_block(view: View, where: Blocks, found: Sequence[ModuleCall]) -> tuple[str, ...]:
    """Names of the blocks of the model that the found ones are of, also of those that other graphs hold.

    A graph tells what attends in it. All lists count that hold such modules, of nested ones the outermost, as where
    one graph holds all; of lists that are asked for by name, those that there are.
    """
    model = view.names.model
    if model is None:
        return ()
    numbered = {name: each for name, each in model.named_modules() if name.rpartition(".")[2].isdigit()}
    listed = tuple(name for name in numbered if list_of(name) in where.lists)
    if listed:
        return listed
    attend = {call.cls for core in view.cores for call in view.names.stack(core)[-1:]}
    lists = {list_of(name) for name, each in numbered.items() if any(type(m) in attend for m in each.modules())}
    lists = {each for each in lists if all(key.isdigit() for key in model.get_submodule(each)._modules)}
    least = min((each.count(".") for each in lists), default=0)
    beside = {list_of(list_of(call.name)) for call in found}
    return tuple(
        name
        for name in numbered
        if list_of(name) in lists and list_of(name).count(".") == least and list_of(list_of(name)) in beside
    )


def is_piece(view: View, order: Sequence[str], found: Sequence[ModuleCall]) -> bool:
    """Whether a graph holds a part of the model's blocks, where others hold the rest."""
    return _is_of_block(view, found) or bool(set(order) - {call.name for call in found})


def _is_of_block(view: View, found: Sequence[ModuleCall]) -> bool:
    """Whether the traced frame is that of a block, or of a part of one."""
    return any(call.module is outer for call in found for outer in view.names.enclosing)


def piece_of(view: View, ranges: Sequence[Blocks], order: Sequence[str], calls: Sequence[ModuleCall]) -> Piece:
    """The piece of these ranges that calls of blocks in a graph are; see `with_ends`."""
    return Piece(tuple(ranges), tuple(order), tuple(call.name for call in calls), _is_of_block(view, calls))


def broken_block(view: View, calls: Sequence[ModuleCall]) -> str | None:
    """Why a graph does not hold all of a block; `None` if it does."""
    names = view.names
    for call in calls:
        is_around = any(call.module is outer for outer in names.enclosing)
        if is_around and not (call.module is names.enclosing[-1] and names.begins and names.ends):
            return f"the graph breaks inside of the block {call.name}, so that no graph holds all of it"
    return None


def with_ends(view: View, region: Region) -> Region:
    """The region with where streams enter and leave its graph; unsafe if one that leaves it does not enter it."""
    assert region.piece is not None
    graph, inside = view.graph, set(region.nodes)
    own = streams(region.nodes, region.outputs, view.acts)
    missing = next((output for output in region.outputs if output not in own.carried), None)
    if missing is not None:
        return replace(region, unsafe=f"nothing enters it that looks like what leaves it ({missing.name})")
    sources = own.sources(region.outputs)
    view_of = next((source for source in sources if effects.is_view(source)), None)
    if view_of is not None:
        return replace(region, unsafe=f"what enters it is a view that its graph takes ({view_of.name})")
    # behind the blocks a stream goes on by views alone: what is added there lies between two pieces
    after = [
        node
        for node in graph.nodes
        if node.op.startswith("call") and node > region.nodes[-1] and op_name(node) not in SUMS | DIFFERENCES
    ]
    onward = streams(sorted(inside.union(after)), region.outputs, view.acts)
    returned = graph.output_node().args[0]
    leaves = []
    for i, node in enumerate(returned if isinstance(returned, (tuple, list)) else (returned,)):  # type: ignore[arg-type]
        if isinstance(node, fx.Node) and node in onward.carried:
            made_of = onward.sources([node])
            if len(made_of) == 1 and made_of[0] in sources:
                leaves.append((i, sources.index(made_of[0])))
    inputs = graph.find_nodes(op="placeholder")
    enters = tuple(inputs.index(source) if source in inputs else None for source in sources)
    return replace(
        region, piece=replace(region.piece, enters=enters, leaves=tuple(leaves), sample=_sample(view, sources))
    )


def _sample(view: View, sources: Sequence[fx.Node]) -> int:
    """Which stream a block takes first."""
    model = view.names.enclosing[-1] if view.names.enclosing else None
    if model is None:
        return 0
    parameters = list(inspect.signature(model.forward).parameters)
    places = [argument_of(source, parameters) for source in sources]
    ranked = [parameters.index(place) if place is not None else len(parameters) for place in places]
    return ranked.index(min(ranked))
