"""Where what is kept lies between two steps: as the graph left it, in buffers of a fixed address, or in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .._torch import fake_mode_of, mark_static, wrapped
from .state import Cell


class Holder(Protocol):
    """Takes what a graph leaves, and gives back what a graph reads.

    Attributes:
        at_one_address: whether compiled graphs expect what they read at one address.
    """

    at_one_address: bool

    def hold(self, cell: Cell, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What a cell keeps of these tensors."""

    def lend(self, held: Any) -> torch.Tensor:
        """A tensor as it was kept."""


def holder_for(cache_device: torch.device | None, has_cuda_graphs: bool) -> Holder | None:
    """What holds caches; `None` where they stay as the graph leaves them.

    Args:
        cache_device: where they lie between two steps, `None` for where they are computed.
        has_cuda_graphs: whether compiled graphs are recorded, and expect each input at the address it had then.
    """
    if cache_device is not None:
        return Offloaded(cache_device, has_cuda_graphs)
    return Static() if has_cuda_graphs else None


class Static:
    """In buffers that a module has for good: a recorded CUDA graph reads them where they lay when it was recorded.

    What such a graph returns lies in memory that its next run overwrites, so it is copied. The buffers are not given
    back at the end of a generation: other addresses would have the graphs recorded again.
    """

    at_one_address = True

    def hold(self, cell: Cell, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The cell's buffers, with these values."""
        return in_buffers(cell.buffers, tensors)

    def lend(self, held: torch.Tensor) -> torch.Tensor:
        """The buffer itself."""
        return held


def in_buffers(buffers: list[torch.Tensor], tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The buffers, with the values of these tensors; those that are not alike are replaced."""
    if list(map(_likeness, buffers)) != list(map(_likeness, tensors)):
        with torch.inference_mode(False):  # else a step outside of that mode may not write to them
            made = [mark_static(torch.empty_like(tensor)) for tensor in tensors]
    else:
        made = list(buffers)
    written = addresses(made)
    # a slot may become what another one was: it is read before that is written to
    sources = [
        tensor.clone() if tensor is not buffer and not addresses([tensor]).isdisjoint(written) else tensor
        for buffer, tensor in zip(made, tensors, strict=True)
    ]
    for buffer, source in zip(made, sources, strict=True):
        buffer.copy_(source)
    buffers[:] = made
    return tuple(made)


def _likeness(tensor: torch.Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def addresses(values: Sequence[Any]) -> frozenset[int]:
    """Where the memory of tensors begins, of those that have any; a quantised one has what it is made of."""
    found: set[int] = set()
    for each in values:
        if isinstance(each, torch.Tensor) and fake_mode_of([each]) is None:
            parts, _ = wrapped(each)
            found |= addresses(list(parts.values())) if parts else {each.untyped_storage().data_ptr()}
    return frozenset(found)


class Offloaded:
    """On another device than the model: in main memory, say, for a cache that does not fit the accelerator's.

    From and to an accelerator the copies run on a stream of their own, through pinned memory: those to the device wait
    for no computation, and computations only for the copies that they read. With CUDA graphs, whose next run writes
    to what is copied, computations wait for the copies from the device too.

    Args:
        device: where caches lie between two steps.
        has_cuda_graphs: whether the tensors to hold are overwritten by a graph's next run, whoever holds them.
    """

    at_one_address = False

    def __init__(self, device: torch.device, has_cuda_graphs: bool = False) -> None:
        self._device, self._has_cuda_graphs = device, has_cuda_graphs
        self._streams: dict[torch.device, Any] = {}

    def hold(self, cell: Cell, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Copies of these tensors on the device, each with where it came from and the event that tells it is there."""
        return tuple(map(self._copied, tensors))

    def _copied(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device, Any]:
        if tensor.device.type == "cpu" or tensor.device == self._device:
            return tensor.to(self._device, copy=self._has_cuda_graphs), tensor.device, None
        stream, current = self._stream(tensor.device), torch.accelerator.current_stream(tensor.device)
        stream.wait_stream(current)
        copy = torch.empty_like(tensor, device=self._device, pin_memory=self._device.type == "cpu")
        with stream:
            copy.copy_(tensor, non_blocking=True)
            event = stream.record_event()
        if self._has_cuda_graphs:
            current.wait_event(event)
        else:
            tensor.record_stream(stream)  # its memory is free for others only after the copy
        return copy, tensor.device, event

    def lend(self, held: tuple[torch.Tensor, torch.device, Any]) -> torch.Tensor:
        """The tensor, where it was computed."""
        copy, device, event = held
        if event is None:
            return copy.to(device)
        stream, current = self._stream(device), torch.accelerator.current_stream(device)
        with stream:
            stream.wait_event(event)
            tensor = copy.to(device, non_blocking=True)
        current.wait_stream(stream)
        tensor.record_stream(current)
        return tensor

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]
