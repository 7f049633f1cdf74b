"""Users' passes around the rewrite: run them, and see that their graphs still tell what the passes here ask.

    PABBackend(passes=[fuse_qkv, pab_fx.rewrite, fold])

    captured graph -> fuse_qkv -> tag, rewrite, lower -> fold -> the inner compiler

What runs behind the rewrite gets each graph that goes to the inner compiler, and each branch of a condition in it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .._torch import fake_mode_of
from .._torch.dynamo import keep_sources
from ..graph import effects
from ..graph.dataflow import op_name, value
from ..select.region import Region
from .form import branches_of, conditionals

Pass = Callable[[fx.GraphModule], fx.GraphModule]
Tagger = Callable[[fx.GraphModule], Sequence[Region]]


@dataclass(frozen=True)
class Passes:
    """What runs before and after the rewrite.

    Args:
        before: on the captured graph.
        after: on each lowered graph.

    Example:
        >>> Passes.of([len, repr, hash], rewrite=repr).after
        (<built-in function hash>,)
    """

    before: tuple[Pass, ...]
    after: tuple[Pass, ...]

    @classmethod
    def of(cls, passes: Iterable[Pass], rewrite: Any) -> Passes:
        """The passes of a list in which `pab_fx.rewrite` stands where the rewrite is to run; else it is the last.

        Args:
            passes: the list.
            rewrite: what stands for the rewrite.

        Raises:
            ValueError: if it is no list of functions, or has the rewrite in it twice.
        """
        if callable(passes) or not isinstance(passes, Iterable) or isinstance(passes, (str, Mapping)):
            raise ValueError(f"passes must be a list of functions gm -> gm, got {passes!r}.")
        listed = tuple(passes)
        for each in listed:
            if not callable(each):
                raise ValueError(f"passes must hold functions gm -> gm, got {each!r}.")
        if listed.count(rewrite) > 1:
            raise ValueError("passes has pab_fx.rewrite twice; a graph is rewritten once.")
        at = listed.index(rewrite) if rewrite in listed else len(listed)
        return cls(listed[:at], listed[at + 1 :])

    def run_before(self, gm: fx.GraphModule, tagged: Tagger) -> fx.GraphModule:
        """The captured graph after the passes that run before the rewrite.

        Args:
            gm: may be changed.
            tagged: finds the regions of a graph.

        Raises:
            ValueError: naming the pass, if an attention is not found any more after it.
        """
        if not self.before:
            return gm
        regions = tagged(gm)
        for each in self.before:
            gm = applied(each, gm)
            found = tagged(gm)
            _refuse_losses(each, regions, found)
            regions = found
        return gm

    def run_after(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A lowered graph, which may be changed, after the passes that run behind the rewrite."""
        for each in self.after:
            gm = _applied_inside_first(each, gm)
        return gm


def _applied_inside_first(each: Pass, gm: fx.GraphModule) -> fx.GraphModule:
    """What a pass makes of a graph, and of the computing branches of its conditions."""
    for cond in conditionals(gm):
        name, (branch, _) = str(cond.args[1].target), branches_of(gm, cond)  # type: ignore[union-attr]
        setattr(gm, name, _applied_inside_first(each, branch))
    return applied(each, gm)


def applied(each: Pass, gm: fx.GraphModule) -> fx.GraphModule:
    """What a pass makes of a graph, with what tracers record and passes leave out: values, and modules.

    Raises:
        RuntimeError: if the pass raises.
        TypeError: if the pass returns no graph.
        ValueError: if the graph is not well formed, or takes or returns another number of values.
    """
    known, outputs = set(gm.graph.nodes), _outputs(gm)
    inputs = [node.meta for node in gm.graph.find_nodes(op="placeholder")]
    try:
        result = each(gm)
    except Exception as error:
        raise RuntimeError(f"the pass {_name(each)} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, fx.GraphModule):
        raise TypeError(f"the pass {_name(each)} must return a GraphModule, got {result!r}.")
    try:
        result.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"the pass {_name(each)} leaves a graph that is not well formed: {error}") from error
    found = result.graph.find_nodes(op="placeholder")
    for what, before, after in (("inputs", len(inputs), len(found)), ("outputs", outputs, _outputs(result))):
        if before != after:
            raise ValueError(
                f"the pass {_name(each)} leaves a graph with {after} {what} in place of {before}, and what calls the "
                "graph knows nothing of that."
            )
    for node, meta in zip(found, inputs, strict=True):
        node.meta = {**meta, **node.meta}
    if result is not gm:
        keep_sources(gm, result)
    new = {node for node in result.graph.nodes if node not in known and node.op.startswith("call")}
    _record_values(result, new)
    _record_modules(result.graph, new)
    result.recompile()
    return result


