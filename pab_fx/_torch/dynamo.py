"""Private interfaces of Dynamo: frames that run, and frames that it compiles."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

from ..spelling import instead_of


def compile_lock() -> contextlib.AbstractContextManager[Any]:
    """Dynamo's lock: what holds it compiles alone, in a frame or later; a thread may take it again.

    `convert_frame.compile_lock`, an `RLock`, seen in 2.9 and 2.13.
    """
    from torch._dynamo import convert_frame

    return convert_frame.compile_lock


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
        said = instead_of(name, known, "registered are")
        raise ValueError(f"inner={name!r} is not a registered Dynamo backend: {said}") from None


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
