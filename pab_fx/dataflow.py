"""What a graph computes, read from its dataflow alone: attentions, where their operands come from, their axes.

Nothing here looks at a module's name or class. The questions asked are those of `roles`: which nodes are
attentions, do keys and values come from another sequence than the queries, and is the attended axis the
frames of a video.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ._torch import OpOverload, size_hint

Axis = tuple[tuple[frozenset[str], int], ...]  # one dimension as factors: (labels, size), outer to inner


@dataclass(frozen=True)
class Core:
    """The operation at the heart of an attention, and its operands.

    Args:
        node: what yields the attended values.
        query: the queries, [..., S_q, D].
        keys: the nodes that carry keys and values, [..., S_kv, D].
    """

    node: fx.Node
    query: fx.Node
    keys: tuple[fx.Node, ...]


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "linear" for `F.linear`, `aten.linear.default` and `nn.Linear`.

    Example:
        >>> graph = fx.Graph(); op_name(graph.call_function(torch.relu, (graph.placeholder("x"),)))
        'relu'
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        return type(leaf_module(node)).__name__.lower()
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def leaf_module(node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def value(node: fx.Node) -> Any:
    """What a tracer recorded of a node's value (a fake tensor, a SymInt, a tuple), `None` if nothing."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value, `None` where it is no tensor or nothing was recorded.

    A symbolic size counts as the one it was traced with, and no guard is put on it: what a graph computes
    does not depend on its sizes.
    """
    recorded = value(node)
    return tuple(map(size_hint, recorded.shape)) if isinstance(recorded, torch.Tensor) else None


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor; judged by the operation where nothing was recorded."""
    recorded = value(node)
    if recorded is not None:
        return isinstance(recorded, torch.Tensor)
    return op_name(node) not in ("size", "dim", "numel", "getattr", "ndim") and not is_tuple(node)


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is a number other than an integer, which a `cond` does not take as an operand."""
    return isinstance(value(node), (float, torch.SymFloat, torch.SymBool))


TUPLES = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "multiheadattention"}


def is_tuple(node: fx.Node) -> bool:
    """Whether a node's value is a tuple of tensors; judged by the operation where nothing was recorded."""
    recorded = value(node)
    if recorded is not None:
        return isinstance(recorded, (tuple, list)) and not isinstance(recorded, torch.Size)
    return op_name(node) in TUPLES


def is_state(node: fx.Node) -> bool:
    """Whether an input is a parameter, buffer or other attribute of the model, not data of the call."""
    if node.op == "get_attr":
        return True
    by_name = node.name.startswith("l_self_") or "_parameters_" in node.name or "_buffers_" in node.name
    return node.op == "placeholder" and (by_name or isinstance(value(node), nn.Parameter))


