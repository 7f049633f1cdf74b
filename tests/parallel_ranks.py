"""Run a scenario of `parallel_scenarios` on several processes that talk over gloo; none of them outlives its time.

python tests/parallel_ranks.py FOLDER RANK RANKS '[["sequence", {"model": "wan"}]]'     is one of these processes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Scenario = tuple[str, dict[str, Any]]
PATIENCE = 60
"""Seconds that a rank waits for another one in a collective before it gives up."""


def on_ranks(folder: Path, ranks: int, scenarios: Sequence[Scenario], timeout: float) -> list[list[Any]]:
    """For each scenario, what it returned on each rank.

    Raises:
        AssertionError: if a process fails, or they take more than `timeout` seconds; with the end of what it wrote.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "examples"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(folder)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(rank), str(ranks), json.dumps(scenarios)]
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(arguments, stdout=file, stderr=file, env=environment))
    try:
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            late = time.monotonic() > deadline
            if late or any(process.poll() not in (None, 0) for process in processes):
                raise AssertionError(
                    _failure(logs, processes, f"not done in {timeout:g} s" if late else "a rank failed")
                )
            time.sleep(0.1)
        assert not any(process.returncode for process in processes), _failure(logs, processes, "a rank failed")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return list(zip(*(torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)), strict=True))


def _failure(logs: Sequence[Path], processes: Sequence[Any], why: str) -> str:
    ends = [why]
    for rank, (log, process) in enumerate(zip(logs, processes, strict=True)):
        lines = [line for line in log.read_text().splitlines() if not line.startswith("USDT:")]  # the profiler's
        ends += [f"--- rank {rank}, exit {process.poll()}", *lines[-30:]]
    return "\n".join(ends)


def main(folder: Path, rank: int, ranks: int, scenarios: Sequence[Scenario]) -> None:
    import parallel_scenarios
    import torch.distributed as dist

    torch.set_num_threads(1)
    # diffusers spreads ranks over the accelerators of a machine, and does not expect that there are none
    torch.accelerator.device_count = lambda: 1
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE))
    results = []
    with torch.no_grad():
        for name, options in scenarios:
            results.append(getattr(parallel_scenarios, name)(**options))
            torch.compiler.reset()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # without the threads of gloo, which abort a process that does not wait for them


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
