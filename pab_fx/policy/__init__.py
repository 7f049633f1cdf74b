"""Where, when and how a step cache works: frozen data and pure functions.

In: what a user says, as a `PABConfig`, policies or JSON. Out: a tuple of `Policy`. It imports nothing of the package:
no graph and no diffusers is known here.
"""

from .config import LayerBroadcast, MLPBroadcast, PABConfig
from .files import load_policies, save_policies
from .how import Hermite, How, Last, Residual, Scalars, Taylor
from .lists import Magnitude, Steps
from .policy import Policy, assigned
from .when import AfterTimesteps, Every, Progress, Rule, SkipRange, Step
from .where import ATTENTION_ROLES, ROLES, Attentions, Blocks, FeedForwards, Modules

__all__ = [
    "ATTENTION_ROLES",
    "ROLES",
    "AfterTimesteps",
    "Attentions",
    "Blocks",
    "Every",
    "FeedForwards",
    "Hermite",
    "How",
    "Last",
    "LayerBroadcast",
    "MLPBroadcast",
    "Magnitude",
    "Modules",
    "PABConfig",
    "Policy",
    "Progress",
    "Residual",
    "Rule",
    "Scalars",
    "SkipRange",
    "Step",
    "Steps",
    "Taylor",
    "assigned",
    "load_policies",
    "save_policies",
]