def activations(graph: fx.Graph) -> set[fx.Node]:
    """The tensors that depend on data of the call, hence not on parameters, constants and sizes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not is_tensor(node) and not is_tuple(node):
            continue
        is_data = node.op == "placeholder" and not is_state(node)
        if is_data or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


PROJECTIONS = {"linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm", "nonlinearlinear"}
PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__"}


def is_projection(node: fx.Node, acts: set[fx.Node]) -> bool:
    """Whether a node maps an activation by weights: a linear layer, a convolution, a product with a parameter."""
    if node not in acts or node.op not in ("call_function", "call_method", "call_module"):
        return False
    if node.op == "call_module":
        return any(parameter.ndim > 1 for parameter in leaf_module(node).parameters())  # type: ignore[union-attr]
    name = op_name(node)
    return name in PROJECTIONS or (name in PRODUCTS and len(_operands(node, acts)) == 1)


def _operands(node: fx.Node, acts: set[fx.Node]) -> list[fx.Node]:
    """The activations that a product multiplies, in order; one that is multiplied by itself counts twice."""
    flat: list[Any] = []
    fx.map_arg((node.args, node.kwargs), flat.append)
    operands = [arg for arg in flat if arg in acts]
    return operands[-2:] if op_name(node) == "baddbmm" else operands


FUSED_NAMES = ("scaled_dot_product", "attention", "attn", "sdpa", "flash")


def _is_fused_attention(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(leaf_module(node), nn.MultiheadAttention)
    is_call = node.op == "call_function" and node.target is not operator.getitem
    return is_call and any(name in op_name(node).lower() for name in FUSED_NAMES)


def attention_cores(graph: fx.Graph, acts: set[fx.Node]) -> list[Core]:
    """Every attention of the graph.

    That is a fused attention operator, or two chained products of activations: scores times values
    after queries times keys (usually with a softmax between), or linear attention's queries times
    (keys times values).
    """
    cores: list[Core] = []
    first_products: dict[fx.Node, fx.Node] = {}  # a node -> the product of activations it was derived from
    for node in graph.nodes:
        if node not in acts:
            continue
        operands = _operands(node, acts)
        if _is_fused_attention(node):
            given: list[fx.Node] = []  # learned queries are no activation, but queries all the same
            fx.map_arg((node.args, node.kwargs), given.append)
            query, *keys = [source for source in given if is_tensor(source)][:3]
            cores.append(Core(node, query, tuple(keys) or (query,)))
        elif op_name(node) in PRODUCTS and len(operands) == 2:
            chained = next((operand for operand in operands if operand in first_products), None)
            if chained is None:
                first_products[node] = node
                continue
            other = operands[1] if operands[0] is chained else operands[0]
            left, right = _operands(first_products[chained], acts)
            if _through_softmax(chained, first_products[chained]):
                cores.append(Core(node, left, (right, other)))
            else:
                cores.append(Core(node, other, (left, right)))
        elif not is_projection(node, acts):
            derived = [first_products[source] for source in node.all_input_nodes if source in first_products]
            if derived:
                first_products[node] = derived[0]
    return cores


NONLINEARITIES = {
    *("gelu", "silu", "relu", "sigmoid", "tanh", "mish", "hardswish", "relu6", "leaky_relu", "elu", "softplus"),
}


def is_nonlinear(node: fx.Node) -> bool:
    """Whether a node is an activation function of a feed-forward."""
    return op_name(node) in NONLINEARITIES


def _through_softmax(node: fx.Node, start: fx.Node) -> bool:
    """Whether scores become weights, by a softmax or another function, on the way from `start` to `node`."""
    way = backward([node], until=lambda n: n is start)
    return any("softmax" in op_name(step) or op_name(step) == "exp" or is_nonlinear(step) for step in way)


def backward(
    nodes: Iterable[fx.Node],
    until: Callable[[fx.Node], bool] = lambda node: False,
    follow: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> Iterator[fx.Node]:
    """Depth-first walk from `nodes` against the dataflow; nodes for which `until` holds are yielded, not crossed."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not until(node):
            pending.extend(follow(node))


def reads_another_sequence(core: Core, acts: set[fx.Node], cores: dict[fx.Node, Core]) -> bool:
    """Whether keys and values come from another sequence than the queries: cross-attention.

    Queries and keys that are projected from a common activation are one sequence. Otherwise both are
    followed to the graph's inputs along operations that keep the tokens' correspondence.
    """
    from_query, from_keys = _projected(core.query, acts), set()
    for key in core.keys:
        from_keys |= _projected(key, acts)
    if from_query & from_keys:
        return False
    return not (_origins(from_query, acts, cores) & _origins(from_keys, acts, cores))


def _projected(node: fx.Node, acts: set[fx.Node]) -> set[fx.Node]:
    """The activations whose projections make up `node`; `node` itself where nothing is projected.

    Rotary tables and masks are activations too, but no projection of them reaches queries or keys.
    """

    def stop(step: fx.Node) -> bool:
        return is_projection(step, acts)

    def follow(step: fx.Node) -> list[fx.Node]:
        return [source for source in step.all_input_nodes if source in acts]

    found = [step for step in backward([node], stop, follow) if stop(step)]
    return {follow(step)[0] for step in found} or {node}


Span = tuple[int, int, int]  # a dimension and the half-open range of positions in it


def _origins(nodes: set[fx.Node], acts: set[fx.Node], cores: dict[fx.Node, Core]) -> set[fx.Node]:
    """The graph inputs whose tokens the tokens of `nodes` are.

    An attention's output has its queries' tokens, a part of a concatenation those of the operands it lies
    in. What is broadcast over the tokens (modulation by a timestep, a pooled embedding) says nothing of them,
    nor does what only lends its dtype or shape.
    """
    pending: list[tuple[fx.Node, Span | None]] = [(node, None) for node in nodes]
    seen: set[tuple[fx.Node, Span | None]] = set()
    while pending:
        step = pending.pop()
        if step not in seen:
            seen.add(step)
            pending.extend(_token_sources(*step, acts, cores))
    inputs = {node for node, _ in seen if node.op == "placeholder" and node in acts}
    sizes = {node: shape(node) for node in inputs}
    return {node for node, size in sizes.items() if (size is None or len(size) > 1) and "timestep" not in node.name}


LENDS_DTYPE_OR_SHAPE = {"type_as", "view_as", "expand_as", "reshape_as", "to"}


