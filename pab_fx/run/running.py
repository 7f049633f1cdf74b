"""Which modules run, or are being compiled, on this thread's Python stack, and what they are called in their model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .._torch.dynamo import calling_modules, compiled_frame
from ..graph.modules import ModuleNames, all_names


def running_modules() -> list[nn.Module]:
    """The outermost module around the one that runs, and those that a function is given that is being compiled."""
    callers, frame = calling_modules(), compiled_frame()
    outermost = _around(callers[0], callers)[-1:] if callers else []
    return [*outermost, *(frame.modules if frame.module is None else ())]


def name_of_caller(roots: Sequence[nn.Module]) -> str | None:
    """Qualified name of the innermost running module, in the one of `roots` around it or in the outermost model."""
    found = caller(roots)
    return None if found is None else found[1]


def caller(roots: Sequence[nn.Module]) -> tuple[nn.Module, str] | None:
    """The model that runs, as for `name_of_caller`, and the innermost module's name in it."""
    callers = calling_modules()
    if not callers:
        return None
    around = _around(callers[0], callers)
    model = next((module for module in around if any(module is root for root in roots)), around[-1])
    return model, next(name for name, module in model.named_modules() if module is callers[0])


def running_module(name: str, roots: Sequence[nn.Module]) -> nn.Module | None:
    """The module of that qualified name, in the running one of `roots` or in the outermost; `None` if there is none."""
    callers = calling_modules()
    around = _around(callers[0], callers) if callers else []
    model = next((module for module in around if any(module is root for root in roots)), None)
    try:
        return (model or around[-1]).get_submodule(name.partition(":")[0])
    except (AttributeError, IndexError):
        return None


def module_names(roots: Sequence[nn.Module], example_inputs: Sequence[Any]) -> ModuleNames:
    """Names for the frame that Dynamo is compiling: in the one of `roots` around it, or in the outermost model.

    Args:
        roots: models that are known to be whole.
        example_inputs: of the graph, parameters among them.
    """
    frame, callers = compiled_frame(), calling_modules()
    own, ends = frame.module, frame.ends
    if own is None:
        # a function: around a model, or of a module that is being called (an attention's processor)
        model = _most_read(frame.modules, example_inputs)
        if not callers or not (model is None or _around(model, callers)):
            return ModuleNames.of(model, begins=frame.begins) if model is not None else ModuleNames()
        own = callers[0]
        # the continuation of a processor may be left with the attention as its first argument
        ends = ends and any(frame.first is each for each in (own, getattr(own, "processor", own)))
    around = _around(own, callers)
    outermost = around[-1] if around else own
    model = next((m for m in [own, *around] if any(m is root for root in roots)), outermost)
    return ModuleNames.of(model, dict.fromkeys([*reversed(around), own]), ends, frame.begins)


def _around(own: nn.Module, callers: Sequence[nn.Module]) -> list[nn.Module]:
    """The running modules that a module is part of, innermost first."""
    return [module for module in callers if any(part is own for part in module.modules())]


def _most_read(modules: Sequence[nn.Module], example_inputs: Sequence[Any]) -> nn.Module | None:
    """The module most of whose parameters a graph reads, `None` if there are no modules."""
    read = set(map(id, example_inputs))
    return max(modules, key=lambda module: sum(id(each) in read for each in module.parameters()), default=None)


class TiedParameters:
    """The parameters that stand in several places of their model, and so do not tell which part of it runs.

    A parameter is looked up in the model that runs when it is first asked for.
    """

    def __init__(self) -> None:
        self._tied: Any = WeakIdKeyDictionary()

    def __contains__(self, parameter: Any) -> bool:
        if isinstance(parameter, nn.Parameter) and parameter not in self._tied:
            parts = [part for model in running_modules() for _, part in all_names(model)]
            places = [each for part in parts for each in part.parameters(recurse=False)]
            counts = Counter(map(id, places))
            for each in (parameter, *places):
                self._tied[each] = counts[id(each)] > 1
        return self._tied.get(parameter, False)
