"""Export a model with Pyramid Attention Broadcast inside: a program that counts and broadcasts by itself.

    model, kwargs
      -> torch.export        a graph of the whole model
      -> tag, conditions     each attention becomes a cond, in functional form
      -> sink                counter, last timestep and slots are buffers; of several contexts, each has a copy
      -> strides             operands of conditions, and what their branches yield, are held to theirs
      -> torch.export        an ExportedProgram that mutates its buffers, which AOTInductor compiles into a package

No Python runs in such a package: docs/export.md calls one from C++.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .._torch.dynamo import uncompiled
from ..diffusers.configs import callback_of, policies_of
from ..graph.copies import copy_of
from ..graph.dataflow import value
from ..graph.modules import ModuleNames
from ..notices import warn
from ..passes.buffers import CONTEXT
from ..passes.conditions import insert_conditions
from ..passes.counting import TIMESTEP_NAMES, Plan, resolution
from ..passes.cut import tag_with_signals
from ..passes.form import conditionals, operands_of, with_branches
from ..passes.sink import sink_state
from ..passes.strides import fix_branch_strides, fix_operand_strides
from ..policy.when import checked_timesteps, reused_calls
from ..select.region import Region


def export(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    config: Any = None,
    *,
    args: Sequence[Any] = (),
    timesteps: Iterable[float] | None = None,
    contexts: Sequence[str] = (),
) -> torch.export.ExportedProgram:
    """Export a model so that the program broadcasts attention by itself.

    The program takes the arguments of the model and yields its outputs. How many calls there were, the last timestep
    and what is kept are its buffers. It is for the shapes, and for the numbers, strings and booleans, that it was
    exported with. Call it under `torch.no_grad()`.

    A generation begins when the model's timestep input rises. With `timesteps`, it begins after the last of them, and
    whenever the input of the first step comes: then a generation may be cut off after any step. In any case one begins
    after `program.module().pab_calls.zero_()`.

    Args:
        model: in eval mode; it is not changed, and the program shares its parameters. That it was compiled, or has PAB
            enabled, does not matter.
        kwargs: its keyword arguments for one step, the first one if there are `timesteps`, as `torch.export.export`
            takes them. The timestep is the one called `timestep`, `timesteps` or `t`: a tensor of any shape, of which
            the largest element counts.
        config: a `PABConfig` (default: spatial attention every 2nd step), diffusers'
            `PyramidAttentionBroadcastConfig`, `TaylorSeerCacheConfig`, `MagCacheConfig`, `FirstBlockCacheConfig` or
            `SeaCacheConfig`, a `Policy`, or a list. None whose how reads `scalars.weight`: there is no host to
            ask.
        args: its positional arguments.
        timesteps: of a whole generation, one for each call, on the scale of the config's windows:
            `scheduler.timesteps`. The program then takes the timestep of a step from them. Without them the model's
            input has to be on that scale and to fall; with them it may be on any, a thousandth of it for Flux.
        contexts: names of what is called in turn with one program, `("cond", "uncond")` for the branches of guidance:
            each has a state of its own, and the program takes one more keyword argument, `pab_context`, an int64
            tensor of shape [] on the CPU with the number of the context.

    Returns:
        The program, to be run (`program.module()`), saved (`torch.export.save`) or compiled
        (`torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")`).

    Raises:
        TypeError: if the model is no module.
        ValueError: for arguments that cannot be exported or broadcast; nothing has run then.

    Example:
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x, timestep):  # x: [B, S, D]
        ...         return x + torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> kwargs = {"x": torch.randn(1, 4, 8), "timestep": torch.tensor([900.0])}
        >>> module = export(Attention(), kwargs, timesteps=(900, 600, 300)).module()
        >>> for t in (900.0, 600.0, 300.0, 900.0, 600.0):
        ...     output = module(**{**kwargs, "timestep": torch.tensor([t])})
        >>> module.pab_calls  # it is in the second step of its second generation
        tensor(2., dtype=torch.float64)
    """
    policies = policies_of(config)
    timesteps, given = _checked(model, kwargs, callback_of(config), args, timesteps, contexts)
    args, kwargs = tuple(args), dict(kwargs)
    plan = Plan(timesteps, None if given is None else float(given.amax())) if timesteps is not None else None
    with torch.no_grad(), uncompiled(model):
        exported = torch.export.export(model, args, kwargs, strict=False)
        gm = copy_of(exported.module())  # type: ignore[arg-type]
        regions = tag_with_signals(gm, policies, ModuleNames.of(model))
        _check_regions(type(model).__name__, regions)
        _check_shared(regions, contexts)
        _check_scale([region for region in regions if region.is_broadcast], timesteps, given)
        sink_state(fix_branch_strides(insert_conditions(gm, regions)), plan=plan, contexts=len(contexts))
        if contexts:
            kwargs[CONTEXT] = torch.tensor(0)
        fix_operand_strides(_close_gaps(gm))
        gm.graph.lint()
        gm.recompile()
        return torch.export.export(gm, args, kwargs, strict=False)


def _close_gaps(gm: fx.GraphModule) -> fx.GraphModule:
    """Hand each `cond` tensors without gaps, in place: the strides of others cannot be held to.

    %a    = chunk(%x, 2)[0]                       %a    = chunk(%x, 2)[0]
    %cond = cond(..., (%cache, %a))        ->     %c    = contiguous(%a)
                                                  %cond = cond(..., (%cache, %c))
    """
    for graph in with_branches(gm):
        for cond, conditional in conditionals(graph).items():
            slots, others = operands_of(cond)[: len(conditional.slots)], operands_of(cond)[len(conditional.slots) :]
            cond.args = (*cond.args[:3], (*slots, *(_without_gaps(operand, cond) for operand in others)))
        graph.recompile()
    return gm


def _without_gaps(operand: fx.Node, cond: fx.Node) -> fx.Node:
    recorded = value(operand)
    if not isinstance(recorded, torch.Tensor) or recorded.stride() == torch.empty_like(recorded).stride():
        return operand
    with cond.graph.inserting_before(cond):
        closed = cond.graph.call_method("contiguous", (operand,))
    closed.meta = {**operand.meta, "val": recorded.contiguous()}
    return closed


def _checked(
    model: Any, kwargs: Any, callback: Any, args: Any, timesteps: Any, contexts: Any
) -> tuple[tuple[float, ...] | None, Any]:
    """Timesteps and the model's timestep argument (`None` if there is none), where all can be exported."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"export takes a torch.nn.Module, got {type(model).__name__}: of a pipeline, its transformer.")
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs must map the model's arguments of one step to their values, got {_kind(kwargs)}.")
    if not isinstance(args, (tuple, list)):
        raise ValueError(f"args must be a tuple of the model's positional arguments, got {_kind(args)}.")
    plan = None if timesteps is None else checked_timesteps(timesteps)
    if plan == ():
        raise ValueError("timesteps is empty: call scheduler.set_timesteps(...) before, or list one for each step.")
    if plan is None and callback is not None:
        raise ValueError(
            "config has a current_timestep_callback, and an exported program cannot call it: pass the timesteps of a "
            "generation, timesteps=scheduler.timesteps, or leave the callback out if the model is given them."
        )
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"args and kwargs are not those of {type(model).__name__}.forward: {error}.") from None
    named = {**arguments, **arguments.get("kwargs", {})}
    given = next((named[name] for name in TIMESTEP_NAMES if named.get(name) is not None), None)
    if given is not None and not isinstance(given, torch.Tensor):
        raise ValueError(f"the timestep is {given!r}, and torch.export makes a number a constant: pass a tensor.")
    if plan is None and given is None:
        raise ValueError(
            f"none of the arguments is called {', '.join(TIMESTEP_NAMES)}: pass the timesteps of a generation, "
            "timesteps=scheduler.timesteps."
        )
    if plan is not None and given is not None:
        _check_is_first(given, plan)
    _check_contexts(contexts, kwargs)
    return plan, given


