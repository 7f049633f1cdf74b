"""Which modules run, or are being compiled, on this thread's Python stack, and what they are called in their model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import calling_modules, compiled_frame
from ..graph.modules import ModuleNames, all_names


def running_modules() -> list[nn.Module]:
    """The outermost module that is running or being compiled, if any."""
    return [*calling_modules()[-1:]] or [*compiled_frame().modules[:1]]


def name_of_caller(roots: Sequence[nn.Module]) -> str | None:
    """Qualified name of the innermost running module, in the one of `roots` around it or in the outermost model."""
    callers = calling_modules()
    around = [module for module in callers if any(part is callers[0] for part in module.modules())]
    model = next((module for module in around if any(module is root for root in roots)), around[-1] if around else None)
    return next((name for name, module in model.named_modules() if module is callers[0]), None) if model else None


def module_names(roots: Sequence[nn.Module]) -> ModuleNames:
    """Names for the frame that Dynamo is compiling: in the one of `roots` around it, or in the outermost model.

    Args:
        roots: models that are known to be whole.
    """
    frame, callers = compiled_frame(), calling_modules()
    own, ends = frame.receiver, frame.ends
    if not isinstance(own, nn.Module):
        # a function: of a module that is being called (an attention's processor), or around a model
        if not callers:
            return ModuleNames.of(frame.modules[0]) if frame.modules else ModuleNames()
        ends = ends and own is not None and own is getattr(callers[0], "processor", None)
        own = callers[0]
    around = [module for module in callers if any(part is own for part in module.modules())]
    outermost = around[-1] if around else own
    model = next((m for m in [own, *around] if any(m is root for root in roots)), outermost)
    return ModuleNames.of(model, dict.fromkeys([*reversed(around), own]), ends)


class TiedParameters:
    """The parameters that stand in several places of their model, and so do not tell which part of it runs.

    A parameter is looked up in the model that runs when it is first asked for.
    """

    def __init__(self) -> None:
        self._tied: Any = WeakIdKeyDictionary()

    def __contains__(self, parameter: Any) -> bool:
        if isinstance(parameter, nn.Parameter) and parameter not in self._tied:
            parts = [part for model in calling_modules()[-1:] for _, part in all_names(model)]
            places = [each for part in parts for each in part.parameters(recurse=False)]
            counts = Counter(map(id, places))
            for each in (parameter, *places):
                self._tied[each] = counts[id(each)] > 1
        return self._tied.get(parameter, False)
