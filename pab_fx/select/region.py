"""A region: nodes of a graph whose outputs are kept and reused, one call of an attention or of a feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..policy.when import Rule

Assign = Callable[[str], tuple[str, Rule | None, str]]
"""Role, rule (`None` to leave alone) and the reason for an attention or feed-forward of that name."""


@dataclass(frozen=True)
class Region:
    """Nodes whose outputs are broadcast together.

    Args:
        name: qualified name of the attention or feed-forward; for one that is no module, of its core node.
        module_id: the same for all calls of one module in this graph.
        role: "spatial", "temporal", "cross" or "mlp".
        rule: when it reuses; `None` if the config leaves it alone.
        why: why it has that role.
        nodes: the region's nodes in graph order.
        outputs: those of them whose tensors are kept.
        replayed: views of the outputs that are used inside and outside; outside they are to be taken again.
        unsafe: why it is computed in every step although it has a rule; `None` if it can be broadcast.
        note: something a user should know of it.
        assign: role, rule and reason for a name: where the frame is one of several blocks of a class, each of
            them may run this graph, and has a role of its own.
        relative: the name within that block, `None` where the frame is the model's own.
    """

    name: str
    module_id: str
    role: str
    rule: Rule | None
    why: str
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...] = ()
    replayed: tuple[fx.Node, ...] = ()
    unsafe: str | None = None
    note: str | None = None
    assign: Assign | None = None
    relative: str | None = None

    @property
    def is_broadcast(self) -> bool:
        """Whether the rewrite makes this region conditional."""
        return self.rule is not None and self.unsafe is None