def _kind(given: Any) -> str:
    """What an argument is, without the numbers of tensors."""
    return type(given).__name__ if isinstance(given, (Iterable, torch.Tensor)) else repr(given)


def _check_is_first(given: torch.Tensor, timesteps: tuple[float, ...]) -> None:
    """Raise if the given timestep is that of a later step, on one of the scales that pipelines use."""
    steps = []
    for scale in (lambda t: t, lambda t: t / 1000, lambda t: 1000 - t, lambda t: 1 - t / 1000):
        inputs = [scale(t) for t in timesteps]
        near = 2 * max(resolution(given, t) for t in inputs)
        steps += [i for i, t in enumerate(inputs) if abs(float(given.amax()) - t) <= near][:1]
    if not steps:
        warn(
            f"pab_fx: the timestep in kwargs, {float(given.amax()):g}, is none of the generation's, which begins at "
            f"{timesteps[0]:g}: a generation that was cut off ends only where exactly this one comes again. That is "
            "as it should be if these are the kwargs of the first step, on another scale than the scheduler's."
        )
    if steps and 0 not in steps:
        raise ValueError(
            f"kwargs must be those of the first step, at timestep {timesteps[0]:g}: the timestep in them, "
            f"{float(given.amax()):g}, is that of step {min(steps)}, {timesteps[min(steps)]:g}."
        )


