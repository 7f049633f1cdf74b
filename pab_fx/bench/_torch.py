"""Private PyTorch interfaces of the benchmark, each with what it is for and the versions it was seen in."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


def captured_frames() -> int:
    """How many graphs Dynamo has captured in this process. `counters["stats"]["unique_graphs"]`, 2.9 to 2.15."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> int:
    """How often Dynamo has broken off a graph in this process. `counters["graph_break"]`, 2.9 to 2.15."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def cold_compiler() -> contextlib.AbstractContextManager[None]:
    """Compile inside as the first process on a machine does: no cache in memory or on disk knows any kernel.

    Within it one graph's kernels serve the next, as they do for a user; `force_disable_caches` would give every graph
    an empty cache of its own. What is left are headers that the C++ compiler has read before. `fresh_cache` seen in
    2.9 to 2.15.
    """
    from torch._inductor.utils import fresh_cache

    found: contextlib.AbstractContextManager[None] = fresh_cache()
    return found


@contextlib.contextmanager
def quiet_recompile_limit() -> Iterator[None]:
    """Let Dynamo reach its recompile limit without a page of warnings. `convert_frame` seen in 2.9 to 2.15."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def default_recompile_limit() -> int:
    """How often Dynamo compiles a code object before it gives up."""
    from torch._dynamo import config

    return int(config.recompile_limit)


def peak_of_live_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of CPU memory that `run` holds at once, of what it allocates through PyTorch.

    The profiler's memory events (`kineto_results.events()`, name `[memory]`) seen in 2.9 to 2.15; the public tables
    sum them up by operator, where the peak cannot be seen any more.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr whenever it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]" and not _on_gpu(e)]
    live = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        live += change
        peak = max(peak, live)
    return peak


def _on_gpu(event: Any) -> bool:
    return event.device_type() != torch.autograd.DeviceType.CPU
