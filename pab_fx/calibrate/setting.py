"""What there is to choose from: methods (where, and how what is kept is read), and the steps that compute."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..policy.how import Hermite, How, Last, Residual, Taylor
from ..policy.lists import Steps
from ..policy.policy import Policy
from ..policy.where import ATTENTION_ROLES, BLOCKS, MLP, MODEL, Attentions, Blocks, FeedForwards, Model, Where

KINDS = ("attentions", "blocks", "model")
"""Of parts: feed-forwards go with attentions."""


def kind_of(role: str) -> str:
    """The kind of a part by its role."""
    return role if role in (BLOCKS, MODEL) else "attentions"


@dataclass(frozen=True)
class Part:
    """A part of a method.

    Args:
        where: the part of the model.
        how: how what is kept of it is read.
        thin: it computes in every `thin`-th of the listed steps, and in the first three of them.
    """

    where: Where
    how: How
    thin: int = 1


@dataclass(frozen=True)
class Method:
    """Where and how, without when.

    Args:
        label: what it is called.
        parts: outer ones first; all go by one list of steps.
    """

    label: str
    parts: tuple[Part, ...]

    def policies(self, compute: tuple[int, ...], of: int) -> tuple[Policy, ...]:
        """The policies by which the listed steps compute, in a generation of `of` steps.

        Example:
            >>> method = Method("blocks", (Part(Blocks(), Residual()),))
            >>> [policy.describe() for policy in method.policies((0, 2), of=4)]
            ['computed in 2 of 4 steps: 0, 2, as a residual']
        """
        return tuple(Policy(part.where, Steps(thinned(compute, part.thin), of), part.how) for part in self.parts)


@dataclass(frozen=True)
class Setting:
    """A method and when it computes.

    Args:
        method: where and how.
        compute: the steps that compute, in order.
        of: of how many.
    """

    method: Method
    compute: tuple[int, ...]
    of: int

    @property
    def policies(self) -> tuple[Policy, ...]:
        """It, for `pab_fx.enable`."""
        return self.method.policies(self.compute, self.of)

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.method.label}, {len(self.compute)} of {self.of} steps"


def thinned(compute: tuple[int, ...], thin: int) -> tuple[int, ...]:
    """The first three steps of a list, and every `thin`-th of the others.

    Example:
        >>> thinned((0, 1, 2, 5, 8, 11, 14), 2)
        (0, 1, 2, 8, 14)
    """
    return compute[:3] + compute[3:][thin - 1 :: thin]


def methods(roles: Collection[str]) -> tuple[Method, ...]:
    """All that suit a model in which parts of these roles were found.

    Blocks and the whole model are kept as residuals, attentions and feed-forwards as outputs; each is read as kept, or
    forecast to order 1 or 2, or by Hermite polynomials.
    """
    found: list[Method] = []
    has_attentions = any(role in roles for role in ATTENTION_ROLES)
    for of, outer, inner in (
        ("as kept", Residual(), Last()),
        ("order 1", Taylor(1, of=Residual()), Taylor(1)),
        ("order 2", Taylor(2, of=Residual()), Taylor(2)),
        ("Hermite, order 2", Hermite(2, of=Residual()), Hermite(2)),
    ):
        attentions = (Part(Attentions(), inner),) if has_attentions else ()
        feed_forwards = (Part(FeedForwards(), inner),) if MLP in roles else ()
        if BLOCKS in roles:
            found.append(Method(f"blocks, {of}", (Part(Blocks(), outer),)))
            if has_attentions:
                thin = (Part(Blocks(), outer), Part(Attentions(), inner, thin=2))
                found.append(Method(f"blocks and attentions, {of}", thin))
        if MODEL in roles:
            found.append(Method(f"model, {of}", (Part(Model(), outer),)))
        if attentions:
            found.append(Method(f"attentions, {of}", attentions))
        if attentions and feed_forwards:
            found.append(Method(f"attentions and feed-forwards, {of}", (*attentions, *feed_forwards)))
    return tuple(found)


def observed() -> tuple[tuple[Where, How], ...]:
    """All parts of the model that a method may be for, outer ones first, and what is looked at of them."""
    return ((Model(), Residual()), (Blocks(), Residual()), (Attentions(), Last()), (FeedForwards(), Last()))
