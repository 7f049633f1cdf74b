"""CUDA graphs, simulated on a CPU: memory of fixed addresses, and outputs that the next call overwrites.

    torch.compile(model, backend=replaying)                # or pab_fx.enable(pipe, config, inner=replaying)

A CUDA graph reads and writes where it did when it was recorded. What that means for code that calls one, as CUDA graph
trees have it (`torch._inductor.cudagraph_trees`, torch 2.13):

    inputs       are copied to memory of the graph before each run. A static one is read where it lies: a parameter,
                 a tensor marked by `torch._dynamo.mark_static_address`. At another address the graph is recorded again.
    outputs      lie in memory of the graph, in the same tensor object and at the same version in every run. They hold
                 until the next call of compiled code runs a graph, be it this one or another: all share one pool.
    one call     of compiled code may run several graphs, or one graph several times. No run overwrites another's.
    mark_step    `torch.compiler.cudagraph_mark_step_begin()` begins such a call by hand, from then on only that does.

Here nothing is recorded: the graph runs eagerly, and what a CUDA graph may overwrite is overwritten with NaN. There is
no warm-up, which on a GPU is a graph's first run, and inputs that a graph updates are copied back, where CUDA graph
trees run it without recording. With gradients the graph runs as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .._torch import static_inputs
from .._torch.dynamo import compiled_call


def replaying(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Replayed:
    """An inner compiler whose graphs treat inputs and outputs as CUDA graphs do.

    Args:
        gm: the graph, which runs eagerly.
        example_inputs: not looked at.

    Example:
        >>> double, half = (torch.compile(each, backend=replaying) for each in (lambda x: 2 * x, lambda x: x / 2))
        >>> doubled = double(torch.ones(2))
        >>> doubled, half(torch.ones(2)), doubled
        (tensor([nan, nan]), tensor([0.5000, 0.5000]), tensor([nan, nan]))
    """
    return Replayed(gm)


replaying.records_graphs = True  # type: ignore[attr-defined]  # what the backend asks of an inner compiler


class Replayed:
    """A graph with memory of its own for what it is given and for what it returns.

    Args:
        gm: the graph.

    Attributes:
        static: positions of the inputs that are read where they lie.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm, self.static = gm, static_inputs(gm)
        self._constants = [*gm.parameters(), *gm.buffers()]
        self._recordings: dict[Any, _Recording] = {}

    @property
    def recordings(self) -> int:
        """How often the graph would have been recorded."""
        return len(self._recordings)

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in args):
            return self._gm(*args)
        with torch.inference_mode(False):  # memory that each mode may write to
            key = (_pool.turn(self), *[self._seen(i, given) for i, given in enumerate(args)])
            if key not in self._recordings:
                self._recordings[key] = _Recording(args, self.static)
            recording = self._recordings[key]
        inputs = recording.copied_in(args)
        _pool.begin(self)
        versions = [each._version for each in recording.buffers.values()]
        outputs = self._gm(*inputs)
        for (i, buffer), version in zip(recording.buffers.items(), versions, strict=True):
            if buffer._version != version:
                _each_once(args[i]).copy_(_each_once(buffer))
        with torch.inference_mode(False):
            return recording.copied_out(args, outputs, self._constants)

    def _seen(self, i: int, given: Any) -> Any:
        """What an input has to be equal in for a recording to serve it."""
        if not isinstance(given, torch.Tensor):
            return given
        return tuple(given.shape), given.stride(), given.dtype, given.data_ptr() if i in self.static else None


class _Recording:
    """The memory of a graph for inputs of one kind.

    Args:
        args: such inputs.
        static: positions of those that are not copied.

    Attributes:
        buffers: what other tensors are copied to, by their positions.
    """

    def __init__(self, args: Sequence[Any], static: frozenset[int]) -> None:
        self.buffers = {
            i: torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
            for i, given in enumerate(args)
            if isinstance(given, torch.Tensor) and i not in static
        }
        self._outputs: dict[Any, torch.Tensor] = {}
        self._storages: dict[Any, torch.Tensor] = {}

    def copied_in(self, args: Sequence[Any]) -> list[Any]:
        """The inputs that the graph runs on."""
        for i, buffer in self.buffers.items():
            _each_once(buffer).data.copy_(_each_once(args[i]))
        return [self.buffers.get(i, given) for i, given in enumerate(args)]

    def copied_out(self, args: Sequence[Any], outputs: Any, constants: Sequence[torch.Tensor]) -> Any:
        """What the caller gets; of what lies in an input the same part of what was given."""
        given = {_address(each): each for each in (*constants, *args) if isinstance(each, torch.Tensor)}
        copied = {_address(buffer): args[i] for i, buffer in self.buffers.items()}
        firsts: dict[int, int] = {}  # the first output in each storage stands for all of them

        def returned(i: int, output: Any) -> Any:
            if not isinstance(output, torch.Tensor) or not output.untyped_storage().nbytes():
                return output
            address = _address(output)
            if address in copied:
                offset = copied[address].storage_offset() + output.storage_offset()
                return copied[address].as_strided(output.shape, output.stride(), offset)
            return output if address in given else self._held(i, firsts.setdefault(address, i), output)

        results = [returned(i, output) for i, output in enumerate(outputs)]
        return tuple(results) if isinstance(outputs, tuple) else results

    def _held(self, i: int, first: int, output: torch.Tensor) -> torch.Tensor:
        """The output in this recording's memory. Neither this nor to poison it changes its version.

        Conditions may yield tensors that lie otherwise, which have memory of their own.
        """
        source = output.untyped_storage()
        whole, empty = (first, source.nbytes()), torch.empty(0, dtype=output.dtype, device=output.device)
        if whole not in self._storages:
            self._storages[whole] = torch.empty_like(empty).set_(source.clone())  # type: ignore[call-overload]
        storage = self._storages[whole].untyped_storage()
        if i == first:
            storage.copy_(source)
            _pool.lent.append(self._storages[whole])
        place = (output.storage_offset(), output.shape, output.stride())
        if (i, whole, place) not in self._outputs:
            self._outputs[i, whole, place] = empty.set_(storage, *place)
        return self._outputs[i, whole, place]


class _Pool:
    """What holds until the next call of compiled code: outputs, and how often each graph ran."""

    def __init__(self) -> None:
        self._call, self.lent, self._runs = -1, list[torch.Tensor](), Counter[Replayed]()

    def turn(self, graph: Replayed) -> int:
        """How often the call that runs has run this graph before."""
        return self._runs[graph] if self._call == compiled_call() else 0

    def begin(self, graph: Replayed) -> None:
        """Run a graph: the first in a call overwrites all that those before have returned."""
        if self._call != compiled_call():
            for each in self.lent:
                poison(each)
            self._call, self.lent, self._runs = compiled_call(), [], Counter()
        self._runs[graph] += 1


_pool = _Pool()


def poison(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with NaN, with the largest number if it holds integers, with the opposite if bools.

    Example:
        >>> numbers = torch.tensor([1, 2], dtype=torch.uint8)
        >>> poison(numbers)
        >>> numbers
        tensor([255, 255], dtype=torch.uint8)
    """
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(math.nan)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)  # odd


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _each_once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with each of its elements once: an expanded one may not be written to."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
