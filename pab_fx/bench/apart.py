"""What keeps contenders apart: they share weights, but no modules, no compiler and no code that Dynamo counts."""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from ..options import inner_compiler, records_cuda_graphs


class Inner(NamedTuple):
    """The compiler that all contenders have.

    Args:
        name: of a Dynamo backend, or one.
        mode: Inductor's.
    """

    name: str | Callable[..., Any]
    mode: str | None = None


class CountingCompiler:
    """An inner compiler that counts its graphs. As a backend, what it compiles is shared with no other contender."""

    def __init__(self, inner: Inner) -> None:
        self._compile = inner_compiler(*inner, None)
        self.records_graphs = records_cuda_graphs(*inner, None)
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        self.graphs += 1
        compiled: Callable[..., Any] = self._compile(gm, list(example_inputs))
        return compiled


def sharing_weights(model: nn.Module) -> Any:
    """A copy of a model with modules of its own and the same parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def give_own_code(*modules: nn.Module) -> None:
    """Let modules run a copy of their class's code: one copy for all that are of one class."""
    for cls in {type(module) for module in modules}:
        own = type(cls.__name__, (cls,), {"forward": _copy_of_code(cls.forward), "__module__": cls.__module__})
        for module in modules:
            if type(module) is cls:
                module.__class__ = own


def _copy_of_code(function: Any) -> Any:
    """A function, and those that it wraps, with code objects of their own."""
    cells = [
        types.CellType(_copy_of_code(cell.cell_contents)) if inspect.isfunction(cell.cell_contents) else cell
        for cell in function.__closure__ or ()
    ]
    code = function.__code__.replace()
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
