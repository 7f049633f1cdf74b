"""Private interfaces of Inductor: what it is told, and how the code that it makes is changed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import fx

from ..spelling import instead_of
from . import cond_op
from .dynamo import compile_lock

ROOT = Path(__file__).parents[1]
"""The package's folder, which is called as the package."""


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
    if not inspect.isfunction(target) or not target.__module__.startswith(f"{ROOT.name}."):
        return False
    return getattr(sys.modules[target.__module__], target.__name__, None) is target


@functools.cache
def _digest() -> str:
    """Of the package's source. Where only compiled files are installed it is of this process alone."""
    files = sorted(ROOT.rglob("*.py"))
    source = b"".join(file.read_bytes() for file in files) or uuid.uuid4().bytes
    return hashlib.sha256(source).hexdigest()


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
        raise ValueError(f"mode={mode!r} is unknown: {instead_of(mode, modes, 'Inductor has')}")
    for name in options:
        if name.replace("-", "_") not in known:
            said = instead_of(name, known, "torch._inductor.list_options() has")
            raise ValueError(f"options has {name!r}, which is no option of Inductor: {said}")
    return {**(modes[mode] if mode else {}), **options}


def has_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor records CUDA graphs with that config. `triton.cudagraphs` seen in 2.9 to 2.15."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))
