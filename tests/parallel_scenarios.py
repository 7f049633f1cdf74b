"""What each of several ranks does in the tests of parallelism; see `parallel_ranks`.

A scenario returns what its rank saw. Rank 0 also runs the same alone, without the others, where that is to be compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import parallel
import pipelines.video
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import zoo
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from parallel_models import BLOCKS, CONFIG, MODELS, TIMESTEPS, StepSeen
from test_blocks import DiT, build, inputs
from torch.distributed.device_mesh import init_device_mesh

import pab_fx
from pab_fx import Blocks, Change, Policy, Residual


class Model:
    """A model of `MODELS` and the clock of its config.

    Args:
        name: in `MODELS`.
        forecast_order: of the config.
        blocks: whether blocks are skipped as a whole, in place of what the config says.
        changes: other options of `pab_fx.enable`.
    """

    def __init__(self, name: str, forecast_order: int = 0, blocks: bool = False, **changes: Any) -> None:
        self.entry, self.clock = MODELS[name], zoo.Clock()
        config = dataclasses.replace(CONFIG, current_timestep_callback=self.clock, forecast_order=forecast_order)
        self.config = BLOCKS if blocks else config
        self.model: Any = self.entry.build()
        self.options = changes
        self.backend: Any = None

    def step(self, t: float, number: int, call: Callable[..., Any] | None = None) -> StepSeen:
        before = Counter() if self.backend is None else Counter(self.backend.runtime.counts)
        self.clock.t = t
        outputs = tuple(
            output.clone() for output in zoo.call(self.entry, self.model if call is None else call, t, seed=number)
        )
        after = Counter() if self.backend is None else Counter(self.backend.runtime.counts)
        return StepSeen(outputs, Counter({role: n for (role, reused), n in (after - before).items() if not reused}))

    def generation(
        self, records: bool = False, timesteps: Sequence[float] = TIMESTEPS, call: Callable[..., Any] | None = None
    ) -> list[StepSeen]:
        """A generation's steps; with their collectives, if they are recorded."""
        steps = []
        for number, t in enumerate(timesteps):
            if not records:
                steps.append(self.step(t, number, call))
                continue
            seen, traffic = parallel.traffic_of(lambda t=t, number=number: self.step(t, number, call))
            steps.append(dataclasses.replace(seen, collectives=traffic.calls, waits=traffic.waits))
        return steps

    @contextlib.contextmanager
    def enabled(self) -> Iterator[pab_fx.PAB]:
        with pab_fx.enable(self.model, self.config, **self.options) as pab:
            self.backend = pab.backend
            yield pab
        self.backend = None


def alone(name: str, **options: Any) -> list[StepSeen] | None:
    """The generation with PAB in one process, on rank 0."""
    if dist.get_rank() != 0:
        return None
    single = Model(name, **options)
    with single.enabled():
        return single.generation()


def sequence(
    model: str, ring: int = 1, ulysses: int = 1, through_backend: bool = False, inner: str = "eager", **options: Any
) -> dict[str, Any]:
    """A generation with PAB and one without, on a model that is spread over the ranks.

    Args:
        ring, ulysses: degrees of diffusers' context parallelism.
        through_backend: compile by `torch.compile(model, backend=PABBackend(...))` in place of `enable`.
        options: of `PABBackend`, and `forecast_order` and `blocks` of `Model`.
    """
    options["inner"] = inner
    if ring > 1:
        _let_attention_return_its_sums()
    spread = Model(model, **options)
    plan = _plan_of(spread.model)
    spread.model.enable_parallelism(
        config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses), cp_plan=plan
    )
    seen: dict[str, Any] = {"alone": alone(model, **options)}
    if through_backend:
        seen["without"] = spread.generation(records=True)
        spread.backend = pab_fx.PABBackend(spread.config, **spread.options)
        compiled = torch.compile(spread.model, backend=spread.backend)
        seen["first"] = spread.generation(call=compiled)
        seen["with"] = spread.generation(records=True, call=compiled)
        seen["graphs"], spread.backend = len(spread.backend.graphs), None
        return seen
    with spread.enabled() as pab:
        seen["first"] = spread.generation()
        seen["with"] = spread.generation(records=True)
        seen["graphs"] = len(pab.backend.graphs)
    seen["without"] = spread.generation(records=True)
    return seen


