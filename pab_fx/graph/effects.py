"""What a node does besides yielding a value: aliasing, updates in place, random numbers, ambient state, collectives.

`torch.fx` counts a torch-level method such as `x.copy_(y)` as pure; everything here that removes or moves
nodes asks this module instead.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import OpOverload, has_storage, operator_namespace, overloads_of, updated_by_kernel
from .dataflow import is_tuple, leaf_module, op_name, value

VIEWS = {
    *("view", "view_as", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "select", "narrow", "unflatten", "diagonal", "detach", "alias"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "slice", "unsafe_chunk", "unsafe_split"),
}
MAYBE_VIEWS = {"reshape", "flatten", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "_unsafe_view"}
INPLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem),
}
OPERATORS = {operator.and_, operator.or_, operator.not_, operator.is_}  # which end in an underscore for Python's sake
RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"),
    *("normal", "poisson", "gumbel_softmax", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"),
}
DROPOUTS = {
    "dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "native_dropout",
}

CONTEXTS = {
    "_enter_autocast": "_exit_autocast",
    "_enter_inference_mode": "_exit_inference_mode",
    "_vmap_increment_nesting": "_vmap_decrement_nesting",
}
SWITCHES = {"_sdpa_kernel"}
AMBIENT = {*CONTEXTS, *CONTEXTS.values(), *SWITCHES}


def sets_ambient_state(node: fx.Node) -> bool:
    """Whether a node changes what the nodes after it compute without an edge to them: autocast, a choice of kernel."""
    return node.op == "call_function" and op_name(node) in AMBIENT


def contexts(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that enter and leave each context of a graph; what enters and leaves by one function, in turn."""
    found: list[tuple[fx.Node, fx.Node]] = []
    entered: dict[str, list[fx.Node]] = {}
    for node in filter(sets_ambient_state, graph.nodes):
        name = op_name(node)
        kind = next((enter for enter, leave in CONTEXTS.items() if name == leave), name)
        stack = entered.setdefault(kind, [])
        if stack and (name in SWITCHES or name != kind):
            found.append((stack.pop(), node))
        elif name == kind:
            stack.append(node)
    return found


