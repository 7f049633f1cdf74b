"""Step caches of diffusion transformers as a torch.compile graph transformation, Pyramid Attention Broadcast first.

    import torch, pab_fx
    model = torch.compile(model, backend=pab_fx.pab_backend)

The way of a graph: `policy` says where, when and how, `select` finds where, `passes` makes that conditional and decides
the conditions, `compile` has it compiled, `run` runs a call.
"""

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
