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

from .._torch import faked_for_compiler
from ..graph.dataflow import value
from ..graph.structure import Structure, structure_of
from .layouts import fix_layouts
from .lowering import Compiler
from .parts import is_block, parts, repeat_numbers, why_whole


class RegionalCompiler:
    """Compiles the blocks of a model one by one, and alike ones once.

    Args:
        compile: compiles a part: `(gm, example_inputs) -> callable`.
        classes: names of the blocks' classes.
        fix_strides: hand blocks what other parts compute in one layout (see `fix_layouts`). An eager compiler
            needs it not, and a copy may change the rounding of what follows.
        on_whole: is told why, where a graph of several blocks has to be compiled as a whole.
    """

    def __init__(
        self,
        compile: Compiler,
        classes: Collection[str],
        fix_strides: bool = True,
        on_whole: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._compile, self._classes, self._fix_strides = compile, frozenset(classes), fix_strides
        self._on_whole = on_whole
        self._parts: dict[Structure, Callable[..., Any]] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph part by part; as a whole if it holds no more than one block, or its blocks hang together."""
        part_of = parts(gm.graph, self._classes)
        if sum(map(is_block, set(part_of.values()))) < 2:
            return self._compile(gm, example_inputs)
        repeat_numbers(gm.graph, part_of)
        why = why_whole(gm.graph, part_of)
        if why is None:
            if self._fix_strides:
                fix_layouts(gm.graph, part_of)
            try:
                split = split_module(gm, gm, part_of.__getitem__, keep_original_order=True)
            except (AssertionError, KeyError, RuntimeError) as error:
                why = f"torch.fx cannot split it ({type(error).__name__}: {error})"
        if why is not None:
            self._on_whole(why)
            gm.recompile()
            return self._compile(gm, example_inputs)
        return self._in_parts(split, example_inputs)

    def _in_parts(self, split: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile the blocks of a graph that is split into parts."""
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
