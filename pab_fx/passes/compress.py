"""Keep less of what is kept: caches in bfloat16, or in 8 bits with a scale per token.

Before, where a region computes, and where it is reused:

    %kept        : call_function[in_order](%out, (0, 1, 2))         %slot_3 : placeholder
    return ((%y,), %kept)                                           %y : call_function[add](%x, %slot_3)

After, with `torch.int8` or `torch.float8_e4m3fn`:

    %quantised : call_function[quantise](%kept, torch.int8)         %slot_3       : placeholder
    %q         : call_function[getitem](%quantised, 0)              %slot_3_scale : placeholder
    %scale     : call_function[getitem](%quantised, 1)              %cache : call_function[dequantise](
    return ((%y,), %q, %scale)                                             %slot_3, %slot_3_scale, float32)
                                                                    %y     : call_function[add](%x, %cache)

After, with `torch.bfloat16`:

    %narrow : call_method[to](%kept, torch.bfloat16)                %slot_3 : placeholder
    return ((%y,), %narrow)                                         %cache : call_method[to](%slot_3, float32)
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

import torch
from torch import fx

from .._torch import size_hint
from ..graph import effects
from ..graph.dataflow import value
from .form import MARK, Slot, inputs_of, set_slots_returned, slots_returned
from .strides import in_order, stride_order

logger = logging.getLogger(__name__)

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes that need a scale, and the largest number that each is used for."""
DTYPES = (torch.bfloat16, *LARGEST)

SMALLEST_SCALE = 2.0**-100  # below it counts as zero: neither it nor its products may be subnormal, which some flush
MARGIN = 1 + 2.0**-20  # more than the error of two multiplications, less than one step of a scale
SIGNIFICANT = -128  # the upper 17 of a float32's 24 significant bits, as a mask of its bits


def compress(gm: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """Keep what is in the slots of a graph in functional form in fewer bytes, in place.

    Comes after `fix_slot_strides` and before `fix_operand_strides`: what is read becomes an operand that the graph
    computes.

    Args:
        gm: of either lowering. A slot with a scale becomes two inputs and two outputs; what `stored` leaves as it is
            stays. A slot that is updated in place after it was read is written back: it is not the stored tensor that
            was updated.
        dtype: `torch.bfloat16`, `torch.int8` or `torch.float8_e4m3fn`.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"caches are kept in {', '.join(map(str, DTYPES))}, not in {dtype}.")
    reads, kept = inputs_of(gm, Slot), {}
    for slot, held in reads.items():
        wide = _read(gm.graph, slot, held, dtype)
        if wide is not held and effects.later_updates(gm.graph, wide):
            kept[slot] = wide
    kept.update(slots_returned(gm))
    written: dict[Slot, fx.Node] = {}
    for slot, node in kept.items():
        written.update(_write(gm.graph, slot, node, dtype))
    set_slots_returned(gm, written)
    logger.debug("compressed %d reads and %d writes to %s", len(reads), len(kept), dtype)
    return gm


def stored(kept: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is stored for a tensor: the tensor itself where that is no larger, else a smaller one, and maybe its scale.

    With a scale that is where the last dimension is short, and a tensor without dimensions; integers always are left.

    Args:
        kept: real or fake, [..., D].
        dtype: one of `DTYPES`.

    Example:
        >>> {part: each.shape for part, each in stored(torch.ones(2, 7, 64), torch.int8).items()}
        {'': torch.Size([2, 7, 64]), 'scale': torch.Size([2, 7, 1])}
        >>> stored(torch.ones(7, 1), torch.int8)[""].dtype
        torch.float32
    """
    elements = size_hint(kept.shape[-1]) if kept.dim() else 0
    scale = 4 if dtype in LARGEST else 0  # bytes
    if not kept.is_floating_point() or kept.itemsize * elements <= dtype.itemsize * elements + scale:
        return {"": kept}
    if dtype not in LARGEST:
        return {"": kept.to(dtype)}
    return dict(zip(("", "scale"), quantise(kept, dtype), strict=True))


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


def _read(graph: fx.Graph, slot: Slot, held: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Read a slot from what is stored of it."""
    recorded = value(held)
    found = stored(recorded, dtype)
    if found[""] is recorded:
        return held
    inputs = [held]
    for part in list(found)[1:]:
        with graph.inserting_after(inputs[-1]):
            inputs.append(graph.placeholder(f"{held.target}_{part}"))
    for node, (part, each) in zip(inputs, found.items(), strict=True):
        node.meta = {**node.meta, MARK: replace(slot, part=part), "example_value": each}
    first = min(held.users, default=graph.output_node())
    with graph.inserting_before(first):
        if len(inputs) == 1:
            wide = graph.call_method("to", (held, recorded.dtype))
        else:
            wide = graph.call_function(dequantise, (*inputs, recorded.dtype))
    # a part of the module that reads it first: a block that is compiled alone is handed what is stored
    wide.meta = {"nn_module_stack": first.meta.get("nn_module_stack", {}), "example_value": recorded}
    held.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    return wide


def _write(graph: fx.Graph, slot: Slot, kept: fx.Node, dtype: torch.dtype) -> dict[Slot, fx.Node]:
    """Make what is stored of an output that is kept."""
    recorded = value(kept)
    found = stored(recorded, dtype)
    if found[""] is recorded:
        return {slot: kept}
    meta = {key: each for key, each in kept.meta.items() if key != MARK}
    with graph.inserting_before(effects.end_of_updates(graph, kept)):
        if len(found) == 1:
            made = [graph.call_method("to", (kept, dtype))]
        else:
            quantised = graph.call_function(quantise, (kept, dtype))
            quantised.meta = {**meta, "example_value": tuple(found.values())}
            made = [graph.call_function(operator.getitem, (quantised, i)) for i in range(len(found))]
    for node, each in zip(made, found.values(), strict=True):
        node.meta = {**meta, "example_value": each}  # a part of the module that it is computed in
    return {replace(slot, part=part): node for part, node in zip(found, made, strict=True)}
