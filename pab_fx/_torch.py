"""Private PyTorch interfaces, all of them, each with what it is for and the versions it was seen in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version
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


def compile_lock() -> contextlib.AbstractContextManager[Any]:
    """Dynamo's lock: what holds it compiles alone, in a frame or later; a thread may take it again.

    `convert_frame.compile_lock`, an `RLock`, seen in 2.9 and 2.13.
    """
    from torch._dynamo import convert_frame

    return convert_frame.compile_lock


def _alone(context: Callable[..., contextlib.AbstractContextManager[None]]) -> Any:
    """The context manager, for one thread at a time: what it changes, it changes for the whole process."""

    @functools.wraps(context)
    @contextlib.contextmanager
    def locked(*given: Any) -> Iterator[None]:
        with compile_lock(), context(*given):
            yield

    return locked


@_alone
@contextlib.contextmanager
def conditions_let_go_of_operands() -> Iterator[None]:
    """Compile conditions so that what is read last in one is freed in either branch, and what is read is not copied.

    Inductor emits the `del`s into the true branch alone (seen in 2.9 and 2.13), so that where the false one runs its
    operands live to the end of the graph: every cache, and every input of an attention. Here they go before the `if`:

        if predicate:                            args = [a, b]; decided = predicate; del a, b
            args = [a, b]; del a, b        ->    if decided:
            out = true_graph(args)                   out = true_graph(args)
        else:                                    else:
            args = [a, b]                            out = false_graph(args)
            out = false_graph(args)

    A false branch that copies operands, since a branch may not return them, for outputs of the whole graph, which no
    kernel writes to, hands them on:

            out = false_graph(args)        ->        out = [args[0]]; args.clear()

    Private are the wrapper's methods; where they are not those that were seen (2.15), nothing is changed.
    """
    from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine, PythonWrapperCodegen
    from torch._inductor.ir import ShapeAsConstantBuffer
    from torch._inductor.virtualized import V

    if not all(hasattr(PythonWrapperCodegen, name) for name in ("codegen_conditional", "codegen_subgraph_common")):
        yield
        return
    before = PythonWrapperCodegen.codegen_conditional

    def codegen_conditional(self: Any, conditional: Any) -> None:
        if V.graph.aot_mode or type(self).codegen_conditional is not codegen_conditional:
            return before(self, conditional)
        name = conditional.get_name()
        operands = ", ".join(operand.codegen_reference() for operand in conditional.operands)
        predicate = conditional.predicate.codegen_reference()
        if not isinstance(conditional.predicate, ShapeAsConstantBuffer):
            predicate = f"{predicate}.item()"
        self.writeline(f"{name} = [None] * {len(conditional.outputs)}")
        self.writeline(f"{name}_args, {name}_decided = [{operands}], {predicate}")
        V.graph.scheduler.free_buffers()
        returned = set(V.graph.get_output_names())
        is_returned = all(output.get_name() in returned for output in conditional.outputs)
        for line, subgraph, may_hand_on in (
            (f"if {name}_decided:", conditional.true_subgraph, False),
            ("else:", conditional.false_subgraph, is_returned),
        ):
            copied = _copied_operands(subgraph.graph_module.graph) if may_hand_on else None
            self.writeline(line)
            self.writeline(EnterSubgraphLine(self, subgraph.graph))
            self.codegen_subgraph_common(subgraph)
            if copied is None:
                self.writeline(f"{name} = {subgraph.graph.name}({name}_args)")
            else:
                self.writeline(f"{name} = [{', '.join(f'{name}_args[{i}]' for i in copied)}]")
                self.writeline(f"{name}_args.clear()")
            self.writeline(ExitSubgraphLine(self))

    PythonWrapperCodegen.codegen_conditional = codegen_conditional  # type: ignore[method-assign]
    try:
        yield
    finally:
        PythonWrapperCodegen.codegen_conditional = before  # type: ignore[method-assign]


@_alone
@contextlib.contextmanager
def conditions_take_operands_as_they_lie() -> Iterator[None]:
    """Compile the branches of a condition for the strides that its operands have in memory.

    Inductor compiles branches for the strides that were traced, but is free to choose others for what it computes, as
    channels last for a convolution; the branch then refuses its operand at run time (2.9 and 2.13). `hold_strides` in
    front of a condition prevents that, at the price of a copy. Here the operand's layout is decided, and the branches'
    inputs are recorded with it:

        %c    = hold_strides(%x)          # (36864, 1, 144)          %x : lies with (36864, 256, 1)
        %cond = cond(..., (%c,))                               ->    %cond = cond(..., (%x,))

    Private are `ir.Conditional.create`, which reads the operands' `meta["val"]`, the layouts of Inductor's nodes, and
    its table of lowerings, seen in 2.13. In 2.9 the branches' outputs would not be given the same strides, and 2.15 has
    no such node: nothing is changed there.
    """
    from torch._inductor import inductor_prims, ir

    if not hasattr(ir, "Conditional") or Version(torch.__version__).release < (2, 13):
        yield
        return
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    create_before, prim = ir.Conditional.create, inductor_prims.force_stride_order
    hold_before = lowerings[prim]

    def create(predicate: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
        realized: Any = [ir.Conditional.realize_input(operand) for operand in operands]
        nodes: Any = V.graph.current_node.args[-1]
        traced = {node: node.meta["val"] for node in nodes if isinstance(node, fx.Node)}
        for node, operand in zip(nodes, realized, strict=True):
            if isinstance(traced.get(node), torch.Tensor):
                node.meta["val"] = _as_it_lies(operand, traced[node])
        try:
            return create_before(predicate, true_fn, false_fn, realized)
        finally:
            for node, recorded in traced.items():
                node.meta["val"] = recorded

    def hold(tensor: Any, strides: Any) -> Any:
        is_for_conditions = all(user.target is cond_op for user in V.graph.current_node.users)
        return tensor if is_for_conditions else hold_before(tensor, strides)

    ir.Conditional.create = create  # type: ignore[method-assign]
    lowerings[prim] = hold
    try:
        yield
    finally:
        ir.Conditional.create = create_before  # type: ignore[method-assign]
        lowerings[prim] = hold_before


def _as_it_lies(operand: Any, traced: torch.Tensor) -> torch.Tensor:
    """A fake of what Inductor computes, with the strides and the offset that it gives that."""
    from torch._inductor import ir
    from torch._inductor.utils import convert_shape_to_symint
    from torch._inductor.virtualized import V

    if isinstance(operand, ir.StorageBox):
        operand.data.decide_layout()  # type: ignore[attr-defined]
    layout = operand.get_layout()
    *strides, offset = convert_shape_to_symint([*layout.stride, layout.offset])
    with V.fake_mode, V.graph.sizevars.shape_env.suppress_guards():
        extent = 1 + offset + sum((size - 1) * stride for size, stride in zip(traced.shape, strides, strict=True))
        whole = torch.empty(extent, dtype=traced.dtype, device=traced.device)
        return whole.as_strided(traced.shape, strides, offset)


def _copied_operands(branch: fx.Graph) -> list[int] | None:
    """The positions of the operands that a branch returns copies of, `None` if it does anything else."""
    operands, outputs = branch.find_nodes(op="placeholder"), branch.output_node().args[0]
    copies: list[Any] = [outputs] if isinstance(outputs, fx.Node) else list(outputs)  # type: ignore[arg-type]
    if not all(isinstance(node, fx.Node) and node.target is torch.ops.aten.clone.default for node in copies):
        return None
    sources = [node.args[0] for node in copies]
    return [operands.index(source) for source in sources] if all(source in operands for source in sources) else None


@_alone
@contextlib.contextmanager
def cached(gm: fx.GraphModule) -> Iterator[None]:
    """Compile a graph so that Inductor's and AOTAutograd's caches take it, in memory and on disk.

    They leave out graphs with `cond`, though their key has the branches' code like all other code, and graphs with
    functions that are not PyTorch's, such as `hold_strides`. Here both are marked, and a digest of the package's source
    is a part of the key. Methods and closures are not marked: their name does not tell what they hold, and two of them
    would have one key. `unsafe_marked_cacheable_functions` seen in 2.9 to 2.13.
    """
    from torch._inductor import config

    graphs = [each.graph for each in gm.modules() if isinstance(each, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    marked = {f"{each.__module__}.{each.__name__}": _digest() for each in (cond_op, *filter(_is_ours, targets))}
    with config.patch(unsafe_marked_cacheable_functions={**config.unsafe_marked_cacheable_functions, **marked}):
        yield


def _is_ours(target: Any) -> bool:
    """Whether it is a function of a module of this package, and its name there says all of it."""
    if not inspect.isfunction(target) or not target.__module__.startswith(f"{__package__}."):
        return False
    return getattr(sys.modules[target.__module__], target.__name__, None) is target


@functools.cache
def _digest() -> str:
    """Of the package's source. Where only compiled files are installed it is of this process alone."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    source = b"".join(file.read_bytes() for file in files) or uuid.uuid4().bytes
    return hashlib.sha256(source).hexdigest()


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call a model and its modules as they are, whichever have been compiled in place.

    `_compiled_call_impl`, which `Module.compile` sets, seen in 2.9 to 2.15.
    """
    modules = [each for each in model.modules() if each._compiled_call_impl is not None]
    compiled = [each._compiled_call_impl for each in modules]
    for each in modules:
        each._compiled_call_impl = None
    try:
        yield
    finally:
        for each, call in zip(modules, compiled, strict=True):
            each._compiled_call_impl = call


def hold_strides(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, held to the strides it is traced with. Inductor's `force_stride_order`, seen in 2.9 to 2.15.

    Where nothing traces there is nothing to hold. Run eagerly that operation copies, and fails on a tensor with gaps.
    `_len_torch_dispatch_stack` seen in 2.9 to 2.13.
    """
    from torch._inductor import inductor_prims
    from torch.utils._python_dispatch import _len_torch_dispatch_stack

    if type(tensor) is torch.Tensor and not _len_torch_dispatch_stack():
        return tensor
    return inductor_prims.force_stride_order(tensor, tensor.stride())


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config for a `mode` and `options` of `torch.compile`. `list_*` seen in 2.9 to 2.15.

    Raises:
        ValueError: for a mode or an option that Inductor does not have.
    """
    from torch._inductor import list_mode_options, list_options

    modes, known = list_mode_options(), set(list_options())
    if mode is not None and mode not in modes:
        raise ValueError(f"mode={mode!r} is unknown; Inductor has {', '.join(map(repr, modes))}.")
    for name in options:
        if name.replace("-", "_") not in known:
            raise ValueError(f"options has {name!r}, which is no option of Inductor (torch._inductor.list_options()).")
    return {**(modes[mode] if mode else {}), **options}


def has_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor records CUDA graphs with that config. `triton.cudagraphs` seen in 2.9 to 2.15."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def keep_sources(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Tell of a copy's inputs what Dynamo told of the original's: where they come from.

    AOTAutograd takes the inputs of a graph that tells it for what Dynamo says they are, and those of another graph for
    tensors that lie elsewhere in every call: CUDA graphs would copy each parameter in each step.
    `_param_name_to_source` and `_dynamo_source` seen in 2.9 to 2.15.
    """
    if not hasattr(source, "_param_name_to_source"):
        return
    known = {node.name: getattr(node, "_dynamo_source", None) for node in source.graph.find_nodes(op="placeholder")}
    for node in target.graph.find_nodes(op="placeholder"):
        node._dynamo_source = known.get(node.name)  # type: ignore[attr-defined]
    target._param_name_to_source = source._param_name_to_source
    target.meta.setdefault("dynamo_compile_id", source.meta.get("dynamo_compile_id"))


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


