"""Which parts of a model a policy is for, as data: what tells them in a graph is for `select/` to find.

The graph gives each part a role and a qualified name. `role_of` may give it another role, by its name; `takes` tells
whether the policy is for it. `shares_calls` tells whether all calls of a module in a step are one part with one cache,
as where hooks count them; otherwise each call is a part of its own. `gated` tells whether a part has the product with
its gate, which follows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .checks import checked_blocks, checked_flag, checked_identifiers, is_iterable

ATTENTION_ROLES = ("spatial", "temporal", "cross")
MLP, BLOCKS, MODEL, MODULES = "mlp", "blocks", "model", "modules"
UNCOND = "uncond"  # the unconditional half of a batch, in calls of the whole model
ROLES = (*ATTENTION_ROLES, MLP, BLOCKS, MODEL, MODULES, UNCOND)


@dataclass(frozen=True)
class Attentions:
    """Attentions, found by dataflow: by their role, by their name, or both.

    Keys and values that come from another sequence than the queries make an attention `cross`, a sequence axis that is
    the video's frames makes it `temporal`, everything else is `spatial`.

    Args:
        roles: of "spatial", "temporal" and "cross", one or several; `None` for all.
        names: regular expressions (`re.search`) of which one has to match the qualified name; none for every name.
        identifiers: regular expressions; an attention whose name one of them matches has the first of `roles`, whatever
            the dataflow says.
        gated: keep the product with the gate, `gate * attention(...)`, as VideoSys does for Open-Sora and Latte: then
            a step that reuses has the gate of the step that computed. Otherwise it multiplies what was kept by its own
            gate, as with diffusers' hooks. An attention without a gate is kept as it is.

    Raises:
        ValueError: for an unknown role, bad expressions, identifiers without a role, or `gated` that is no bool.

    Example:
        >>> Attentions("spatial").takes("spatial", "blocks.0.attn1")
        True
        >>> Attentions(names=(r"blocks.0.",)).takes("cross", "blocks.1.attn2")
        False
    """

    roles: tuple[str, ...] | None = None
    names: tuple[str, ...] = ()
    identifiers: tuple[str, ...] = ()
    gated: bool = False

    shares_calls = False

    def __post_init__(self) -> None:
        roles = (self.roles,) if isinstance(self.roles, str) else self.roles
        if roles is not None and (not is_iterable(roles) or not tuple(roles)):
            raise ValueError(
                f"Attentions: roles must be of {', '.join(ATTENTION_ROLES)}, or None for all, got {self.roles!r}."
            )
        for role in roles or ():
            if role not in ATTENTION_ROLES:
                raise ValueError(f"unknown role {role!r}; the attention roles are {', '.join(ATTENTION_ROLES)}.")
        object.__setattr__(self, "roles", None if roles is None else tuple(roles))
        names = (self.names,) if isinstance(self.names, str) else self.names
        object.__setattr__(self, "names", checked_identifiers("Attentions: names", names))
        object.__setattr__(self, "identifiers", checked_identifiers("Attentions: identifiers", self.identifiers))
        if self.identifiers and not self.roles:
            raise ValueError("Attentions: identifiers say which attentions have a role, so give that role.")
        checked_flag("Attentions: gated", self.gated)

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """The role of an attention of that name and why, where an identifier says it; else `None`."""
        found = next((each for each in self.identifiers if re.search(each, name)), None)
        if found is None or not self.roles or role == MLP:
            return None
        return self.roles[0], f"its name matches {found!r}"

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        is_named = not self.names or any(re.search(each, name) for each in self.names)
        return role in (self.roles or ATTENTION_ROLES) and is_named


@dataclass(frozen=True)
class FeedForwards:
    """Feed-forwards beside an attention in a numbered block: modules that project, bend and project back.

    Args:
        blocks: indices of the blocks, as they stand in the module's name (`transformer_blocks.3.ff` is 3); `None` for
            every block.

    Raises:
        ValueError: if something other than integers >= 0 is in `blocks`.

    Example:
        >>> FeedForwards(blocks=(3,)).takes("mlp", "transformer_blocks.3.ff")
        True
    """

    blocks: tuple[int, ...] | None = None

    roles = (MLP,)
    names = ()
    shares_calls = gated = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", checked_blocks("FeedForwards: a block index", self.blocks))

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """`None`: the graph alone tells a feed-forward."""
        return None

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        return role == MLP and (self.blocks is None or block_index(name) in self.blocks)


@dataclass(frozen=True)
class Blocks:
    """A range of the model's repeated blocks, all lists together in the order in which they run.

    Flux runs its double blocks, then its single ones; Latte spatial and temporal ones in turns. A step that reuses runs
    what leads up to the first block of the range and what follows the last one. What is kept are the tensors that leave
    the range: one stream, or two where image and text go side by side.

    Args:
        first, last: the range, as in a slice of the list of blocks: `Blocks(1, -1)` is all but the first and the last.
        lists: names of the model's lists of blocks; none for those found by dataflow, which count too in a model that
            has none of these.

    Raises:
        ValueError: for something other than integers and names, or a range that is always empty.

    Example:
        >>> Blocks(1, -1).takes("blocks", "blocks(1, -1)")
        True
    """

    first: int = 0
    last: int | None = None
    lists: tuple[str, ...] = ()

    roles = (BLOCKS,)
    names = ()
    shares_calls = gated = False

    def __post_init__(self) -> None:
        for name, given in (("first", self.first), ("last", self.last)):
            if (given is not None or name == "first") and (isinstance(given, bool) or not isinstance(given, int)):
                raise ValueError(f"Blocks: {name} must be an integer, as in a slice, got {given!r}.")
        is_empty = self.last is not None and (self.first < 0) == (self.last < 0) and self.first >= self.last
        if is_empty or self.last == 0:
            raise ValueError(f"Blocks: no block lies in [{self.first}:{self.last}].")
        lists = (self.lists,) if isinstance(self.lists, str) else self.lists
        if not is_iterable(lists) or not all(isinstance(name, str) for name in lists):
            raise ValueError(f"Blocks: lists must be names of the model's lists of blocks, got {self.lists!r}.")
        object.__setattr__(self, "lists", tuple(lists))

    @property
    def label(self) -> str:
        """The range, as it is named in reports."""
        return BLOCKS if self.first == 0 and self.last is None else f"{BLOCKS}({self.first}, {self.last})"

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """`None`: the graph alone tells blocks."""
        return None

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        return role == BLOCKS and name.rpartition(":")[2] == self.label


@dataclass(frozen=True)
class PassedBlocks(Blocks):
    """All blocks, as hooks skip them: they hand on what they are given.

    A residual is added where the first block begins, to the stream that becomes the output of the model. Other streams
    pass by, and what lies between two blocks runs in every step.

    Example:
        >>> PassedBlocks(lists=("transformer_blocks",)).takes("blocks", "blocks")
        True
    """


@dataclass(frozen=True)
class Model:
    """The whole call of the model: its stream goes from the sample that it is given to the prediction.

    A step that reuses runs nothing of the model. With `Residual` the prediction has to have the sample's shape; a model
    that predicts a variance too has no residual and is left alone.

    Example:
        >>> Model().takes("model", "model")
        True
    """

    roles = (MODEL,)
    names = ()
    shares_calls = gated = False

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """`None`: the graph alone tells."""
        return None

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        return role == MODEL


@dataclass(frozen=True)
class Modules:
    """Whole modules of certain classes, as a hook wraps them, the outermost of nested ones first.

    Args:
        are: tells a class of such modules.
        role: the role that they get.
        is_cross: the kind they have to have: whether the module says `is_cross_attention`, or, without the module,
            whether keys and values come from another sequence.
        identifiers: regular expressions of which one has to match the qualified name (`re.search`).
        among: regular expressions of which one has to match it too; none for every name.

    Example:
        >>> Modules(are=lambda cls: True, role="temporal", is_cross=False, identifiers=("temporal",)).role_of(
        ...     "spatial", "temporal_blocks.0.attn1"
        ... )
        ('temporal', '')
    """

    are: Callable[[type | None], bool]
    role: str
    is_cross: bool
    identifiers: tuple[str, ...]
    among: tuple[str, ...] = ()

    roles = None
    names = ()
    shares_calls, gated = True, False

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """The role of a module of that kind and name, whatever else tells it; `None` if the policy is not for it."""
        if not self._is_named(name) or (role == "cross") != self.is_cross:
            return None
        return self.role, ""

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        return role == self.role and self._is_named(name)

    def _is_named(self, name: str) -> bool:
        wanted = (self.identifiers, self.among) if self.among else (self.identifiers,)
        return all(any(re.search(each, name) for each in identifiers) for identifiers in wanted)


@dataclass(frozen=True)
class NamedModules:
    """Whole modules of certain names, as a hook wraps them.

    Args:
        identifiers: regular expressions of which one has to match all of the qualified name (`re.fullmatch`).

    Example:
        >>> NamedModules((r"^blocks.*attn",)).takes("modules", "blocks.0.attn")
        True
    """

    identifiers: tuple[str, ...]

    roles = (MODULES,)
    names = ()
    shares_calls, gated = True, False

    def role_of(self, role: str, name: str) -> tuple[str, str] | None:
        """`None`: names alone tell."""
        return None

    def takes(self, role: str, name: str) -> bool:
        """Whether the policy is for a part of that role and name."""
        return role == MODULES and any(re.fullmatch(each, name) for each in self.identifiers)


Where = Any
"""One of the classes above."""


def block_index(name: str) -> int | None:
    """The number of the block that a part of that qualified name is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
