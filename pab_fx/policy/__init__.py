"""Where, when and how a step cache works: frozen data and pure functions.

In: what a user says, as a `PABConfig`, policies or JSON. Out: a tuple of `Policy`. It imports nothing of the package:
no graph and no diffusers is known here.
"""

from .config import LayerBroadcast, MLPBroadcast, PABConfig
from .files import load_policies, save_policies
from .how import How, Last, Scalars, Taylor
from .policy import Policy, assigned
from .when import AfterTimesteps, Every, Progress, Rule, SkipRange, Step
from .where import ATTENTION_ROLES, ROLES, Attentions, FeedForwards, Modules

__all__ = [
    "ATTENTION_ROLES",
    "ROLES",
    "AfterTimesteps",
    "Attentions",
    "Every",
    "FeedForwards",
    "How",
    "Last",
    "LayerBroadcast",
    "MLPBroadcast",
    "Modules",
    "PABConfig",
    "Policy",
    "Progress",
    "Rule",
    "Scalars",
    "SkipRange",
    "Step",
    "Taylor",
    "assigned",
    "load_policies",
    "save_policies",
]
