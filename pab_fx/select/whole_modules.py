"""Whole modules of certain classes or names, as hooks would wrap them: the outermost of nested ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from ..policy.policy import Policy
from ..policy.where import MODULES, Modules, NamedModules
from .region import Assign, Region
from .sequences import reads_another_sequence
from .view import View, uncallable


def whole_modules(view: View, assign: Assign, are: Callable[[type | None], bool]) -> list[Region]:
    """A region for each call of such a module; those that a policy is for come first.

    Args:
        view: the graph.
        assign: gives role, policy and reason for the kind of a module, "cross" or "spatial".
        are: tells a class of such modules.
    """
    regions = []
    for call, nodes in view.sites.items():
        if not are(call.cls):
            continue
        if call.module is not None:
            is_cross = bool(getattr(call.module, "is_cross_attention", False))
            why = f"is_cross_attention is {is_cross}"
        else:
            inside = [view.cores[node] for node in nodes if node in view.cores]
            is_cross = bool(inside) and all(reads_another_sequence(core, view.acts, view.cores) for core in inside)
            why = "keys and values come from " + ("another sequence" if is_cross else "the queries' sequence")
        kind = "cross" if is_cross else "spatial"
        regions.append(Region.of(call.name, call.module_id, assign, kind, why, nodes, uncallable(call, view.names)))
    return sorted(regions, key=lambda region: region.policy is None)


def named_modules(view: View, assign: Assign, wanted: Sequence[NamedModules]) -> list[Region]:
    """A region for each call of a module whose name is asked for; other arguments as for `whole_modules`.

    Raises:
        ValueError: if one of them lies inside of another: hooks would count the inner one's calls by the outer one's.
    """
    regions: list[Region] = []
    around: dict[fx.Node, str] = {}
    for call, nodes in view.sites.items():
        if not call.name or not any(where.takes(MODULES, call.name) for where in wanted):
            continue
        outer = next((around[node] for node in nodes if node in around), None)
        if outer is not None:
            raise ValueError(f"{call.name} lies inside of {outer}, and the config names both: name one of them.")
        around.update(dict.fromkeys(nodes, call.name))
        why = "the config names it"
        regions.append(Region.of(call.name, call.module_id, assign, MODULES, why, nodes, uncallable(call, view.names)))
    return regions


def classes_of(policies: Sequence[Policy]) -> list[Callable[[type | None], bool]]:
    """What tells the classes that these policies are for, each once."""
    return list(dict.fromkeys(policy.where.are for policy in policies if isinstance(policy.where, Modules)))
