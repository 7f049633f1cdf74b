"""Keep less of what is kept: caches in bfloat16, or in 8 bits with a scale per token.

Before, where a region computes, and where it is reused:

    %kept        : call_function[in_order](%out, (0, 1, 2))         %pab_cache_3 : placeholder
    return (%y, %kept)                                              %y : call_function[add](%x, %pab_cache_3)

After, with `torch.int8` or `torch.float8_e4m3fn`:

    %quantised : call_function[quantise](%kept, torch.int8)         %pab_cache_3       : placeholder
    %q         : call_function[getitem](%quantised, 0)              %pab_cache_3_scale : placeholder
    %scale     : call_function[getitem](%quantised, 1)              %cache : call_function[dequantise](
    return (%y, %q, %scale)                                                %pab_cache_3, %pab_cache_3_scale, float32)
                                                                    %y     : call_function[add](%x, %cache)

After, with `torch.bfloat16`:

    %narrow : call_method[to](%kept, torch.bfloat16)                %pab_cache_3 : placeholder
    return (%y, %narrow)                                            %cache : call_method[to](%pab_cache_3, float32)
                                                                    %y     : call_function[add](%x, %cache)

The elements of a token (the last dimension) share a scale, of which the largest of them becomes the largest number
of the small dtype. What is computed from a cache is computed in the cache's own dtype, as before.

Keeping again what was read from a cache leaves the cache as it is, to the bit, so that a `cond` that writes back in
each step what it read lets nothing drift. Three things make it so:

- The scale is a float32 with 17 significant bits. Products with a quantised element, of 7 bits or less, are
  then exact, and the largest of a token is the same multiple of the scale again.
- The scale is multiplied by a little more than the reciprocal of the largest number, so that cutting off bits of a
  scale that was cut off before leaves it, also where a compiler rounds otherwise.
- A bfloat16 is off by at most 1 part in 257 of what it rounds, and 127 / 257 is less than half a step of int8.

Only with float16 and float8 another number may be kept for elements below 1e-6, float16's subnormal numbers; it is
read as the same.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .._torch import size_hint
from ..graph import effects
from ..graph.dataflow import value
from .lift import Lifted, in_order, stride_order

logger = logging.getLogger(__name__)

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes that need a scale, and the largest number that each is used for."""
DTYPES = (torch.bfloat16, *LARGEST)

SMALLEST_SCALE = 2.0**-100  # below it counts as zero: neither it nor its products may be subnormal, which some flush
MARGIN = 1 + 2.0**-20  # more than the error of two multiplications, less than one step of a scale
SIGNIFICANT = -128  # the upper 17 of a float32's 24 significant bits, as a mask of its bits


def compressed(lifted: Lifted, dtype: torch.dtype) -> Lifted:
    """Keep what a lifted graph writes, and read what it reads, in fewer bytes, in place.

    Comes after `fix_cache_strides` and before `fix_operand_strides`: what is read becomes an operand that the graph
    computes.

    Args:
        lifted: from `lift`, of either lowering.
        dtype: `torch.bfloat16`, `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        The same graph, with "pab_cache_3_scale" after each "pab_cache_3" that has a scale, both among its reads and
        writes and among its inputs and outputs. What `stored` leaves as it is stays. A cache that is updated in place
        after it was read is written back: it is not the stored tensor that was updated.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"caches are kept in {', '.join(map(str, DTYPES))}, not in {dtype}.")
    graph = lifted.gm.graph
    inputs = graph.find_nodes(op="placeholder")
    reads: list[str] = []
    written_back: dict[str, fx.Node] = {}
    for name, cache in zip(lifted.reads, inputs[len(inputs) - len(lifted.reads) :], strict=True):
        names, wide = _read(graph, name, cache, dtype)
        reads.extend(names)
        if wide is not cache and effects.later_updates(graph, wide):
            written_back[name] = wide
    outputs: Any = graph.output_node().args[0]
    own = len(outputs) - len(lifted.writes)
    kept = {**written_back, **dict(zip(lifted.writes, outputs[own:], strict=True))}
    written: dict[str, fx.Node] = {}
    for name, node in kept.items():
        written.update(_write(graph, name, node, dtype))
    graph.output_node().args = ((*outputs[:own], *written.values()),)
    graph.lint()
    lifted.gm.recompile()
    logger.debug("compressed %d reads and %d writes to %s", len(lifted.reads), len(kept), dtype)
    return replace(lifted, reads=tuple(reads), writes=tuple(written))


def stored(name: str, kept: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is stored for a tensor, by name: the tensor itself where that is no larger.

    With a scale that is where the last dimension is short, and a tensor without dimensions; integers always are left.

    Args:
        name: of the cache.
        kept: real or fake, [..., D].
        dtype: one of `DTYPES`.

    Example:
        >>> {name: each.shape for name, each in stored("pab_cache_0", torch.ones(2, 7, 64), torch.int8).items()}
        {'pab_cache_0': torch.Size([2, 7, 64]), 'pab_cache_0_scale': torch.Size([2, 7, 1])}
        >>> stored("pab_cache_0", torch.ones(7, 1), torch.int8)["pab_cache_0"].dtype
        torch.float32
    """
    elements = size_hint(kept.shape[-1]) if kept.dim() else 0
    scale = 4 if dtype in LARGEST else 0  # bytes
    if not kept.is_floating_point() or kept.itemsize * elements <= dtype.itemsize * elements + scale:
        return {name: kept}
    if dtype not in LARGEST:
        return {name: kept.to(dtype)}
    return dict(zip((name, f"{name}_scale"), quantise(kept, dtype), strict=True))


