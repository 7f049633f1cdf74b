"""Return a flat tuple, as compilers expect it.

return ((%y, %z), %slot_0)    ->    return (%y, %z, %slot_0)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .form import set_slots_returned, slots_returned


def flatten(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the output of `gm`, whose own is a flat tuple, as Dynamo makes it; in place."""
    slots = slots_returned(gm)
    set_slots_returned(gm, {})
    output = gm.graph.output_node()
    returned: Any = output.args[0]
    output.args = (tuple(returned[0]),)
    set_slots_returned(gm, slots)
    return gm
