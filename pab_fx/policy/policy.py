"""A policy: which parts of a model, when they reuse what was kept, and how that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .how import How, Last
from .when import Progress, Rule, Step, decided
from .where import Where


@dataclass(frozen=True)
class Policy:
    """Where, when and how a step cache works.

    Of several policies, the first that is for a part governs it. Those for parts of a part (attentions in blocks that
    are skipped as a whole) go together with that one's: where it reuses, they are neither run nor read.

    Args:
        where: `Attentions`, `FeedForwards`, `Blocks` or `Model`.
        when: a rule: `SkipRange`, `AfterTimesteps`, `Every`, `Steps`, `Magnitude`, `Change`, or one of your own; `None`
            leaves these parts alone.
        how: `Last` (the last output, as it was), `Residual` or `RatedResidual` (what the part adds), `Taylor` or
            `Hermite` (a forecast), or one of your own.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from pab_fx import Attentions, Every, Taylor
        >>> Policy(Attentions("spatial"), Every(3), Taylor(1)).describe()
        'computed every 3rd step, forecast to order 1'
    """

    where: Where
    when: Rule | None
    how: How = field(default_factory=Last)

    def __post_init__(self) -> None:
        if isinstance(self.where, type) or not (hasattr(self.where, "takes") and hasattr(self.where, "role_of")):
            raise ValueError(
                f"Policy: where must be Attentions(...), FeedForwards(...), Blocks(...) or Model(), got {self.where!r}."
            )
        if self.when is not None and not isinstance(self.when, Rule):
            raise ValueError(
                f"Policy: when must be a rule, such as SkipRange(2, 100, 800), or None, got {self.when!r}."
            )
        if not isinstance(self.how, How):
            raise ValueError(f"Policy: how must be a how, such as Last() or Taylor(1), got {self.how!r}.")
        if self.when is not None:
            _check_hashable("when", self.when)
            if self.when.by_rate and not self.how.keeps_rate:
                raise ValueError(
                    f"Policy: when={self.when!r} goes by a rate, and how={self.how!r} keeps none: RatedResidual() does."
                )
            try:
                decided(self.when, Step(1, 500.0, 50), Progress(1, 520.0))
            except Exception as error:
                raise ValueError(
                    f"Policy: when={self.when!r} decides nothing about a step, {type(error).__name__}: {error}"
                ) from error
        _check_hashable("how", self.how)

    def describe(self) -> str:
        """When and how in words."""
        if self.when is None:
            return "left alone"
        said = (self.when.describe(), self.how.describe(), "with its gate" if self.where.gated else "")
        return ", ".join(filter(None, said))


def _check_hashable(field: str, given: Any) -> None:
    try:
        hash(given)
    except TypeError:
        raise ValueError(f"Policy: {field}={given!r} is not hashable: make it a frozen dataclass.") from None


def assigned(policies: Sequence[Policy], role: str, name: str, why: str = "") -> tuple[str, Policy | None, str]:
    """The role of a part, the policy that governs it, and why it has that role.

    Args:
        policies: the first that is for the part counts.
        role: what the graph says.
        name: qualified name of the part.
        why: why the graph says so.

    Returns:
        Role, policy (`None` if it is left alone) and reason.

    Example:
        >>> from pab_fx import Attentions, SkipRange
        >>> assigned([Policy(Attentions("cross"), SkipRange(6))], "cross", "blocks.0.attn2")[1].when
        SkipRange(skip_range=6, low=100, high=800)
    """
    said = next(filter(None, (policy.where.role_of(role, name) for policy in policies)), None)
    if said is not None:
        role, why = said[0], said[1] or why
    policy = next((policy for policy in policies if policy.where.takes(role, name)), None)
    return role, policy if policy is not None and policy.when is not None else None, why