def _plan_of(model: Any) -> dict[str, Any]:
    """The model's own plan; Helios' names 40 blocks, whatever there are."""
    names = dict(model.named_modules())
    return {name: plan for name, plan in model._cp_plan.items() if "*" in name or name in names}


def _let_attention_return_its_sums() -> None:
    """Give diffusers what its ring needs and has on GPUs only: an attention that returns its log-sum-exp.

    What it does on a CPU without that: `test_ring_is_refused_by_diffusers_on_a_cpu`.
    """

    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: Any,
                gqa: bool, return_lse: bool = False, **kwargs: Any) -> Any:  # fmt: skip
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = flash(query, key, value, dropout, causal, attn_mask=mask, scale=scale)
        return (out.transpose(1, 2), sums.transpose(1, 2)) if return_lse else out.transpose(1, 2)

    attention_dispatch._native_attention_forward_op = forward


def ring_without_sums() -> str:
    """What diffusers says to a ring with its attention on a CPU."""
    spread = Model("wan")
    spread.model.enable_parallelism(config=ContextParallelConfig(ring_degree=dist.get_world_size()))
    try:
        spread.step(900.0, 0)
    except ValueError as error:
        return str(error)
    return ""


def lockstep(model: str) -> dict[str, list[StepSeen]]:
    """Generations in which one rank is late, or is interrupted while the other ones have been told to stop."""
    spread, rank = Model(model, inner="eager"), dist.get_rank()
    spread.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    seen = {}
    with spread.enabled() as pab:
        seen["expected"] = spread.generation()
        seen["one is late"] = [_late_on(rank == 1 and n in (1, 2, 5), spread, t, n) for n, t in enumerate(TIMESTEPS)]
        _interrupted(spread, rank, steps=4)
        seen["one was interrupted"] = spread.generation()
        _interrupted(spread, rank, steps=1)  # whether the first timestep begins a generation, only rank 0 would know
        pab.reset()
        seen["one was interrupted, all were reset"] = spread.generation()
    return seen


def _late_on(is_late: bool, model: Model, t: float, number: int) -> StepSeen:
    if is_late:
        time.sleep(0.3)
    return model.step(t, number)


def _interrupted(model: Model, rank: int, steps: int) -> None:
    """So many steps on each rank, and then on rank 0 one that fails before anything is exchanged."""
    model.generation(timesteps=TIMESTEPS[:steps])
    if rank == 0:
        with contextlib.suppress(KeyboardInterrupt), _failing(model):
            model.step(TIMESTEPS[steps], steps)


@contextlib.contextmanager
def _failing(model: Model) -> Iterator[None]:
    """The model's clock is interrupted when it is asked, which it is inside of the model's call."""

    class Interrupted(zoo.Clock):
        def __call__(self) -> float:
            raise KeyboardInterrupt

    model.clock.__class__ = Interrupted
    try:
        yield
    finally:
        model.clock.__class__ = zoo.Clock