def updated(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose tensors a node updates in place: `x` of `x.add_(y)`, of `x[i] = y`, of `op(..., out=x)`.

    Of an operator its schema tells, of a Triton kernel its code.
    """
    targets: list[Any] = []
    if node.op == "call_method":
        if str(node.target).endswith("_") and not str(node.target).endswith("__"):
            targets.append(node.args[0])
    elif node.op == "call_module":
        if getattr(leaf_module(node), "inplace", False):
            targets.append(node.args[0])
    elif overloads := overloads_of(node.target):
        for overload in overloads:
            for i, argument in enumerate(overload._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    is_positional = i < len(node.args) and not argument.kwarg_only
                    targets.append(node.args[i] if is_positional else node.kwargs.get(argument.name))
    elif node.op == "call_function":
        name = op_name(node)
        inplace = node.kwargs.get("inplace", False) or (name in DROPOUTS and node.args[3:4] == (True,))
        by_name = name.endswith("_") and not name.endswith("__") and node.target not in OPERATORS
        if inplace or by_name or node.target in INPLACE_OPERATORS:
            targets.append(node.args[0] if node.args else node.kwargs.get("input"))
    targets += [node.kwargs.get("out"), *updated_by_kernel(node)]
    flat: list[fx.Node] = []
    fx.map_arg(targets, flat.append)
    return tuple(dict.fromkeys(flat))


def later_updates(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The nodes that update a node's tensor in place after it was made."""
    return [
        other for other in graph.nodes if other > node and any(may_alias(target, node) for target in updated(other))
    ]


def end_of_updates(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node before which a node's tensor has its last value."""
    following = [node, *later_updates(graph, node)][-1].next
    while following.op == "placeholder":
        following = following.next
    return following


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node's value differs from call to call for the same operands."""
    if node.op == "call_module":
        module = leaf_module(node)
        return module is not None and any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0
            for part in module.modules()
        )
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return _argument(node, 4, "dropout_p", 0.0) not in (0, 0.0)
    if name in DROPOUTS:
        return _argument(node, 1, "p", 0.5) not in (0, 0.0) and bool(
            _argument(node, 2, "train" if name == "native_dropout" else "training", node.op == "call_function")
        )
    if isinstance(node.target, OpOverload):
        arguments = [argument.name for argument in node.target._schema.arguments]
        if "dropout_p" in arguments:  # the attention kernels
            return _argument(node, arguments.index("dropout_p"), "dropout_p", 0.0) not in (0, 0.0)
        return torch.Tag.nondeterministic_seeded in node.target.tags and "dropout" not in name
    return name in RANDOM


def returns_operand(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing: it returns the tensor that it is given.

    What is recorded does not tell: for `F.dropout` torch 2.13 records another tensor, 2.14 the same one.
    """
    if not node.op.startswith("call") or not node.all_input_nodes:
        return False
    return op_name(node) in DROPOUTS - {"native_dropout"} and not draws_random_numbers(node)  # a native one copies


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_view(node: fx.Node) -> bool:
    """Whether a node's value shares storage with its first operand.

    Read from the recorded values where there are some, else from the operation: an operation that may
    copy or not (`reshape`) then counts as a copy.
    """
    if not node.all_input_nodes or updated(node):
        return False
    if returns_operand(node):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    source = node.all_input_nodes[0]
    if node.target is operator.getitem:
        # an item of a tuple (chunk, split), or indexing of a tensor: a view unless a tensor is the index
        return is_view(source) if is_tuple(source) else len(node.all_input_nodes) == 1
    mine, base = storages(node), storages(source)
    if mine is not None and base is not None:
        return bool(mine) and mine <= base
    return op_name(node) in VIEWS


def storages(node: fx.Node) -> frozenset[StorageWeakRef] | None:
    """The storages of the tensors in a node's value; `None` where nothing was recorded, or where they have none (inside
    of `torch.vmap`, which makes flex attention's masks).

    What was recorded of a dropout that drops nothing, and of the views of it, may lie elsewhere than its operand.
    """
    if returns_operand(node):
        return storages(node.all_input_nodes[0])
    own, source = _recorded_storages(node), node
    while own and source.all_input_nodes:
        source = source.all_input_nodes[0]
        if not own <= (_recorded_storages(source) or frozenset()):
            break
        if returns_operand(source):
            return storages(source)
    return own


def _recorded_storages(node: fx.Node) -> frozenset[StorageWeakRef] | None:
    recorded = value(node)
    if recorded is None:
        return None
    tensors = [leaf for leaf in _leaves(recorded) if isinstance(leaf, torch.Tensor)]
    if not all(map(has_storage, tensors)):
        return None
    return frozenset(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)


def _leaves(recorded: Any) -> list[Any]:
    if isinstance(recorded, (tuple, list)):
        return [leaf for item in recorded for leaf in _leaves(item)]
    return [recorded]


def may_alias(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes may share storage. Without recorded values, views are followed to their base."""
    mine, others = storages(node), storages(other)
    if mine is not None and others is not None:
        return bool(mine & others)
    return _base(node) is _base(other)


def _base(node: fx.Node) -> fx.Node:
    while node.all_input_nodes and (is_view(node) or op_name(node) in MAYBE_VIEWS or updated(node)):
        node = node.all_input_nodes[0]
    return node


def is_collective(node: fx.Node) -> bool:
    """Whether a node is a functional collective of `torch.distributed`, or waits for one."""
    return node.op == "call_function" and operator_namespace(node.target).startswith("_c10d_functional")


def process_groups(graph: fx.Graph) -> tuple[str, ...]:
    """The names of the process groups whose collectives a graph takes part in: the last text that each is given."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if is_collective(node) and not is_wait(node):
            found.update(dict.fromkeys([a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)][-1:]))
    return tuple(found)


def is_wait(node: fx.Node) -> bool:
    """Whether a node waits for a collective to be over."""
    return is_collective(node) and op_name(node) == "wait_tensor"


def waits_for(collective: fx.Node) -> list[fx.Node] | None:
    """The nodes that wait for a collective, if nothing else reads what it yields; else `None`."""
    if not is_collective(collective) or is_wait(collective) or updated(collective):
        return None
    readers = [user for item in _items(collective) for user in item.users if user.target is not operator.getitem]
    return readers if readers and all(map(is_wait, readers)) else None


def _items(node: fx.Node) -> list[fx.Node]:
    """A node, and the items that are taken of it if it yields a list."""
    return [node, *(user for user in node.users if user.target is operator.getitem)]


def collective_of(wait: fx.Node) -> fx.Node | None:
    """The collective that a node waits for, if it alone reads what that yields; else `None`."""
    source = wait.all_input_nodes[0] if is_wait(wait) else None
    return source if source is not None and waits_for(source) == [wait] else None


def is_removable(node: fx.Node) -> bool:
    """Whether a node that nobody uses can go: it yields a value and does nothing else."""
    if node.op in ("placeholder", "output") or updated(node) or draws_random_numbers(node) or sets_ambient_state(node):
        return False
    if node.op == "call_module":
        return isinstance(leaf_module(node), nn.Module) and not node.is_impure()
    if node.op == "call_method":
        return True
    return not is_wait(node) and (not node.is_impure() or _may_draw(node))


def _may_draw(node: fx.Node) -> bool:
    """Whether an operator draws random numbers for some arguments, as attention does with dropout: impure to `torch.fx`
    whatever they are."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def unused(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that nobody uses."""
    return frozenset(node for node in graph.nodes if not node.users)


def eliminate_dead_code(graph: fx.Graph, unused_before: Collection[fx.Node] | None = None) -> int:
    """Remove what nobody uses and return how many nodes went.

    %y = add(%x, 1)        # unused                              (gone)
    %z = copy_(%x, %w)     # unused, but updates x      ->       %z = copy_(%x, %w)
    %c = all_gather(%x)                                          (gone)
    %a = wait_tensor(%c)   # unused                              (gone)

    `torch.fx` keeps collectives that nobody uses, since other ranks take part in them and may use what they get. Here
    they go if they lost their use, as all ranks make the same of a graph; those that never had one stay.

    Args:
        graph: is changed in place.
        unused_before: what had no use in the first place; default: what has none now.
    """
    kept = unused(graph) if unused_before is None else unused_before
    removed = 0
    for node in reversed(list(graph.nodes)):
        waits = waits_for(node)
        if waits and not any(wait.users or wait in kept for wait in waits):
            for other in dict.fromkeys([*waits, *reversed(_items(node)[1:])]):
                graph.erase_node(other)
                removed += 1
        if not node.users and is_removable(node):
            graph.erase_node(node)
            removed += 1
    return removed