def _token_sources(
    node: fx.Node, span: Span | None, acts: set[fx.Node], cores: dict[fx.Node, Core]
) -> list[tuple[fx.Node, Span | None]]:
    """What holds the tokens in `span` of a node (all of them for `None`), and where in it."""
    name = op_name(node) if node.op.startswith("call") else node.op
    if node in cores:
        return [(cores[node].query, span)]
    if name in ("cat", "concat", "concatenate") and span is not None:
        return _concatenated(node, span)
    sources = [source for source in node.all_input_nodes if source in acts and not _is_broadcast(source, node)]
    if name.startswith("new_") or name.endswith("_like"):
        return []
    if name in LENDS_DTYPE_OR_SHAPE:
        sources = sources[:1]
    taken = _taken(node, span)
    if taken is not None:
        return [(sources[0], taken)] if sources else []
    return [(source, _span_before(node, source, span)) for source in sources]


def _concatenated(node: fx.Node, span: Span) -> list[tuple[fx.Node, Span | None]]:
    """The operands of a concatenation that the span lies in."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape(node) or ())
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    along = int(given) % rank if rank else 0  # type: ignore[arg-type]
    if span[0] != along or any(shape(part) is None for part in parts):
        return [(part, span if span[0] != along else None) for part in parts]
    found: list[tuple[fx.Node, Span | None]] = []
    start = 0
    for part in parts:
        extent = shape(part)[along]  # type: ignore[index]
        low, high = max(span[1] - start, 0), min(span[2] - start, extent)
        if low < high:
            found.append((part, (along, low, high)))
        start += extent
    return found


def _taken(node: fx.Node, span: Span | None) -> Span | None:
    """The span of its source that a node takes out of it: a slice, or one part of a split; else `None`."""
    if node.target is not operator.getitem:
        return None
    source = node.all_input_nodes[0]
    if is_tuple(source):
        whole = source.all_input_nodes[0] if source.all_input_nodes else source
        parts, index = value(source), node.args[1]
        if not parts or not isinstance(index, int) or shape(whole) is None or shape(node) is None:
            return None
        before, after = shape(whole) or (), shape(node) or ()
        changed = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(before) != len(after) or len(changed) != 1:
            return None
        start = sum(size_hint(part.shape[changed[0]]) for part in parts[:index])
        return _within(span, changed[0], start, start + after[changed[0]])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    size = shape(source)
    if size is None or not all(_is_constant_slice(item) for item in index):
        return None
    cut = [(d, item.indices(size[d])) for d, item in enumerate(index) if item != slice(None)]
    if len(cut) != 1 or cut[0][1][2] != 1:
        return None
    dim, (start, stop, _) = cut[0]
    return _within(span, dim, start, stop)


def _is_constant_slice(item: Any) -> bool:
    return isinstance(item, slice) and all(
        isinstance(edge, (int, type(None))) for edge in (item.start, item.stop, item.step)
    )


def _within(span: Span | None, dim: int, start: int, stop: int) -> Span:
    """The span, of a part that starts at `start`, in the whole."""
    return (dim, start + span[1], start + span[2]) if span is not None and span[0] == dim else (dim, start, stop)


def _span_before(node: fx.Node, source: fx.Node, span: Span | None) -> Span | None:
    """Where a span of a node lies in its source, `None` (everywhere) if that cannot be told."""
    before, after = shape(source), shape(node)
    if span is None or not before or not after:
        return None
    dim, start, stop = span
    if op_name(node) in PERMUTATIONS:
        dim = _permutation(node, source)[dim]
        return (dim, start, stop)
    if len(before) == len(after) and before[dim] == after[dim]:
        return span
    ahead = math.prod(after[:dim])
    for other in range(len(before)):
        if math.prod(before[:other]) == ahead and before[other] == after[dim]:
            return (other, start, stop)
    return None


def _permutation(node: fx.Node, source: fx.Node) -> list[int]:
    """For each dimension of a permuted tensor, the dimension of its source that it is."""
    probe = torch.empty(tuple(range(2, 2 + len(shape(source) or ()))), device="meta")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: probe if n is source else n)
    call: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    return [extent - 2 for extent in call(*args, **kwargs).shape]


def _is_broadcast(source: fx.Node, result: fx.Node) -> bool:
    small, large = shape(source), shape(result)
    if not small or not large or len(large) < 2 or not isinstance(value(source), torch.Tensor):
        return False
    return len(small) < len(large) - 1 or (len(small) == len(large) and small[-2] == 1 and large[-2] != 1)


# ---------------------------------------------------------------------------------------------- frames


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
PERMUTATIONS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"}


def _axes_after(node: fx.Node, size: tuple[int, ...], axes: dict[fx.Node, tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    labelled = [source for source in node.all_input_nodes if source in axes]
    if not labelled:
        return _axes_of_item(node, axes)
    source = max(labelled, key=lambda s: (shape(s) == size, math.prod(shape(s) or ())))
    before, extents = axes[source], shape(source) or ()
    name = op_name(node)
    if name in PERMUTATIONS:
        return tuple(before[dim] for dim in _permutation(node, source))
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