def quantise(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor [..., D] in 8 bits and the scale of each token, a float32 [..., 1]; both lie in memory as it does.

    A token with a nan or an infinity in it gets a scale that is none either, so that nothing finite is read of it.
    One whose elements are all below 1e-28 is kept as zeros. No gradient goes through.

    Example:
        >>> quantise(torch.tensor([[-1.0, 0.5, 0.0]]), torch.int8)[0]
        tensor([[-127,   64,    0]], dtype=torch.int8)
    """
    wide = tensor.detach().to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) * (MARGIN / LARGEST[dtype])
    scale = (scale.view(torch.int32) & SIGNIFICANT).view(torch.float32)
    scale = scale.masked_fill(scale < SMALLEST_SCALE, 1.0)  # a nan stays
    steps = wide / scale
    quantised = (steps if dtype.is_floating_point else steps.round()).to(dtype)
    order = stride_order(tensor)
    return in_order(quantised, order), in_order(scale, order)


def dequantise(quantised: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantise` was given, but for rounding.

    Example:
        >>> dequantise(*quantise(torch.tensor([[-1.0, 0.5, 0.0]]), torch.int8), torch.bfloat16)
        tensor([[-1.0000,  0.5039,  0.0000]], dtype=torch.bfloat16)
    """
    return in_order((quantised.to(torch.float32) * scale).to(dtype), stride_order(quantised))


def _read(graph: fx.Graph, name: str, cache: fx.Node, dtype: torch.dtype) -> tuple[tuple[str, ...], fx.Node]:
    """Read a cache from what is stored of it; return the names of the inputs that are read, and the cache."""
    recorded = value(cache)
    found = stored(name, recorded, dtype)
    if found[name] is recorded:
        return (name,), cache
    inputs = [cache]
    for further in list(found)[1:]:
        with graph.inserting_after(inputs[-1]):
            inputs.append(graph.placeholder(further))
    for node, each in zip(inputs, found.values(), strict=True):
        node.meta["example_value"] = each
    first = min(cache.users, default=graph.output_node())
    with graph.inserting_before(first):
        if len(inputs) == 1:
            wide = graph.call_method("to", (cache, recorded.dtype))
        else:
            wide = graph.call_function(dequantise, (*inputs, recorded.dtype))
    # a part of the module that reads it first: a block that is compiled alone is handed what is stored
    wide.meta = {"nn_module_stack": first.meta.get("nn_module_stack", {}), "example_value": recorded}
    cache.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    return tuple(found), wide


def _write(graph: fx.Graph, name: str, kept: fx.Node, dtype: torch.dtype) -> dict[str, fx.Node]:
    """Make what is stored of an output that is kept, and return it by name."""
    recorded = value(kept)
    found = stored(name, recorded, dtype)
    if found[name] is recorded:
        return {name: kept}
    with graph.inserting_before(effects.end_of_updates(graph, kept)):
        if len(found) == 1:
            made = [graph.call_method("to", (kept, dtype))]
        else:
            quantised = graph.call_function(quantise, (kept, dtype))
            quantised.meta = {**kept.meta, "example_value": tuple(found.values())}
            made = [graph.call_function(operator.getitem, (quantised, i)) for i in range(len(found))]
    for node, each in zip(made, found.values(), strict=True):
        node.meta = {**kept.meta, "example_value": each}  # a part of the module that it is computed in
    return dict(zip(found, made, strict=True))
