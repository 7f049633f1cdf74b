"""Pyramid Attention Broadcast as a torch.compile graph transformation.

    import torch, pab_fx
    model = torch.compile(model, backend=pab_fx.pab_backend)

The way of a graph: `tag` finds attention regions and their roles, `rewrite` makes them conditional,
`specialize` decides conditions, `lift` makes the state explicit, `runtime` counts and decides at each call.
"""

from .backend import PABBackend, pab_backend
from .calibrate import calibrate
from .diffusers.hooks import cache_context
from .enable import PAB, disable, enable
from .explain import explain
from .export.export import export
from .passes.rewrite import rewrite
from .passes.specialize import specialize
from .policy.config import LayerBroadcast, MLPBroadcast, PABConfig

__all__ = [
    "PAB",
    "LayerBroadcast",
    "MLPBroadcast",
    "PABBackend",
    "PABConfig",
    "cache_context",
    "calibrate",
    "disable",
    "enable",
    "explain",
    "export",
    "pab_backend",
    "rewrite",
    "specialize",
]
__version__ = "0.1.0"
