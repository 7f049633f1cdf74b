"""Private PyTorch interfaces, all of them, each with what it is for and the versions it was seen in.

here           operators, tensors, symbols, and how graphs are compiled for them
dynamo.py      frames that run and that are compiled
inductor.py    what Inductor is told, and how its code is changed
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

graph_log = logging.getLogger("pab_fx.graphs")

# The conditional as an operator, for use as a node's target: `torch.cond` itself, called without a
# surrounding torch.compile, would start one. Seen in 2.9 to 2.15; `torch.cond` is the public spelling.
cond_op = torch.ops.higher_order.cond

# What `cond_op` and every other operator that takes graphs is an instance of. Seen in 2.9 to 2.15.
HigherOrderOperator = type(cond_op).__bases__[0]

# What `torch.ops.aten.add.Tensor` is an instance of: has a schema, which tells what it updates. 2.9 to 2.15.
OpOverload = torch._ops.OpOverload


def operator_namespace(target: object) -> str:
    """The namespace of an operator, "aten" of `torch.ops.aten.add` and `torch.ops.aten.add.Tensor`; "" for others.

    `_qualified_op_name` of `OpOverloadPacket` seen in 2.9 to 2.15.
    """
    if isinstance(target, OpOverload):
        return target.namespace
    return str(getattr(target, "_qualified_op_name", "")).partition("::")[0]


def mean_over_ranks(number: Any, group: Any) -> Any:
    """The mean of a number over the ranks of a process group, as functional collectives: traced, it is two nodes more.

    `torch.ops._c10d_functional` and `_get_group_size_by_name` seen in 2.9 to 2.15.
    """
    collectives = torch.ops._c10d_functional
    size = torch.distributed.distributed_c10d._get_group_size_by_name(group)
    return collectives.wait_tensor(collectives.all_reduce(number, "sum", group)) / size


def overloads_of(target: object) -> list[OpOverload]:
    """The overloads of an operator: one for `torch.ops.aten.add.Tensor`, all for `torch.ops.aten.add`; `[]` for others.

    `OpOverloadPacket` and its `overloads()` seen in 2.13 and 2.14.
    """
    if isinstance(target, OpOverload):
        return [target]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return []


_updated_by_kernel: MutableMapping[fx.Node, tuple[str, ...]] = WeakKeyDictionary()


def updated_by_kernel(node: fx.Node) -> list[Any]:
    """What a Triton kernel that the traced code launches updates in place; `[]` for a node that launches none.

    Dynamo records a launch as `triton_kernel_wrapper_mutation`, with the kernel's arguments in a keyword `kwargs`.
    `get_mutated_tensors` reads the kernel's code, and names every tensor where it cannot. Seen in 2.13 and 2.14.
    """
    target: Any = node.target
    if not isinstance(target, HigherOrderOperator) or getattr(target, "_name", "") != "triton_kernel_wrapper_mutation":
        return []
    given: Any = node.kwargs["kwargs"]
    if node not in _updated_by_kernel:
        from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

        values = {
            name: each.meta.get("example_value") if isinstance(each, fx.Node) else each for name, each in given.items()
        }
        known = {name: node.kwargs[name] for name in ("kernel_idx", "constant_args_idx", "tma_descriptor_metadata")}
        _updated_by_kernel[node] = tuple(get_mutated_tensors(kwargs=values, **known))  # type: ignore[arg-type]
    return [given[name] for name in _updated_by_kernel[node]]


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a storage that can be asked for: not a sparse one, nor one inside of `torch.vmap`.

    `torch._C._has_storage`, seen in 2.9 to 2.15, where Inductor's passes ask it too.
    """
    return torch._C._has_storage(tensor)