def lookup_backend(name: str) -> Callable[..., Any]:
    """The registered Dynamo backend of that name. Seen in 2.9 to 2.15.

    Raises:
        ValueError: listing the registered names, if there is none.
    """
    from torch._dynamo import list_backends
    from torch._dynamo.backends.registry import lookup_backend as lookup
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup(name)
    except InvalidBackend:
        known = sorted(each for each in list_backends(exclude_tags=()) if not each.endswith("_TESTING_ONLY"))
        names = ", ".join(known)
        raise ValueError(f"inner={name!r} is not a registered Dynamo backend; registered are: {names}.") from None


@dataclass(frozen=True)
class CompiledFrame:
    """The Python frame that Dynamo is compiling.

    Args:
        module: the module that runs in the frame, `None` if the frame is of a function.
        first: the frame's first argument, `None` if it has none.
        modules: all modules among its local variables.
        ends: whether the frame is a module's `forward` (or `__call__`, or what follows a graph break), and the
            graph runs to its end, not to a graph break.
        begins: whether it is not what follows a graph break.
    """

    module: nn.Module | None
    first: Any
    modules: tuple[nn.Module, ...]
    ends: bool
    begins: bool = True


def compiled_frame() -> CompiledFrame:
    """The frame that Dynamo is compiling, inside a backend's call; outside of one an empty frame.

    `InstructionTranslator.current_tx` and `compile_subgraph_reason` seen in 2.9 to 2.15.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, KeyError, IndexError):
        return CompiledFrame(None, None, (), True)
    local = dict(output.root_tx.f_locals)
    modules = tuple(value for value in local.values() if isinstance(value, nn.Module))
    reason = output.compile_subgraph_reason
    code = output.root_tx.f_code
    # a helper that broke in the middle runs once a call; one that did not may run any number of times
    begins = not code.co_name.startswith("torch_dynamo_resume_in_")
    module = _running(code, local)
    is_call = code.co_name in ("forward", "__call__") or not begins or code in _codes_of_forward(module)
    first = next((local.get(name) for name in _argument_names(code)), None)
    ends = is_call and not (reason and reason.graph_break)
    return CompiledFrame(module, first, modules, ends, begins)


def _codes_of_forward(module: nn.Module | None) -> list[CodeType]:
    """The code of a module's `forward`, and of what decorators have wrapped in it."""
    function: Any = None if module is None else type(module).forward
    found = []
    while function is not None:
        if hasattr(function, "__code__"):
            found.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return found


