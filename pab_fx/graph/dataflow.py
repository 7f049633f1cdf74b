"""What a graph computes, read from its dataflow alone: which nodes are attentions, and what they multiply.

Nothing here, nor in `sequences` and `frames`, which answer where an attention's operands come from and which
axis it attends, looks at a module's name or class.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .._torch import OpOverload, size_hint

STATE = "pab_state"
"""Key in the meta of an input that is a parameter or buffer though nothing else tells."""


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
    if takes_item(node) and node.all_input_nodes:  # of a shape: a number
        source = node.all_input_nodes[0]
        return is_tensor(source) or is_tuple(source)
    return op_name(node) not in ("size", "dim", "numel", "getattr", "ndim") and not is_tuple(node)


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is a number other than an integer, which a `cond` does not take as an operand."""
    return isinstance(value(node), (float, torch.SymFloat, torch.SymBool))


def is_sizes(node: fx.Node) -> bool:
    """Whether a node's value is a tuple of sizes, which a `cond` does not take as an operand either."""
    recorded = value(node)
    if recorded is not None:
        return isinstance(recorded, torch.Size)
    if takes_item(node):
        source, index = node.args
        return isinstance(index, slice) and isinstance(source, fx.Node) and is_sizes(source)
    if op_name(node) == "getattr":
        return node.args[1] == "shape"
    return op_name(node) == "size" and len(node.args) == 1 and not node.kwargs


TUPLES = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "multiheadattention"}


def is_tuple(node: fx.Node) -> bool:
    """Whether a node's value is a tuple of tensors; judged by the operation where nothing was recorded."""
    recorded = value(node)
    if recorded is not None:
        return isinstance(recorded, (tuple, list)) and not isinstance(recorded, torch.Size)
    return op_name(node) in TUPLES


def takes_item(node: fx.Node) -> bool:
    """Whether a node takes an item of a tuple, or indexes a tensor."""
    return op_name(node) == "getitem"


def is_state(node: fx.Node) -> bool:
    """Whether an input is a parameter, buffer or other attribute of the model, not data of the call."""
    if node.op == "get_attr":
        return True
    if STATE in node.meta:
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


def tells_dtype(node: fx.Node, user: fx.Node) -> bool:
    """Whether a node is only the example of a dtype to one of its users, `x.type_as(node)`."""
    is_example = user.op == "call_method" and user.target == "type_as" and user.args[0] is not node
    return is_example and isinstance(value(node), torch.Tensor)


PERMUTATIONS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"}


def permutation(node: fx.Node, source: fx.Node) -> list[int]:
    """For each dimension of a permuted tensor, the dimension of its source that it is."""
    probe = torch.empty(tuple(range(2, 2 + len(shape(source) or ()))), device="meta")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: probe if n is source else n)
    call: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    return [extent - 2 for extent in call(*args, **kwargs).shape]