def wrapped(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    """What a tensor is made of, such as the data and the scale of a quantised weight, and what else is known of it.

    `is_traceable_wrapper_subclass` seen in 2.9 to 2.15; `__tensor_flatten__` is the documented protocol.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return {}, None
    names, context = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, context


def boxed(compiled: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """A compiled graph that takes its inputs as a list, and lets go of each as soon as it has read it.

    What AOTAutograd compiles takes them so, inside of a function that takes them one by one and holds on to them:
    `simple_wraps` seen in 2.13 and 2.15. Without it (2.9, other compilers) they are held for the whole call.
    """
    function: Any = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    inside = getattr(function, "__wrapped__", None)
    is_from_aot = all(hasattr(function, name) for name in ("zero_grad", "named_parameters", "named_buffers"))
    if inside is None or not is_from_aot or any(function.named_parameters()) or any(function.named_buffers()):
        return lambda inputs: compiled(*inputs)
    return torch.compiler.disable(inside)  # type: ignore[no-any-return]


def keep_persistence(source: nn.Module, target: nn.Module) -> None:
    """Leave buffers out of `target`'s state dict that are left out of `source`'s.

    `GraphModule` copies buffers without that. `_non_persistent_buffers_set` seen in 2.9 to 2.15.
    """
    others = dict(source.named_modules())
    for name, module in target.named_modules():
        if name in others:
            module._non_persistent_buffers_set |= others[name]._non_persistent_buffers_set & module._buffers.keys()


def add_keyword(gm: fx.GraphModule, name: str) -> fx.Node:
    """Give a graph of `torch.export` a further keyword argument, after the others; it is called with keywords.

    `_PyTreeCodeGen` and `_PyTreeInfo`, which say how a graph's inputs lie in its arguments, seen in 2.9 to 2.15.
    """
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
    from torch.utils import _pytree

    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    inputs = gm.graph.find_nodes(op="placeholder")[: info.in_spec.num_leaves]  # others are yet to be sunk
    args, kwargs = _pytree.tree_unflatten([0] * len(inputs), info.in_spec)
    in_spec = _pytree.tree_structure((args, {**kwargs, name: 0}))
    gm.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo([*info.orig_args, name], in_spec, info.out_spec)))
    with gm.graph.inserting_after(inputs[-1]):
        return gm.graph.placeholder(name)


def show_graph(name: str, gm: fx.GraphModule) -> None:
    """Show a graph to whoever looks: to tlparse where `TORCH_TRACE` is set, and to `TORCH_LOGS="+pab_fx"`.

    `trace_structured`, seen in 2.9 to 2.15, writes nothing where nobody asked for a trace.
    """
    from torch._logging import trace_structured

    def readable() -> str:
        return gm.print_readable(print_output=False, include_stride=True, include_device=True)

    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=readable)
    if graph_log.isEnabledFor(logging.DEBUG):
        graph_log.debug("%s\n%s", name, readable())


@contextlib.contextmanager
def traced_shapes(gm: fx.GraphModule) -> Iterator[list[Any]]:
    """Compile `gm` with the symbolic shapes it was traced with: yields fake example inputs.

    A graph that Dynamo captured with dynamic shapes may be compiled later, outside of Dynamo's call. Its
    symbols live in the fake mode of its placeholders' `example_value`; a fresh `TracingContext` of that
    mode makes an inner compiler use them. `torch._guards` seen in 2.9 to 2.15.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensor

    values = [node.meta.get("example_value", node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with tracing(TracingContext(mode)):
        yield [
            mode.from_tensor(value, static_shapes=True)
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
            else value
            for value in values
        ]


def compiled_later(compiler: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile a graph that Dynamo captured, outside of its call.

    AOTAutograd asks Dynamo to start over where a number that Dynamo made symbolic is not used in a graph, having noted
    that it is to be a constant. Here it is one already (see `constants`), so that asking again is all it takes.
    `TensorifyScalarRestartAnalysis` seen in 2.9 to 2.15.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    try:
        return compiler(gm, inputs)
    except TensorifyScalarRestartAnalysis:
        return compiler(gm, inputs)


def faked_for_compiler(recorded: torch.Tensor) -> torch.Tensor:
    """A recorded fake tensor in the mode that a compiler expects inside of Dynamo's call; static sizes only.

    torch 2.9 compiles a graph with another fake mode than it was traced with. `TracingContext` seen in 2.9 to 2.15.
    """
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensor

    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None or not isinstance(recorded, FakeTensor) or recorded.fake_mode is mode:
        return recorded
    with mode:
        return torch.empty_strided(recorded.shape, recorded.stride(), dtype=recorded.dtype, device=recorded.device)


def belongs_to_model(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a constant of the code or a module's attribute, not an argument.

    By the name that Dynamo makes of its source: `G_...` of a global, `L_self_...` of an attribute. 2.9 to 2.15.
    """
    return str(placeholder.target).lower().startswith(("g_", "l_self_"))


def mark_static(buffer: torch.Tensor) -> torch.Tensor:
    """The tensor, known to keep its address, so that a CUDA graph reads it in place. Public; 2.9 to 2.15."""
    torch._dynamo.mark_static_address(buffer, guard=False)
    return buffer


def mark_batch_static(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of whose first size Dynamo makes no symbol, though it has seen another one. Public; 2.9 to 2.15."""
    torch._dynamo.mark_static(tensor, 0)
    return tensor


def declare_static(placeholder: fx.Node) -> None:
    """Tell AOTAutograd that an input of a graph keeps its address, as Dynamo does of parameters. 2.9 to 2.15."""
    known = placeholder.meta.get("tensor_dict", {})
    placeholder.meta["tensor_dict"] = {**known, "_dynamo_static_input_type": "unguarded"}


def static_inputs(gm: fx.GraphModule) -> frozenset[int]:
    """Positions of the inputs that keep their address, as AOTAutograd finds them. The names as above; 2.9 to 2.15."""
    if not hasattr(gm, "_param_name_to_source"):
        return frozenset()
    types = [each.meta.get("tensor_dict", {}) for each in gm.graph.find_nodes(op="placeholder")]
    return frozenset(i for i, known in enumerate(types) if known.get("_dynamo_static_input_type"))


def cloned(outputs: Any) -> Any:
    """What a model returned, with copies of its tensors. `torch.utils._pytree` seen in 2.9 to 2.15."""
    from torch.utils import _pytree

    return _pytree.tree_map_only(torch.Tensor, torch.clone, outputs)


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The mode that a graph's recorded tensors were traced in, `None` if there is none. `fake_mode`: 2.9 to 2.15."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next((recorded.fake_mode for recorded in values if isinstance(recorded, FakeTensor)), None)


def size_hint(extent: Any) -> int:
    """The value that a size was traced with, without a guard on it; 4096 stands for what only the data tell.

    `SymNode.hint` and `SymNode.expr` seen in 2.9 to 2.15.
    """
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    if extent.node.hint is not None:
        return int(extent.node.hint)
    expression = extent.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, 4096)))


def sizes_at(shape: Sequence[Any], known: Sequence[tuple[torch.SymInt, int]]) -> tuple[int, ...]:
    """A symbolic shape where the given symbols have the given values; -1 where only the data tell.

    `SymNode.expr` seen in 2.9 to 2.15.
    """
    values = {symbol.node.expr: size for symbol, size in known}

    def size(extent: Any) -> int:
        if not isinstance(extent, torch.SymInt):
            return int(extent)
        expression = extent.node.expr.xreplace(values)
        return -1 if getattr(expression, "free_symbols", None) else int(expression)

    return tuple(map(size, shape))


def symbol_of(recorded: Any) -> Any:
    """What a symbolic size is traced as, of sympy; `None` of anything else. `SymNode.expr` seen in 2.9 to 2.15."""
    return recorded.node.expr if isinstance(recorded, torch.SymInt) else None


def symbols_inside(recorded: Iterable[Any]) -> frozenset[Any]:
    """The symbols in shapes and strides that are none of the sizes, nor a whole dimension or stride of any tensor.

    `SymNode.expr`, of sympy, seen in 2.9 to 2.15.
    """
    extents: list[Any] = []
    for each in recorded:
        is_dense = isinstance(each, torch.Tensor) and each.layout is torch.strided
        extents += (*each.shape, *each.stride()) if is_dense else (each,)
    expressions = {symbol_of(extent) for extent in extents} - {None}
    whole = {expression for expression in expressions if expression.is_symbol}
    return frozenset().union(*(expression.free_symbols for expression in expressions)) - whole