def _running(code: CodeType, local: Mapping[str, Any] | FrameType) -> nn.Module | None:
    """The module that runs in a frame: its `self`; `None` of a function, also of one that is given modules.

    A closure in a method has that method's `self`. The hooks of accelerate and diffusers put a function in the place
    of `forward`, `new_forward(module, *args, **kwargs)`: seen in accelerate 1.15, diffusers 0.36 to 0.42.

    A frame's `f_locals` are asked for only if there is one: up to Python 3.12 they keep what they held alive.
    """
    names = _argument_names(code)
    if "self" in names or "self" in code.co_freevars:
        name = "self"
    elif names[:1] == ["module"] and "new_forward" in code.co_name:  # or what follows a graph break in it
        name = "module"
    else:
        return None
    module = (local.f_locals if isinstance(local, FrameType) else local).get(name)
    return module if isinstance(module, nn.Module) else None


def _argument_names(code: CodeType) -> list[str]:
    """A function's positional arguments, without those that Dynamo adds to a continuation's (`__`-prefixed)."""
    return [name for name in code.co_varnames[: code.co_argcount] if not name.startswith("__")]


_recompile_limit: int = torch._dynamo.config.recompile_limit  # of one model


def recompiles_of_its_own() -> dict[str, Any]:
    """Arguments of `torch.compile` by which what it compiles counts against no other call's recompile limit.

    Dynamo counts by code object, and the models of a class have one `forward`. `isolate_recompiles` seen in 2.13; where
    it is missing (2.9), the limit is raised by what one model may have.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"isolate_recompiles": True}
    torch._dynamo.config.recompile_limit += _recompile_limit
    return {}


def calling_modules() -> list[nn.Module]:
    """The modules whose methods are running on this thread's Python stack, innermost first.

    While Dynamo compiles a frame, the stack below the compiler holds the calls that led to it. Wrappers that
    `torch.compile` puts around a module are left out, and so are modules that a function is only given.
    """
    from torch._dynamo.eval_frame import OptimizedModule  # seen in 2.9 to 2.15

    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _running(frame.f_code, frame)
        is_wrapper = isinstance(module, (OptimizedModule, fx.GraphModule))
        if module is not None and not is_wrapper and not any(module is other for other in modules):
            modules.append(module)
        frame = frame.f_back
    return modules


def calling_argument(names: Sequence[str]) -> Any:
    """The argument called one of `names` that the outermost running module was called with, `None` if none was.

    A function that is given a model is none of its methods: its `timesteps` are those of a whole generation.
    """
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _running(frame.f_code, frame)
        if module is not None:
            given = _arguments(frame, module)
            found = next((given[name] for name in names if given.get(name) is not None), found)
        frame = frame.f_back
    return found


def _arguments(frame: FrameType, module: nn.Module) -> dict[str, Any]:
    """The arguments of a method's call by name; those in its `*args` by the names that `module.forward` has."""
    code, local = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    given = {name: local.get(name) for name in code.co_varnames[:count]}
    if code.co_flags & inspect.CO_VARARGS:
        positional = list(inspect.signature(module.forward).parameters)[code.co_argcount - 1 :]
        given.update(zip(positional, local.get(code.co_varnames[count], ()), strict=False))
        count += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        given.update(local.get(code.co_varnames[count], {}))
    return given


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


def compiled_call() -> int:
    """A number that the running call of compiled code has, or the step that `cudagraph_mark_step_begin` began.

    CUDA graphs overwrite what those of other calls returned. `CUDAGraphTreeManager` seen in 2.9 and 2.13.
    """
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    return CUDAGraphTreeManager.get_curr_generation()


def inputs_that_are_state() -> tuple[int, ...]:
    """Positions of the parameters and buffers among the inputs of a graph that AOTAutograd is having compiled.

    It renames the inputs that Dynamo gave it, and hands fake ones on. `TracingContext.fw_metadata`, which outside of
    its call is `None`, and `static_input_indices` seen in 2.9 to 2.15.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return tuple(metadata.static_input_indices or ()) if metadata is not None else ()


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
