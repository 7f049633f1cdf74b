"""What a search chooses from: groups of modules that share a rule, and for each of them a range and a window."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..policy.config import LayerBroadcast, MLPBroadcast, PABConfig
from ..policy.policy import assigned
from ..policy.when import AfterTimesteps, Rule, SkipRange, reused_calls
from ..policy.where import ATTENTION_ROLES, ROLES, block_index
from .changes import ModuleChanges


@dataclass(frozen=True)
class Option:
    """A skip range and an open window of timesteps `(low, high)`."""

    skip_range: int
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Modules of one role that share a rule.

    Args:
        role: their role.
        label: what the group is called, "spatial" or "spatial 1 of 2".
        modules: what was measured of each; never empty.
    """

    role: str
    label: str
    modules: tuple[ModuleChanges, ...]

    @property
    def plans(self) -> tuple[tuple[float, ...], ...]:
        """The timesteps of the modules' calls; several where models take turns, one after the other."""
        return tuple(sorted({module.timesteps for module in self.modules}, reverse=True))

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Those of the whole generation."""
        return tuple(t for plan in self.plans for t in plan)

    @property
    def names(self) -> frozenset[str]:
        """Qualified names of the modules."""
        return frozenset(module.name for module in self.modules)

    def rule(self, option: Option) -> Rule:
        """When the modules reuse under an option.

        Feed-forwards go by lists of timesteps: every `skip_range`-th step keeps for those that follow, as long as the
        next one is inside the window.
        """
        if self.role != "mlp":
            return SkipRange(option.skip_range, option.low, option.high)
        return AfterTimesteps(tuple((t, option.skip_range - 1) for t in self.kept_timesteps(option)))

    def kept_timesteps(self, option: Option) -> tuple[float, ...]:
        """The timesteps after which feed-forwards are reused."""
        pairs = [pair for plan in self.plans for pair in list(itertools.pairwise(plan))[:: option.skip_range]]
        return tuple(t for t, following in pairs if option.low < following < option.high)

    def reuses(self, option: Option | None) -> tuple[bool, ...]:
        """For each step of the generation whether the modules reuse."""
        if option is None:
            return (False,) * len(self.timesteps)
        return tuple(reuse for plan in self.plans for reuse in reused_calls(self.rule(option), plan))

    def change(self, step: int, lag: int) -> float:
        """How much an output of that step differs from the one `lag` steps before, mean over modules."""
        for plan in self.plans:
            if step < len(plan):
                modules = [module for module in self.modules if module.timesteps == plan]
                return sum(module.at(step, lag) for module in modules) / len(modules)
            step -= len(plan)
        raise IndexError(f"a generation has {len(self.timesteps)} steps.")


Setting = tuple[Option | None, ...]
"""An option for each group, `None` to leave it alone."""


def groups_of(changes: Sequence[ModuleChanges], layer_groups: int = 1) -> tuple[Group, ...]:
    """The modules by role, and those of a role in up to `layer_groups` groups, from the calmest layers on.

    Layers whose outputs change alike go by one rule: each further group multiplies the sets of reusing modules, and a
    set is a graph to compile. Feed-forwards of one block stay together, since a config tells them by their block.

    Example:
        >>> measured = [
        ...     ModuleChanges(f"blocks.{i}.attn", "spatial", (900.0, 500.0), ((), (i / 10,))) for i in (2, 1, 4, 3)
        ... ]
        >>> [sorted(group.names) for group in groups_of(measured, layer_groups=2)]
        [['blocks.1.attn', 'blocks.2.attn'], ['blocks.3.attn', 'blocks.4.attn']]
    """
    groups = []
    for role in ROLES:
        layers = _layers(role, [each for each in changes if each.role == role])
        count = min(layer_groups, len(layers))
        for i in range(count):
            some = layers[i * len(layers) // count : (i + 1) * len(layers) // count]
            modules = tuple(module for layer in some for module in layer)
            groups.append(Group(role, role if count == 1 else f"{role} {i + 1} of {count}", modules))
    return tuple(groups)


def _layers(role: str, modules: Sequence[ModuleChanges]) -> list[list[ModuleChanges]]:
    """What can be told apart by a config, the calmest first."""
    alike: dict[Any, list[ModuleChanges]] = {}
    for module in modules:
        alike.setdefault(block_index(module.name) if role == "mlp" else module.name, []).append(module)
    return sorted(alike.values(), key=lambda layer: sum(module.mean for module in layer) / len(layer))


def segments_of(steps: int, count: int) -> tuple[tuple[int, int], ...]:
    """The steps of a generation but the first, which nothing can reuse, in up to `count` stretches `(begin, end)`.

    Each has two steps at least, so that one of them may reuse.

    Example:
        >>> segments_of(steps=50, count=4)
        ((1, 13), (13, 25), (25, 38), (38, 50))
    """
    count = max(1, min(count, (steps - 1) // 2))
    edges = [1 + round(i * (steps - 1) / count) for i in range(count + 1)]
    return tuple(itertools.pairwise(edges))


def window(timesteps: Sequence[float], begin: int, end: int) -> tuple[float, float]:
    """The open window of exactly the steps from `begin` (1 or more) up to, but without, `end`.

    Example:
        >>> window((980.0, 960.0, 940.0, 920.0), 1, 3)
        (930, 970)
    """
    high = _between(timesteps[begin], timesteps[begin - 1])
    if end < len(timesteps):
        return _between(timesteps[end], timesteps[end - 1]), high
    return (0 if timesteps[-1] > 0 else timesteps[-1] - 1), high


def _between(low: float, high: float) -> float:
    """A number between two, a whole one if there is one near the middle."""
    middle = (low + high) / 2
    return round(middle) if low < round(middle) < high else middle


def options_of(group: Group, ranges: Sequence[int], segments: Sequence[tuple[int, int]]) -> tuple[Option | None, ...]:
    """The options of a group: none, and every range in every window of neighbouring segments.

    Of options by which the same steps reuse it has one.
    """
    found: dict[tuple[bool, ...], Option | None] = {group.reuses(None): None}
    for skip_range in ranges:
        for first, last in itertools.combinations_with_replacement(segments, 2):
            option = Option(skip_range, *window(group.timesteps, first[0], last[1]))
            found.setdefault(group.reuses(option), option)
    return tuple(found.values())


def config_of(groups: Sequence[Group], setting: Setting, base: PABConfig) -> PABConfig:
    """The config of a setting: what most modules of a role have is the role's, the others are its exceptions.

    Args:
        groups: the groups.
        setting: an option for each of them; not all `None`.
        base: where identifiers and the timestep callback come from.
    """
    fields: dict[str, Any] = {"current_timestep_callback": base.current_timestep_callback}
    layers = []
    for role in ATTENTION_ROLES:
        fields[f"{role}_attention_block_identifiers"] = base.identifiers(role)
        of_role = [(group, option) for group, option in zip(groups, setting, strict=True) if group.role == role]
        if not of_role:
            continue
        options = [option for _, option in of_role]
        usual = max(options, key=options.count)
        if usual is not None:
            fields[f"{role}_attention_block_skip_range"] = usual.skip_range
            fields[f"{role}_attention_timestep_skip_range"] = (usual.low, usual.high)
        layers += [_exception(group, option) for group, option in of_role if option != usual]
    mlp = [
        MLPBroadcast(group.kept_timesteps(option), _blocks(groups, group), option.skip_range - 1)
        for group, option in zip(groups, setting, strict=True)
        if group.role == "mlp" and option is not None
    ]
    return PABConfig(layers=layers or None, mlp=mlp or None, **fields)


def _exception(group: Group, option: Option | None) -> LayerBroadcast:
    names = tuple(f"^{re.escape(name)}$" for name in sorted(group.names))
    if option is None:
        return LayerBroadcast(names)
    return LayerBroadcast(names, option.skip_range, (option.low, option.high))


def _blocks(groups: Sequence[Group], group: Group) -> tuple[int, ...] | None:
    """The blocks of feed-forwards that a group has, `None` for every block."""
    if all(other is group for other in groups if other.role == "mlp"):
        return None
    indices = {block_index(name) for name in group.names}
    return tuple(sorted(index for index in indices if index is not None))


def rule_of(config: PABConfig, role: str, name: str) -> Rule | None:
    """When a part of that role and qualified name reuses; `None` if the config leaves it alone.

    Example:
        >>> rule_of(PABConfig.preset("cogvideox"), "spatial", "transformer_blocks.0.attn1")
        SkipRange(skip_range=2, low=100, high=850)
    """
    policy = assigned(config.policies(), role, name)[1]
    return None if policy is None else policy.when


def reused_modules(config: PABConfig, modules: Sequence[ModuleChanges]) -> dict[ModuleChanges, tuple[bool, ...]]:
    """For each module and each of its calls whether a config lets it reuse."""
    rules = {module: rule_of(config, module.role, module.name) for module in modules}
    return {
        module: (False,) * len(module.timesteps) if rule is None else reused_calls(rule, module.timesteps)
        for module, rule in rules.items()
    }


def graphs_of(config: PABConfig, modules: Sequence[ModuleChanges]) -> int:
    """How many sets of reusing modules occur in a generation: as many graphs are compiled with "specialize"."""
    reuses = reused_modules(config, modules)
    of_timestep: dict[float, set[str]] = {}
    for module, plan in reuses.items():
        for t, reuse in zip(module.timesteps, plan, strict=True):
            of_timestep.setdefault(t, set()).update({module.name} if reuse else ())
    return len(set(map(frozenset, of_timestep.values())))


def at_own_timesteps(config: PABConfig, timesteps: Sequence[float]) -> PABConfig:
    """A config whose feed-forward timesteps are moved to the nearest ones of a generation, where they count."""
    mlp = [
        MLPBroadcast(
            tuple(dict.fromkeys(min(timesteps, key=lambda t: abs(t - listed)) for listed in each.timesteps)),
            each.blocks,
            each.skip_count,
        )
        for each in config.mlp
    ]
    return dataclasses.replace(config, mlp=mlp or None)
