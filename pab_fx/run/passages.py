"""How far a model has come whose blocks several graphs hold: its streams from graph to graph, and its ranges of blocks.

Each is of one cache context of one request. What lies between two graphs is not seen, so a stream goes on only where
what enters a graph is the very tensor that left the one before, and nobody has updated it meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compile.specs import TensorSpec
from ..policy.policy import Policy
from ..policy.where import Blocks
from .deciding import Decision
from .state import Cell

Given = Sequence["torch.Tensor | None"]
"""For each stream what enters a graph, `None` for what the graph computes."""


@dataclass(frozen=True)
class Seen:
    """A tensor as it was seen: an update in place makes another one of it.

    Args:
        of: yields the tensor, `None` if it is gone.
        version: how often it was updated; -1 where that leaves no trace.
    """

    of: Any
    version: int

    @classmethod
    def weakly(cls, tensor: torch.Tensor) -> Seen:
        """A tensor that is not kept alive."""
        return cls(weakref.ref(tensor), _version(tensor))

    @classmethod
    def held(cls, tensor: torch.Tensor) -> Seen:
        """A tensor that is kept alive."""
        return cls(lambda: tensor, _version(tensor))

    def is_still(self, tensor: torch.Tensor | None) -> bool:
        """Whether this is that tensor, as it was."""
        return tensor is not None and self.of() is tensor and 0 <= self.version == _version(tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Chain:
    """The streams of a model, from graph to graph.

    Attributes:
        handed: by number of the stream, what left the last graph that it went through.
        number: how many chains there were before this one.
        broken_at: the block at which this one began, since what entered it had not left a graph before.
    """

    handed: dict[int, Seen] = field(default_factory=dict)
    number: int = 0
    broken_at: str = ""

    def enter(self, given: Given, block: str) -> list[int]:
        """Numbers of the streams that enter a graph; a new chain begins if they do not come from the last one."""
        found = [next((k for k, seen in self.handed.items() if seen.is_still(each)), None) for each in given]
        numbers = [k for k in found if k is not None]
        if len(numbers) == len(given) == len(set(numbers)):
            return numbers
        self.handed, self.number, self.broken_at = {}, self.number + 1, block
        return list(range(len(given)))

    def leave(self, left: dict[int, torch.Tensor]) -> None:
        """Note what leaves a graph, by number of the stream."""
        self.handed.update({k: Seen.weakly(each) for k, each in left.items()})


@dataclass(eq=False)
class Range:
    """A range of blocks.

    Args:
        policy: when and how.
        cell: what is kept of it.
        signal: what is kept of what its rule looks at.

    Attributes:
        decision: of the step that runs, from where the range begins to where it ends.
        chain: number of the chain that it began in.
        entering: what entered it in a step that computes, by number of the stream.
        looks: what entered it last looked like.
        is_open: whether a step that computes has not come to the end of the range.
        watched: where its signal begins: number of the chain, of the stream, and what entered.
        measured: its signal in this step.
    """

    policy: Policy
    cell: Cell
    signal: Cell
    decision: Decision | None = None
    chain: int = -1
    entering: dict[int, Seen] = field(default_factory=dict)
    looks: tuple[TensorSpec | None, ...] = ()
    is_open: bool = False
    watched: tuple[int, int, Seen] | None = None
    measured: torch.Tensor | None = None

    @property
    def computes(self) -> bool:
        """Whether it was decided that it computes."""
        return self.decision is not None and not any(self.decision.reuses)

    def prepare(self, given: Given) -> None:
        """Drop what is kept if it is of streams of another size, or if the last step that computed did not end."""
        looks = tuple(None if each is None else spec_of(each) for each in given)
        if self.cell.caches is not None and self.looks != looks:
            self.cell.reset()
        if self.is_open:
            self.cell.caches = None
        self.looks, self.decision, self.entering = looks, None, {}

    def begin(self, decision: Decision, chain: Chain, streams: dict[int, torch.Tensor]) -> None:
        """Note what was decided, and what enters."""
        self.decision, self.chain = decision, chain.number
        self.is_open = self.computes
        self.entering = {k: Seen.held(each) for k, each in streams.items()} if self.computes else {}

    def end(self) -> None:
        """Let go of what entered."""
        self.decision, self.entering, self.is_open = None, {}, False

    def broken(self, chain: Chain, streams: Sequence[int]) -> str | None:
        """Why it is not known what it has added to streams of these numbers; `None` if it is."""
        if self.decision is None:
            return "its last block has run without its first one"
        if chain.number != self.chain:
            return (
                f"what enters the block {chain.broken_at} is not the tensor that left the one before, or is updated in "
                "between (torch.inference_mode does not tell): something is computed between the graphs that hold them"
            )
        entered = [self.entering.get(k) for k in streams] if self.computes else []
        if not all(each is not None and each.is_still(each.of()) for each in entered):
            return "what enters its first block is updated in place before its last one has run"
        return None


@dataclass(eq=False)
class Passage:
    """The streams of a model, and its ranges of blocks by where they are."""

    chain: Chain = field(default_factory=Chain)
    ranges: dict[Blocks, Range] = field(default_factory=dict)


@dataclass
class Visit:
    """One run of a graph that holds a piece of a range of blocks; see `pieces`.

    Args:
        module: number of the module that the piece is in the graph.
        cell: the range's.
        ends: whether the range ends with this piece: what is kept of it is read and written there.
        decision: what was decided where the range began; `None` where it begins, and set by the run there.
        entering: what entered the range, by the streams of the graph; what enters the graph where that is not read.
    """

    module: int
    cell: Cell
    ends: bool
    decision: Decision | None
    entering: Sequence[torch.Tensor | None]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """What a tensor looks like, apart from its strides."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, tuple(range(tensor.dim())))
