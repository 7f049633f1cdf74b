"""Pyramid Attention Broadcast as a torch.compile graph transformation.

    import torch, pab_fx
    model = torch.compile(model, backend=pab_fx.pab_backend)

The way of a graph: `tag` finds attention regions and their roles, `rewrite` makes them conditional,
`specialize` decides conditions, `lift` makes the state explicit, `runtime` counts and decides at each call.
"""

from ._diffusers import cache_context
from .backend import PABBackend, pab_backend
from .calibrate import calibrate
from .config import LayerBroadcast, MLPBroadcast, PABConfig
from .enable import PAB, disable, enable
from .explain import explain
from .export import export
from .rewrite import rewrite
from .specialize import specialize

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