def _check_contexts(contexts: Any, kwargs: Mapping[str, Any]) -> None:
    if isinstance(contexts, str) or not isinstance(contexts, Sequence):
        raise ValueError(f"contexts must be names, such as ('cond', 'uncond'), got {contexts!r}.")
    if any(not isinstance(name, str) for name in contexts) or len(set(contexts)) != len(contexts):
        raise ValueError(f"contexts must be names that differ, such as ('cond', 'uncond'), got {contexts!r}.")
    if contexts and CONTEXT in kwargs:
        raise ValueError(f"kwargs has {CONTEXT!r}, which is what the exported program calls its number of the context.")


def _check_regions(name: str, regions: Sequence[Region]) -> None:
    """Raise if nothing of the model of that class is broadcast; warn of what is computed in every step."""
    unsafe = [region for region in regions if region.policy is not None and region.unsafe is not None]
    reasons = "".join(f"\n  {region.name} ({region.role}): {region.unsafe}" for region in unsafe)
    if not any(region.is_broadcast for region in regions):
        idle = "".join(f"\n  {region.name} ({region.role}): {region.why}" for region in regions if not region.policy)
        raise ValueError(
            f"nothing of {name} would be broadcast:{reasons + idle or ' nothing that the config is for was found.'}"
        )
    for region in regions:
        if region.is_broadcast and not all(isinstance(s, int) for node in region.outputs for s in value(node).shape):
            where = f"{region.name} ({region.role})"
            raise ValueError(f"{where} yields a length that only the data tell: no buffer can hold it.")
    if unsafe:
        warn(f"pab_fx: computed in every step of the exported {name}:{reasons}")


def _check_shared(regions: Sequence[Region], contexts: Sequence[str]) -> None:
    rules = [region.policy.when for region in regions if region.is_broadcast and region.policy is not None]
    shared = next((rule for rule in rules if rule is not None and rule.share_decision), None)
    if shared is not None and len(contexts) > 1:
        raise ValueError(f"{shared!r}: the contexts of an exported program decide each by itself: no share_decision.")


def _check_scale(broadcast: Sequence[Region], plan: tuple[float, ...] | None, given: Any) -> None:
    """Raise if nothing is reused at these timesteps, warn if such a timestep lets one expect that."""
    rules = {region.policy.when for region in broadcast if region.policy is not None and region.policy.when is not None}
    if plan is None:
        found = [rule.mismatch(float(given.amax()), None) for rule in rules] if float(given.amax()) > 0 else []
        for why in filter(None, found):
            warn(f"pab_fx: the timestep is {float(given.amax()):g}: {why} Or pass timesteps=scheduler.timesteps.")
        return
    calls = Counter(region.module_id for region in broadcast)
    if not any(any(reused_calls(rule, plan, n)) for rule in rules for n in calls.values()):
        raise ValueError(
            f"nothing would be reused at the timesteps {', '.join(f'{t:g}' for t in plan)}: list those of a whole "
            "generation, on the scheduler's scale, 0 to 1000, and see the config's ranges and windows."
        )
