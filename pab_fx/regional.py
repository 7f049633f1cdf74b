"""Compile each distinct block of a graph once: an inner compiler around another one.

Before, as captured:

    %a = ... embeddings ...
    %b = ... block 0 on %a ...
    %c = ... block 1 on %b ...            # as block 0, on parameters of its own
    return (... norm and projection on %c ...,)

After:

    %a = submod_0(...)                    # as it was
    %b = submod_1(%a, ...)                # compiled
    %c = submod_3(%b, ...)                # runs what was compiled for submod_1
    return submod_4(%c, ...)              # as it was

What lies between the blocks is not compiled, as with diffusers' `compile_repeated_blocks`. Nothing here knows of
attention: what a block's graph looks like after lowering decides which blocks are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module

from . import effects
from ._torch import faked_for_compiler
from .dataflow import value
from .structure import Structure, structure_of

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class RegionalCompiler:
    """Compiles the blocks of a model one by one, and alike ones once.

    Args:
        compile: compiles a part: `(gm, example_inputs) -> callable`.
        classes: names of the blocks' classes.
        fix_strides: hand blocks what other parts compute in one layout, so that blocks are alike that differ in
            nothing else. An eager compiler needs it not, and a copy may change the rounding of what follows.
    """

    def __init__(self, compile: Compiler, classes: Collection[str], fix_strides: bool = True) -> None:
        self._compile, self._classes, self._fix_strides = compile, frozenset(classes), fix_strides
        self._parts: dict[Structure, Callable[..., Any]] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph part by part; as a whole if it holds no more than one block."""
        part_of = parts(gm.graph, self._classes)
        if sum(map(is_block, set(part_of.values()))) < 2:
            return self._compile(gm, example_inputs)
        if self._fix_strides:
            fix_block_strides(gm.graph, part_of)
        split = split_module(gm, gm, part_of.__getitem__, keep_original_order=True)
        given = dict(zip(split.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        for call in split.graph.find_nodes(op="call_module"):
            if not is_block(int(str(call.target).rpartition("_")[2])):
                continue
            part: Any = split.get_submodule(str(call.target))
            inputs = part.graph.find_nodes(op="placeholder")
            examples = [
                given[argument] if argument in given else _example(node)
                for argument, node in zip(call.args, inputs, strict=True)
            ]
            setattr(split, str(call.target), self._compiled(part, examples))
        run: Callable[..., Any] = split.forward
        return run

    def _compiled(self, part: fx.GraphModule, examples: Sequence[Any]) -> nn.Module:
        """What runs a part of a graph."""
        is_single = _return_tuple(part)
        structure = structure_of(part, examples)
        if structure not in self._parts:
            self._parts[structure] = self._compile(part, examples)
        return _Part(self._parts[structure], is_single)


class _Part(nn.Module):
    """Runs a compiled part; as a module, so that a graph can call it."""

    def __init__(self, compiled: Callable[..., Any], is_single: bool) -> None:
        super().__init__()
        self.forward = (lambda *args: compiled(*args)[0]) if is_single else compiled


def parts(graph: fx.Graph, classes: Collection[str]) -> dict[fx.Node, int]:
    """The number of the part that each node belongs to, in graph order: odd for a block, even for what lies between.

    Example:
        >>> class Block(nn.Module):
        ...     def forward(self, x):
        ...         return x.sin() + 1
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList([Block(), Block()])
        ...     def forward(self, x):
        ...         return self.blocks[1](self.blocks[0](x.cos()))
        >>> class Tracer(fx.Tracer):
        ...     def is_leaf_module(self, module, name):
        ...         return False
        >>> parts(Tracer().trace(Model()), {"Block"})
        {cos: 0, sin: 1, add: 1, sin_1: 3, add_1: 3}
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    block_of = {node: _block(node, classes) for node in nodes}
    last = {block: node for node, block in block_of.items() if block is not None}
    part_of: dict[fx.Node, int] = {}
    current, number = None, 0
    for node in nodes:
        # what a rewrite put between a block's nodes is part of it, and so are views of what it computes
        is_inside = current is not None and (last[current] not in part_of or _is_view_of(node, part_of, number))
        following = current if block_of[node] is None and is_inside else block_of[node]
        if following != current:
            number += 1 if current is None or following is None else 2
        current = following
        part_of[node] = number
    return part_of


def is_block(part: int) -> bool:
    """Whether the part of that number is a block, not what lies between two."""
    return part % 2 == 1


def _is_view_of(node: fx.Node, part_of: dict[fx.Node, int], part: int) -> bool:
    """Whether a node is a view of what a part computes."""
    return effects.is_view(node) and part_of.get(node.all_input_nodes[0]) == part


def fix_block_strides(graph: fx.Graph, part_of: dict[fx.Node, int]) -> None:
    """Hold what is computed in one part and read in another to the dense layout, in place.

        %b = permute(%a, ...)      # the next part reads it    ->    %b = permute(%a, ...)
                                                                     %c = contiguous(%b)

    What is updated in place keeps its storage: a copy would not see it.
    """
    updated = [target for node in graph.nodes for target in effects.updated(node)]
    for node, part in list(part_of.items()):
        recorded = value(node)
        readers = [user for user in node.users if part_of.get(user, part) != part]
        if not readers or not isinstance(recorded, torch.Tensor) or recorded.is_contiguous():
            continue
        if any(effects.may_alias(node, target) for target in updated):
            continue
        with graph.inserting_after(node):
            dense = graph.call_method("contiguous", (node,))
        dense.meta = {**node.meta, "example_value": recorded.contiguous()}
        part_of[dense] = part
        node.replace_all_uses_with(dense, delete_user_cb=lambda user: user in readers)  # noqa: B023


def _example(node: fx.Node) -> Any:
    """A fake input for a part, of what another one computes."""
    recorded = value(node)
    return faked_for_compiler(recorded) if isinstance(recorded, torch.Tensor) else recorded


def _return_tuple(part: fx.GraphModule) -> bool:
    """Make a part return a tuple, as compilers expect it; whether it returned a single value."""
    output = part.graph.output_node()
    if isinstance(output.args[0], tuple):
        return False
    output.args = ((output.args[0],),)
    part.recompile()
    return True


def _block(node: fx.Node, classes: Collection[str]) -> str | None:
    """The outermost call of a module of these classes that a node was emitted in."""
    for key, (_, cls) in (node.meta.get("nn_module_stack") or {}).items():
        name = cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
        if name in classes:
            return str(key)
    return None
