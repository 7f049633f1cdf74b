"""Does it work here? Versions, devices, compilers, and a short generation compared with diffusers' hooks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import nn

from .enable import enable
from .policy.config import PABConfig
from .report.report import Report

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


@dataclass(frozen=True)
class Diagnosis:
    """What `pab-fx doctor` found.

    Args:
        checks: in order.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.ok is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


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
    from .testing.hooked import Clock, Hooked
    from .testing.specs import AttentionSpec, Schedule, Site, TransformerSpec

    kinds = ("self", "temporal", "cross")
    spec = TransformerSpec(tuple(map(AttentionSpec, kinds)), (tuple(Site(i) for i in range(len(kinds))),))
    model, clock, begin = spec.build(), Clock(), time.perf_counter()
    config = Schedule(ranges=(2, 2, 2)).config(clock)
    expected = _generated(Hooked(model, config), spec, clock)
    plain = _generated(model, spec, clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with enable(model, config, inner=inner) as pab:
            found = _generated(model, spec, clock)
            reused = pab.report().reused
    apart = float(
        torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]).max()
    )
    if not reused or all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True)):
        raise RuntimeError("no attention was reused: please report this, with the versions above.")
    if not apart <= tolerance:  # which a NaN is not
        raise RuntimeError(f"outputs differ from those of diffusers' hooks by {apart:.1e}: please report this.")
    equal = "equal to diffusers' hooks to the bit" if not tolerance else f"within {apart:.0e} of diffusers' hooks"
    return f"{len(TIMESTEPS)} steps, {reused} attentions reused, {equal}, {time.perf_counter() - begin:.0f} s"


def _generated(model: Any, spec: Any, clock: Any) -> list[torch.Tensor]:
    outputs = []
    with torch.no_grad():
        for seed, clock.t in enumerate(TIMESTEPS):
            outputs += [each.clone() for each in model(*spec.inputs(clock.t, seed))]
    return outputs


# --------------------------------------------------------------------------------------------- what of a model


def broadcast_of(model: nn.Module, kwargs: Any, config: PABConfig) -> Report:
    """What a config with a range for every role would broadcast of a model.

    Args:
        model: the model.
        kwargs: keyword arguments of a call.
        config: for the callback that tells its timestep.
    """
    from .explain import explain

    ranges = PABConfig(2, 2, 2, current_timestep_callback=config.current_timestep_callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return explain(model, kwargs, ranges, rounds=0)