def signal() -> dict[str, Any]:
    """Decisions of a model whose tokens are spread over the ranks, of which only the last one's change much."""

    class Spread(DiT):
        def run(self, streams: tuple[torch.Tensor, ...], embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (x,) = super().run(streams, embedding)
            every = funcol.all_gather_tensor(x.contiguous(), 0, dist.group.WORLD)
            return (x + 0.1 * every.mean(dim=0, keepdim=True),)

    def decisions(model: torch.nn.Module, moves: bool) -> list[int]:
        policy, found = Policy(Blocks(1), Change(Blocks(0, 1), 0.05), Residual()), []
        with torch.no_grad(), pab_fx.enable(model, policy, inner="eager") as pab:
            for step, t in enumerate(TIMESTEPS):
                x, _, text = inputs(step if moves else 0, 1000.0)
                model(x * (1 + step if moves else 1), torch.full((2,), float(t)), text)
                found.append(pab.backend.runtime.counts["blocks", True])
        return found

    is_last = dist.get_rank() == dist.get_world_size() - 1
    return {"together": decisions(build(Spread), is_last), "apart": decisions(build(DiT), is_last)}


class _Stop(Exception):
    """One rank's own."""


def pipeline() -> dict[str, torch.Tensor]:
    """Latents of Wan's pipeline, with guidance: timesteps, contexts and the end of a generation are read off it."""
    rank = dist.get_rank()

    def run(pipe: Any, at_step: Callable[[Any, int], None] = lambda pipe, step: None) -> torch.Tensor:
        def at_end(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
            at_step(pipe, step)
            return kwargs

        draw = zoo.Draw(0)
        embeds = {"prompt_embeds": draw.fixed(1, 7, 16), "negative_prompt_embeds": draw.fixed(1, 7, 16)}
        sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 9}
        generator = torch.Generator().manual_seed(0)
        return pipe(**embeds, **sizes, generator=generator, output_type="latent", callback_on_step_end=at_end).frames  # type: ignore[no-any-return]

    def made() -> Any:
        pipe = pipelines.video._wan()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def late(pipe: Any, step: int) -> None:
        time.sleep(0.2 * (rank == 1 and step % 3 == 1))

    def interrupted(pipe: Any, step: int) -> None:
        if step == 3 and rank == 0:
            raise _Stop
        pipe._interrupt = step >= 3

    seen: dict[str, torch.Tensor] = {}
    if rank == 0:
        pipe = made()
        seen["alone, without PAB"] = run(pipe)
        with pab_fx.enable(pipe, CONFIG, inner="eager"):
            seen["alone"] = run(pipe)
    pipe = made()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    with pab_fx.enable(pipe, CONFIG, inner="eager"):
        seen["first"] = run(pipe)
        seen["one is late"] = run(pipe, late)
        with contextlib.suppress(_Stop):
            run(pipe, interrupted)
        seen["one was interrupted"] = run(pipe)
    return seen


def guidance(ulysses: int = 1) -> dict[str, Any]:
    """Two branches on two groups of ranks, and in turn on rank 0 alone."""
    mesh = init_device_mesh("cpu", (2, 1, ulysses), mesh_dim_names=("guidance", "ring", "ulysses"))
    branches, branch = mesh["guidance"].get_group(), mesh["guidance"].get_local_rank()
    draw = zoo.Draw(0)
    texts = (draw.fixed(1, 7, 16), draw.fixed(1, 7, 16))
    seen: dict[str, Any] = {"branch": branch}

    def generate(model: Model, predict: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]) -> torch.Tensor:
        latents = zoo.Draw(7).noise(1, 4, 4, 8, 8)
        for t in TIMESTEPS:
            model.clock.t = t
            cond, uncond = predict(latents, torch.tensor([float(t)]))
            latents = latents - 0.1 * (uncond + 5.0 * (cond - uncond))
        return latents

    spread = Model("wan", inner="eager")
    if ulysses > 1:
        spread.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ulysses, mesh=mesh))

    def exchanged(latents: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
        own = spread.model(latents, t, texts[branch], return_dict=False)[0]
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own.contiguous(), group=branches)
        return both

    with spread.enabled() as pab:
        generate(spread, exchanged)
        before = Counter(pab.backend.runtime.counts)
        seen["latents"], traffic = parallel.traffic_of(lambda: generate(spread, exchanged))
        seen["counts"], seen["collectives"] = Counter(pab.backend.runtime.counts) - before, traffic.calls
    if dist.get_rank() == 0:
        single = Model("wan", inner="eager")

        def in_turn(latents: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
            outputs = []
            for name, text in zip(("cond", "uncond"), texts, strict=True):
                with pab_fx.cache_context(name):
                    outputs.append(single.model(latents, t, text, return_dict=False)[0])
            return outputs

        seen["without PAB"] = generate(single, in_turn)
        with single.enabled():
            seen["alone"] = generate(single, in_turn)
    return seen
