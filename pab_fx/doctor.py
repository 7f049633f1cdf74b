"""Does it work here? Versions, devices, compilers, and a short generation compared with diffusers' hooks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from packaging.requirements import Requirement

TIMESTEPS = (900.0, 700.0, 600.0, 500.0)
"""In the first everything is computed; in the second and the last everything reuses."""


NOT_INSTALLED = "pab_fx runs from a folder and is not installed"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what it is.
        ok: whether it is as it has to be; `None` for what is only said.
        found: what was found, or what is wrong and what to do.
    """

    name: str
    ok: bool | None
    found: str


def checks(inner: str = "inductor") -> Iterator[Check]:
    """Look at everything, one by one: the checks come as they are done.

    Args:
        inner: the compiler to try.
    """
    yield from versions()
    yield from devices()
    yield registration()
    yield _checked("self-test, eager", lambda: self_test("eager"))
    if inner != "eager":
        yield _checked(f"self-test, {inner}", lambda: self_test(inner, tolerance=1e-4))


def _checked(name: str, check: Callable[[], str]) -> Check:
    """A check that fails by raising. Any error counts: that something is broken is what is looked for."""
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {str(error).strip() or 'no message'}")


# ------------------------------------------------------------------------------------------------ what is there


def versions() -> Iterator[Check]:
    """Python, and every package that pab_fx needs."""
    yield Check("python", True, f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    try:
        required = importlib.metadata.requires("pab-fx") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("pab-fx", None, f"{NOT_INSTALLED}, so that what it needs is not known")
        required = ["torch", "diffusers"]
    for requirement in map(Requirement, required):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement)


def _version(requirement: Requirement) -> Check:
    name, wanted = requirement.name, requirement.specifier
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, f"it is not installed: pip install '{requirement}'")
    fits = wanted.contains(found, prereleases=True)
    return Check(name, fits, found if fits else f"{found}, but pab_fx needs {wanted}: pip install '{requirement}'")


def devices() -> Iterator[Check]:
    """The CPU, and accelerators if there are any."""
    yield Check("cpu", None, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        yield Check("accelerator", None, "none that this torch can use")
        return
    names = [_name(kind.type, i) for i in range(torch.accelerator.device_count())]
    yield _checked(kind.type, lambda: f"{', '.join(names)}; {_computes_on(kind)}")


def _name(kind: str, index: int) -> str:
    """The name of a device, for the kinds that have names."""
    module: Any = getattr(torch, kind, None)
    return str(module.get_device_name(index)) if hasattr(module, "get_device_name") else f"{kind}:{index}"


def _computes_on(device: torch.device) -> str:
    ones = torch.ones(8, 8, device=device)
    if not torch.equal((ones @ ones).cpu(), torch.full((8, 8), 8.0)):
        raise RuntimeError("a product of ones is wrong: look at the driver.")
    return "it computes"


def registration() -> Check:
    """Whether the backend can be had by its name."""
    if "pab" in torch.compiler.list_backends():
        return Check("backend", True, 'torch.compile(backend="pab") is known')
    return Check("backend", None, f"{NOT_INSTALLED}: backend=pab_fx.pab_backend works, backend='pab' does not")


# ---------------------------------------------------------------------------------------------------- self-test


def self_test(inner: str, tolerance: float = 0.0) -> str:
    """Generate a little with diffusers' hooks and with `pab_fx`, and compare.

    Args:
        inner: the compiler under it.
        tolerance: how far outputs may be apart, relative to the largest; 0 for equal to the bit.

    Returns:
        What was compared, for people.

    Raises:
        RuntimeError: if the outputs differ, or nothing was reused.
    """
    from .testing import AttentionSpec, Schedule, Site, TransformerSpec, assert_broadcasts_like

    kinds = ("self", "temporal", "cross")
    spec = TransformerSpec(tuple(map(AttentionSpec, kinds)), (tuple(Site(i) for i in range(len(kinds))),))
    config, begin = Schedule(ranges=(2, 2, 2)).config(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = assert_broadcasts_like(
                spec.build(), config, inputs=spec.inputs, generations=[TIMESTEPS], tolerance=tolerance, inner=inner
            )
        except AssertionError as error:
            said = str(error).partition("\n")[0]
            raise RuntimeError(
                f"outputs or what is reused differ from those of diffusers' hooks: {said} Please report this, with the "
                "versions above."
            ) from None
    equal = "equal to diffusers' hooks to the bit" if not tolerance else f"within {tolerance:.0e} of diffusers' hooks"
    reused = sum(n for step in found.steps for (_, is_reused), n in (step.counts or {}).items() if is_reused)
    return f"{len(TIMESTEPS)} steps, {reused} attentions reused, {equal}, {time.perf_counter() - begin:.0f} s"