def _outputs(gm: fx.GraphModule) -> int:
    returned = gm.graph.output_node().args[0]
    return len(returned) if isinstance(returned, (tuple, list)) else 1


def _name(each: Any) -> str:
    return str(getattr(each, "__name__", each))


def _refuse_losses(each: Pass, before: Sequence[Region], after: Sequence[Region]) -> None:
    """Raise if a pass took from the rewrite what it was to broadcast: it would be computed in every step.

    Attentions that are no modules are named after nodes, so names count only where one is missing.
    """
    wanted, found = (Counter(r.role for r in regions if r.is_broadcast) for regions in (before, after))
    if not wanted - found:
        return
    names = {(region.name, region.role) for region in after if region.is_broadcast}
    lost = [f"{r.name} ({r.role})" for r in before if r.is_broadcast and (r.name, r.role) not in names]
    raise ValueError(
        f"after the pass {_name(each)}, PAB does not recognise {', '.join(lost[:4])}{', ...' if lost[4:] else ''}, "
        f"which it is to broadcast. Run that pass after the rewrite: passes=[pab_fx.rewrite, {_name(each)}]."
    )


def _record_values(gm: fx.GraphModule, new: AbstractSet[fx.Node]) -> None:
    """Record the values that new nodes yield, in place, as the tracer did for the others."""
    mode = fake_mode_of([value(node) for node in gm.graph.nodes])
    if mode is not None and any("example_value" not in node.meta for node in new):
        with mode, torch.no_grad():
            _Recorder(gm, mode, new).run()


class _Recorder(fx.Interpreter):
    """Runs new nodes on what was recorded of the rest, in a graph's fake mode."""

    def __init__(self, gm: fx.GraphModule, mode: Any, new: AbstractSet[fx.Node]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._mode, self._new = mode, new

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Record what new nodes yield; an autocast that an error ends is left."""
        with contextlib.ExitStack() as entered:
            for node in self.graph.nodes:
                if op_name(node) == "_enter_autocast":
                    self.env[node] = entered.enter_context(contextlib.ExitStack())
                    self.env[node].enter_context(torch.autocast(*node.args))  # type: ignore[arg-type]
                elif op_name(node) == "_exit_autocast":
                    self.env[node.args[0]].close()  # type: ignore[index]
                elif node.op != "output" and not effects.sets_ambient_state(node):
                    self.env[node] = self.run_node(node)

    def run_node(self, n: fx.Node) -> Any:
        """The recorded value of a node that is not new, or the value of one that is."""
        if n not in self._new:
            found = value(n) if n.op != "get_attr" else self.fetch_attr(str(n.target))
            return self._mode.from_tensor(found) if type(found) in (torch.Tensor, nn.Parameter) else found
        if not {"example_value", "val"} & n.meta.keys():
            n.meta["example_value"] = super().run_node(n)
        return value(n)


def _record_modules(graph: fx.Graph, new: AbstractSet[fx.Node]) -> None:
    """Place new nodes in modules, in place: with what reads them, or with what they read, whichever is further in.

    %k = to_k(%x)   # in attn                       %kv    = linear(%x, cat(...))   # new, its readers are in attn
    %v = to_v(%x)   # in attn                ->     %k, %v = split(%kv)             # new, its readers are in attn
    %o = attention(%q, %k, %v)   # in attn          %o     = attention(%q, %k, %v)  # in attn
    """
    unplaced = {node for node in new if "nn_module_stack" not in node.meta}
    around = {node: list((node.meta.get("nn_module_stack") or {}).items()) for node in graph.nodes}
    around_sources: dict[fx.Node, list[Any]] = {}
    for node in graph.nodes:
        sources = [around_sources[s] for s in node.all_input_nodes if s.op.startswith("call")]
        around_sources[node] = _common(sources) if node in unplaced else around[node]
    for node in reversed(graph.nodes):
        if node in unplaced:
            readers = _common([around[user] for user in node.users])
            around[node] = max(readers, around_sources[node], key=len)
            node.meta["nn_module_stack"] = dict(around[node])


def _common(stacks: Sequence[Sequence[Any]]) -> list[Any]:
    """The modules, outermost first, that all of these stacks begin with."""
    shared: list[Any] = []
    for level in zip(*stacks, strict=False):
        if any(entry != level[0] for entry in level):
            break
        shared.append(level[0])
    return shared
