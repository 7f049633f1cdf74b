"""What the examples of parallelism share: starting, a small model with random weights, counting collectives."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from pab_fx import PABConfig

# ------------------------------------------------------------------------------------------------- starting


def start(device: str) -> torch.device:
    """Join the processes that torchrun started; the device of this one.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl).
    """
    # a warning in diffusers' hook that splits inputs would break Wan's graph before its first block
    torch._dynamo.config.ignore_logging_functions.add(logging.Logger.warning_once)
    if device == "cpu":
        # diffusers spreads ranks over the accelerators of a machine, and does not expect that there are none
        torch.accelerator.device_count = lambda: 1
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return torch.device("cuda", local)


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of both examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--range", type=int, default=2, help="compute self-attention every so many steps")
    parser.add_argument("--inner", default="eager", help="what compiles the graphs: eager, inductor")
    return parser


def stop() -> None:
    """Leave when all have come here."""
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- model and generation


def config(skip_range: int) -> PABConfig:
    """Self-attention every `skip_range` steps, cross-attention every third of these."""
    return PABConfig(
        spatial_attention_block_skip_range=skip_range,
        cross_attention_block_skip_range=3 * skip_range,
        spatial_attention_timestep_skip_range=(100, 850),
        cross_attention_timestep_skip_range=(100, 850),
    )


def small_wan(device: torch.device, layers: int = 4) -> WanTransformer3DModel:
    """A Wan of 4 layers with 8 heads of 32, the same random weights on each rank."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=layers,
    )
    for parameter in model.parameters():  # no gate or projection that is zero hides an attention
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.to(device).eval().requires_grad_(False)


@dataclass
class Inputs:
    """What a generation starts from, the same on each rank.

    Args:
        device: where it lies.
        steps: of the scheduler.
        noise: [1, 16, 5, 16, 16].
        text: embeddings of a prompt, [1, 32, 64].
        empty: those of an empty one.
    """

    device: torch.device
    steps: int = 20
    noise: torch.Tensor = field(init=False)
    text: torch.Tensor = field(init=False)
    empty: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = {"noise": (1, 16, 5, 16, 16), "text": (1, 32, 64), "empty": (1, 32, 64)}
        for name, shape in shapes.items():
            setattr(self, name, torch.randn(shape, generator=generator).to(self.device))

    def generate(self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Denoise with `predict(latents, timestep)`."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(self.steps, device=self.device)
        latents = self.noise
        with torch.no_grad():
            for t in scheduler.timesteps:
                latents = scheduler.step(predict(latents, t.expand(1)), t, latents, return_dict=False)[0]
        return latents


# ------------------------------------------------------------------------------------------------- counting


@dataclass
class Traffic:
    """What a process group ran: calls and bytes handed to it by this rank, by kind of collective; and waits.

    Args:
        calls: by kind, "all_to_all" or "all_gather".
        given: bytes of the tensors that this rank gave.
        waits: how often it waited for a functional collective.
    """

    calls: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)
    waits: int = 0

    def sent(self, kind: str, ranks: int) -> float:
        """Bytes that this rank sent to others, in groups of so many ranks."""
        share = {"all_to_all": (ranks - 1) / ranks, "all_gather": ranks - 1, "all_reduce": 2 * (ranks - 1) / ranks}
        return self.given[kind] * share[kind]


SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long": 8, "long int": 8, "int": 4, "bool": 1}


def traffic_of(run: Callable[[], Any]) -> tuple[Any, Traffic]:
    """What `run` returns, and the collectives that were run meanwhile, whoever asked for them.

    `torch.profiler` sees each at the process group ("gloo:all_to_all"): those of eager code, of compiled graphs, and of
    the branches of a condition that are taken.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    traffic = Traffic()
    for event in events:
        name = event.get("name", "")
        traffic.waits += name == "_c10d_functional::wait_tensor"
        of_group = re.fullmatch(r"(?:gloo|nccl):_?(all_to_all|all_gather|all_reduce)\w*", name)
        if of_group and event.get("cat") == "user_annotation":
            given = zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True)
            traffic.calls[of_group[1]] += 1
            traffic.given[of_group[1]] += sum(math.prod(shape) * SIZES[dtype] for shape, dtype in given)
    return result, traffic
