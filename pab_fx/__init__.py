"""Step caches of diffusion transformers as a torch.compile graph transformation, Pyramid Attention Broadcast first.

    import torch, pab_fx
    model = torch.compile(model, backend=pab_fx.pab_backend)

The way of a graph: `policy` says where, when and how, `select` finds where, `passes` makes that conditional and decides
the conditions, `compile` has it compiled, `run` runs a call.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import PABBackend, pab_backend
    from .calibrate import calibrate
    from .enable import PAB, disable, enable, report
    from .explain import explain
    from .export.export import export
    from .export.rewrite import rewrite
    from .measured import fit_rescale, magnitude_ratios
    from .passes.specialize import specialize
    from .policy.change import Change, Computed, ModulatedInput, Output, Sigma
    from .policy.config import LayerBroadcast, MLPBroadcast, PABConfig
    from .policy.files import load_policies, save_policies
    from .policy.how import Hermite, How, Last, RatedResidual, Residual, Scalars, Taylor
    from .policy.lists import Magnitude, Steps
    from .policy.policy import Policy
    from .policy.presets import preset
    from .policy.when import AfterTimesteps, Every, Progress, Rule, SkipRange, Step
    from .policy.where import Attentions, Blocks, FeedForwards, Model
    from .run.contexts import cache_context

__all__ = [
    "PAB",
    "AfterTimesteps",
    "Attentions",
    "Blocks",
    "Change",
    "Computed",
    "Every",
    "FeedForwards",
    "Hermite",
    "How",
    "Last",
    "LayerBroadcast",
    "MLPBroadcast",
    "Magnitude",
    "Model",
    "ModulatedInput",
    "Output",
    "PABBackend",
    "PABConfig",
    "Policy",
    "Progress",
    "RatedResidual",
    "Residual",
    "Rule",
    "Scalars",
    "Sigma",
    "SkipRange",
    "Step",
    "Steps",
    "Taylor",
    "cache_context",
    "calibrate",
    "disable",
    "enable",
    "explain",
    "export",
    "fit_rescale",
    "load_policies",
    "magnitude_ratios",
    "pab_backend",
    "preset",
    "report",
    "rewrite",
    "save_policies",
    "specialize",
]
__version__ = "0.1.0"

_PLACES = {
    ".backend": ("PABBackend", "pab_backend"),
    ".calibrate": ("calibrate",),
    ".enable": ("PAB", "disable", "enable", "report"),
    ".explain": ("explain",),
    ".export.export": ("export",),
    ".export.rewrite": ("rewrite",),
    ".measured": ("fit_rescale", "magnitude_ratios"),
    ".passes.specialize": ("specialize",),
    ".policy.change": ("Change", "Computed", "ModulatedInput", "Output", "Sigma"),
    ".policy.config": ("LayerBroadcast", "MLPBroadcast", "PABConfig"),
    ".policy.files": ("load_policies", "save_policies"),
    ".policy.how": ("Hermite", "How", "Last", "RatedResidual", "Residual", "Scalars", "Taylor"),
    ".policy.lists": ("Magnitude", "Steps"),
    ".policy.policy": ("Policy",),
    ".policy.presets": ("preset",),
    ".policy.when": ("AfterTimesteps", "Every", "Progress", "Rule", "SkipRange", "Step"),
    ".policy.where": ("Attentions", "Blocks", "FeedForwards", "Model"),
    ".run.contexts": ("cache_context",),
}
"""The public names of each module. They are imported when they are asked for: the command line's help needs none."""

_PLACE = {name: module for module, names in _PLACES.items() for name in names}


class _Package(types.ModuleType):
    """Keeps public names apart from folders that are called like them, which an import sets as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in _PLACE:
            found = getattr(importlib.import_module(_PLACE[name], self.__name__), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{self.__name__}.{name}"):
            found = importlib.import_module(f".{name}", self.__name__)
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__[name] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PLACE})


sys.modules[__name__].__class__ = _Package
