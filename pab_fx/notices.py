"""What a backend tells its user while it runs: warnings, each of them once."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from types import FrameType

import torch

from .policy.policy import Policy
from .policy.where import MLP
from .select.region import Region

LIBRARIES = {"pab_fx", "torch", "diffusers", "contextlib"}


class Notices:
    """What a backend has warned of. It warns of each thing once, also where many graphs and calls come upon it."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """The warnings so far, in order."""
        return tuple(self._said.values())

    def warn_once(self, key: str, message: str) -> None:
        """Warn, the first time there is that to say."""
        if key not in self._said:
            self._said[key] = message
            warn(message)

    def warn_of_gradients(self, of_parameters: bool) -> None:
        """Warn of a graph that is captured for training: of parameters, or with frozen ones of inputs."""
        what, remedy = (
            ("parameters", "model.requires_grad_(False)")
            if of_parameters
            else (
                "inputs of the model (its parameters do not require them)",
                "pass inputs that you have called detach() on",
            )
        )
        self.warn_once(
            "grad",
            f"pab_fx: PAB is for inference, and gradients are enabled and required by {what}: the model runs without "
            f"broadcasting. Call it under torch.no_grad(), or {remedy}.",
        )

    def warn_of_other_cache(self, hook: str) -> None:
        """Warn of a model on which another of diffusers' caches, with a hook of that name, is on."""
        self.warn_once(
            "cache",
            f"pab_fx: another cache of diffusers is on (its hook {hook!r}), and the two do not mix: the model "
            "runs without broadcasting. Take that cache off, or disable PAB.",
        )

    def warn_of_nothing(self, regions: Sequence[Region]) -> None:
        """Warn that of the regions of a graph, the first ones that were found, the config broadcasts none."""
        idle = [region for region in regions if region.policy is None]
        if not idle:
            return
        found = "\n".join(f"  {region.name} ({region.role}): {region.why}" for region in idle)
        kinds = "attentions and feed-forwards" if any(region.role == "mlp" for region in idle) else "attentions"
        self.warn_once(
            "nothing", f"pab_fx: the config matches none of the {kinds} found, so nothing is reused:\n{found}"
        )

    def warn_of_several_calls(self, regions: Sequence[Region]) -> None:
        """Warn of modules that a graph calls several times: their calls are counted and kept together."""
        calls = Counter(region.module_id for region in regions)
        names = list(dict.fromkeys(region.name for region in regions if calls[region.module_id] > 1))
        if names:
            self.warn_once(
                "several calls",
                f"pab_fx: called several times in a step: {', '.join(names)}. All calls of a module are counted and "
                "kept together, as by diffusers' hooks: one may be given what another has just computed, of another "
                "input. If they are not to be, give each a module of its own, or leave these out by the role's "
                "attention_block_identifiers.",
            )

    def warn_of_no_attention(self, name: str) -> None:
        """Warn that in a whole call of the model of that class nothing was found that the config is for."""
        self.warn_once(
            "no attention",
            f"pab_fx: nothing that the config is for was found in {name}, so nothing is reused.",
        )

    def warn_of_no_capture(self, name: str) -> None:
        """Warn that Dynamo has compiled nothing of a whole call of the model of that class."""
        config = torch._dynamo.config
        self.warn_once(
            "no capture",
            f"pab_fx: Dynamo compiled nothing of {name}, which runs as it is, so nothing is reused. Compiling is "
            "switched off (torch.compiler.disable, torch.compiler.set_stance, TORCHDYNAMO_DISABLE=1), or its forward "
            "was replaced by a compiled one (model.forward = torch.compile(...): leave that out), or the code of the "
            "model was compiled as often as Dynamo allows. In that case raise torch._dynamo.config.recompile_limit "
            f"({config.recompile_limit}) and accumulated_recompile_limit ({config.accumulated_recompile_limit}), or "
            "call torch.compiler.reset().",
        )

    def warn_of_left_alone(self, names: Iterable[str]) -> None:
        """Warn of attentions of these names, if any, that are computed in every step."""
        listed = ", ".join(names)
        if listed:
            self.warn_once(
                f"left alone: {listed}",
                f"pab_fx: computed in every step, for the reason that report() gives: {listed}.",
            )

    def warn_of_whole(self, why: str) -> None:
        """Warn that the blocks of a graph are not compiled one by one."""
        self.warn_once("whole", f"pab_fx: regional=True, but a graph is compiled as a whole: {why}.")

    def warn_of_no_graph(self, name: str) -> None:
        """Warn that a model of that class, which was broadcast before, has run a call without it."""
        self.warn_once(
            "no graph",
            f"pab_fx: {name} runs without broadcasting now. Dynamo compiles a changed model (other adapters, another "
            f"shape) anew up to torch._dynamo.config.recompile_limit times ({torch._dynamo.config.recompile_limit}) "
            "and then runs it as it is: raise that limit, or call torch.compiler.reset() between generations.",
        )

    def warn_of_unmatched_roles(
        self, name: str, policies: Sequence[Policy], regions: Sequence[Region], called: AbstractSet[str]
    ) -> None:
        """Warn of roles that policies are for while others are broadcast.

        Args:
            name: the model's class, which has no such attention.
            policies: those that name roles; what goes by modules names none, and nothing is said of it.
            regions: what was found.
            called: the roles of what has been computed or reused; blocks of one graph differ in theirs.
        """
        found = {region.role for region in regions} | called
        for policy in policies if called else ():
            for role in policy.where.roles or () if policy.when is not None and not policy.where.names else ():
                if role not in found and role != MLP:
                    others = sorted({f"{region.name} ({region.role})" for region in regions})
                    shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
                    self.warn_once(
                        f"no {role}",
                        f"pab_fx: no {role} attention was found in {name}, though the config has a range for it; "
                        f"found: {shown}. If one of them is {role}, say so with {role}_attention_block_identifiers.",
                    )

    def warn_of_unmatched_names(self, name: str, policies: Sequence[Policy], regions: Sequence[Region]) -> None:
        """Warn of names of policies that are those of none of the attentions found in the model of that class.

        Nothing is said of frames that serve several blocks: their regions are named after the first of them.
        """
        if any(region.relative is not None for region in regions):
            return
        for identifier in (each for policy in policies for each in policy.where.names):
            if not any(re.search(identifier, region.name) for region in regions):
                shown = ", ".join(sorted({region.name for region in regions})[:4])
                self.warn_once(
                    f"no layer {identifier}",
                    f"pab_fx: {identifier!r} matches the name of no attention of {name}: there are {shown}, ...",
                )


def warn(message: str) -> None:
    """A `UserWarning` that points at the user's call: the innermost one outside of the libraries."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level if frame is not None else 2)
