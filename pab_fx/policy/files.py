"""Policies as JSON, for files and for options that are plain data; nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .change import Change, ModulatedInput, Output
from .checks import check_fields, is_iterable
from .how import Hermite, Last, RatedResidual, Residual, Taylor
from .lists import Magnitude, Steps
from .policy import Policy
from .when import AfterTimesteps, Every, SkipRange
from .where import Attentions, Blocks, FeedForwards, Model

KINDS: Mapping[str, tuple[type, ...]] = {
    "where": (Attentions, FeedForwards, Blocks, Model),
    "when": (SkipRange, AfterTimesteps, Every, Steps, Magnitude, Change),
    "how": (Last, Residual, RatedResidual, Taylor, Hermite),
}
SIGNALS = {**KINDS, "of": (ModulatedInput, Output)}
"""What a field may hold."""


def save_policies(policies: Policy | Sequence[Policy], path: str | PathLike[str]) -> None:
    """Write policies as JSON, for `load_policies`.

    Args:
        policies: one or several, of rules and hows that `pab_fx` has; one of your own is code, and has no JSON.
        path: the file.

    Raises:
        OSError: if the file cannot be written.
        ValueError: for a policy that has no JSON, naming it.

    Example:
        >>> from pab_fx import Attentions, Every
        >>> save_policies([Policy(Attentions("spatial"), Every(3))], "every-3rd.json")  # doctest: +SKIP
    """
    if isinstance(policies, Policy):
        policies = (policies,)
    if not is_iterable(policies) or not policies or not all(isinstance(each, Policy) for each in policies):
        raise ValueError(f"save_policies takes policies, got {policies!r}; those of a PABConfig are its policies().")
    Path(path).write_text(json.dumps(as_json(policies), indent=2) + "\n", encoding="utf-8")


def load_policies(path: str | PathLike[str]) -> tuple[Policy, ...]:
    """Policies from a JSON file, as `save_policies` writes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no text
        raise ValueError(f"{path} is no JSON: {error}") from None
    try:
        return of_json(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def as_json(policies: Sequence[Policy]) -> list[dict[str, Any]]:
    """Policies as JSON has them.

    Raises:
        ValueError: for a part that has no JSON, naming it.

    Example:
        >>> as_json([Policy(FeedForwards((0, 1)), SkipRange(2))])[0]["where"]
        {'kind': 'FeedForwards', 'blocks': [0, 1]}
    """
    return [{part: _part(part, getattr(policy, part)) for part in KINDS} for policy in policies]


def _part(part: str, given: Any) -> dict[str, Any] | None:
    if given is None and part == "when":
        return None
    if type(given) not in SIGNALS[part]:
        names = ", ".join(kind.__name__ for kind in SIGNALS[part])
        raise ValueError(f"{part}={given!r} is code, and has no JSON; what has is {names}.")
    changed = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    changed = {name: value for name, value in changed.items() if value != _default(type(given), name)}
    return {"kind": type(given).__name__, **json.loads(json.dumps(changed, default=_value))}


def _default(kind: type, name: str) -> Any:
    found = next(field for field in dataclasses.fields(kind) if field.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def _value(given: Any) -> Any:
    for part, kinds in SIGNALS.items():  # what another one forecasts, whose change it looks at
        if type(given) in kinds:
            return _part(part, given)
    if not isinstance(given, torch.dtype):
        raise ValueError(f"{given!r} has no JSON.")
    return str(given).removeprefix("torch.")


def of_json(found: Any) -> tuple[Policy, ...]:
    """The inverse of `as_json`.

    Raises:
        ValueError: for something else.
    """
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"policies must be a list of objects with where, when and how, got {found!r}.")
    return tuple(map(_policy, found))


def _policy(found: Any) -> Policy:
    if not isinstance(found, Mapping) or not {"where", "when"} <= found.keys() <= KINDS.keys():
        raise ValueError(f"a policy must be an object with where, when and how, got {found!r}.")
    return Policy(**{part: _made(part, given) for part, given in found.items()})


def _made(part: str, found: Any) -> Any:
    if found is None and part == "when":
        return None
    kinds = {kind.__name__: kind for kind in SIGNALS[part]}
    if not isinstance(found, Mapping) or found.get("kind") not in kinds:
        raise ValueError(f"{part} must be an object whose kind is one of {', '.join(kinds)}, got {found!r}.")
    fields = {name: _read(value) for name, value in found.items() if name != "kind"}
    kind = kinds[found["kind"]]
    check_fields(f"{part} {found['kind']}", fields, kind)
    try:
        return kind(**fields)
    except TypeError as error:  # a field is missing
        raise ValueError(f"{part} {found['kind']}: {error}.") from None


def _read(value: Any) -> Any:
    """A field's value: lists as tuples, an object as the part of a policy that it is."""
    if isinstance(value, Mapping):
        names = {kind.__name__: part for part, kinds in SIGNALS.items() for kind in kinds}
        return _made(names.get(str(value.get("kind")), "how"), value)
    return tuple(map(_read, value)) if isinstance(value, list) else value
