"""Many requests on one transformer: sessions, pipelines that share it, and threads, each as if it were alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import pipelines
import pytest
import torch
import zoo
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from pipelines import PipelineEntry
from pipelines.oracle import plain_and_hooked_run
from test_memory import Recording
from test_state import TIMESTEPS, Tiny, inputs
from torch import nn

import pab_fx
from pab_fx import PAB, PABConfig
from pab_fx.testing import replaying


def config_of(clock: Callable[[], Any] | None = None) -> Any:
    return zoo.diffusers_config(clock, ranges=(2, 3, 3), window=(100, 900))  # type: ignore[arg-type]


pytestmark = pytest.mark.usefixtures("no_gradients")
eagerly = pytest.mark.parametrize("inner", ["eager"], indirect=True)
as_cuda_graphs = pytest.mark.parametrize("inner", ["replaying"], indirect=True)
"""One way to run the graphs, where it decides nothing of what a test shows."""


def held(pab: PAB) -> int:
    """Bytes that caches hold, of all requests."""
    return sum(role.cache_bytes for role in pab.report().roles)


class CutOff(Exception):
    """Ends a generation early."""


# ------------------------------------------------------------------------------------- loops of one's own


class Loop:
    """A generation by hand, in cache contexts, and what diffusers' hooks make of it: a hooked copy per context.

    Args:
        model: what is called; it may be enabled.
        timesteps: one for each step.
        seed: of the first step's inputs, and of the text, which is the same tensor in every step.
        contexts: cache contexts to call the model in, in each step.
        shape: of the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Sequence[float],
        seed: int = 0,
        contexts: Sequence[str | None] = (None,),
        **shape: int,
    ) -> None:
        self.model, self.timesteps, self.seed, self.contexts, self.shape = model, timesteps, seed, contexts, shape
        shift = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        self.texts = [inputs(0, 0, **shape)["text"] + shift + i for i in range(len(contexts))]
        self.found: list[torch.Tensor] = []

    @property
    def is_done(self) -> bool:
        return len(self.found) == len(self.timesteps) * len(self.contexts)

    def calls(self) -> Iterator[tuple[float, str | None, dict[str, Any]]]:
        for step, t in enumerate(self.timesteps):
            for i, context in enumerate(self.contexts):
                yield t, context, {**inputs(self.seed + 1000 * i + step, t, **self.shape), "text": self.texts[i]}

    def step(self) -> None:
        calls = list(self.calls())[len(self.found) :][: len(self.contexts)]
        for _, context, kwargs in calls:
            with pab_fx.cache_context(context):
                self.found.append(self.model(**kwargs).clone())

    def run(self) -> Loop:
        while not self.is_done:
            self.step()
        return self

    def check(self, bare: nn.Module) -> int:
        """Assert that what was found so far is the hooks', bit for bit; the number of calls that PAB changed."""
        clock = zoo.Clock()
        copies = {context: zoo.hooked(bare, config_of(clock)) for context in self.contexts}
        changed = 0
        for found, (clock.t, context, kwargs) in zip(self.found, self.calls(), strict=False):
            expected = copies[context](**kwargs)
            assert torch.equal(found, expected), f"timestep {clock.t} of {self.timesteps} in {context}"
            changed += not torch.equal(expected, bare(**kwargs))
        return changed


@pytest.fixture
def enabled(inner: Any) -> Iterator[tuple[Tiny, Tiny, PAB]]:
    """A model under PAB, the same without, and the handle."""
    model, bare = Tiny(), Tiny()
    with pab_fx.enable(model, config_of(), inner=inner, dynamic=True) as pab:
        yield model, bare, pab


Shared = tuple[Tiny, Tiny, PAB]


def test_four_sessions_that_take_turns_step_by_step_are_each_as_if_alone(enabled: Shared) -> None:
    model, bare, pab = enabled
    loops = [
        Loop(model, TIMESTEPS),
        Loop(model, (950, 850, 750, 650, 550, 450, 350, 250, 150), 10, ("cond", "uncond")),
        Loop(model, (400, 300, 200, 50), 20, batch=2),  # image to image
        Loop(model, TIMESTEPS[1:], 30, ("cond",), length=7),
    ]
    sessions = [pab.session() for _ in loops]
    while not all(loop.is_done for loop in loops):
        for loop, session in zip(loops, sessions, strict=True):
            if not loop.is_done:
                with session:
                    loop.step()
    assert all(loop.check(bare) for loop in loops)
    assert pab.report().reused > 0
    assert pab.report().once.taken > 0  # what is computed once a generation is each session's own too


@eagerly
def test_a_session_that_is_left_alone_keeps_its_place(enabled: Shared) -> None:
    model, bare, pab = enabled
    early, session = Loop(model, TIMESTEPS), pab.session()
    with session:
        for _ in range(3):
            early.step()
    for seed in (10, 20):
        with pab.session():
            assert Loop(model, TIMESTEPS, seed).run().check(bare)
    assert Loop(model, TIMESTEPS, 30).run().check(bare)  # outside of any
    with session:
        early.run()
    assert early.check(bare)
    assert pab.report().reused > 0


@as_cuda_graphs
def test_sessions_may_be_entered_inside_of_one_another(enabled: Shared) -> None:
    model, bare, pab = enabled
    outer, inner = Loop(model, TIMESTEPS), Loop(model, TIMESTEPS[2:], 10)
    first, second = pab.session(), pab.session()
    with first:
        for _ in range(3):
            outer.step()
        with second:
            inner.step()
            with first:
                outer.step()
            inner.run()
        outer.run()
    assert outer.check(bare)
    assert inner.check(bare)
    assert pab.report().reused > 0


@eagerly
def test_tasks_of_asyncio_that_are_in_sessions_take_turns(enabled: Shared) -> None:
    """Each enters its session once and keeps it while others run."""
    model, bare, pab = enabled
    loops = [Loop(model, TIMESTEPS[i:], 10 * i, ("cond", "uncond")) for i in range(4)]
    sessions = [pab.session() for _ in loops]

    async def serve(i: int) -> None:
        with sessions[i]:
            while not loops[i].is_done:
                loops[i].step()
                await asyncio.sleep(0)

    async def serve_all() -> None:
        await asyncio.gather(*map(serve, range(4)))

    asyncio.run(serve_all())
    assert all(loop.check(bare) for loop in loops)
    assert pab.report().reused > 0


@as_cuda_graphs
def test_threads_may_be_in_one_session_at_a_time(enabled: Shared) -> None:
    """The two branches of one request, say; they leave it in the order in which they came."""
    model, bare, pab = enabled
    loops = [Loop(model, TIMESTEPS, 10 * i, (name,)) for i, name in enumerate(("cond", "uncond"))]
    session, first_is_in, first_is_out = pab.session(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def serve(loop: Loop, enters: threading.Event | None, leaves: threading.Event | None) -> None:
        try:
            with torch.no_grad():
                if leaves is not None:
                    first_is_in.wait(60)
                with session:
                    loop.step()
                    if enters is not None:
                        enters.set()
                        second_is_in.wait(60)
                    else:
                        second_is_in.set()
                        first_is_out.wait(60)
                first_is_out.set()
                with session:
                    loop.run()
        except BaseException as error:
            errors.append(error)
            first_is_in.set()
            second_is_in.set()
            first_is_out.set()

    second_is_in = threading.Event()
    with locked(model):
        threads = [
            threading.Thread(target=serve, args=(loops[0], first_is_in, None)),
            threading.Thread(target=serve, args=(loops[1], None, first_is_in)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not errors, errors
    assert all(loop.check(bare) for loop in loops)
    assert pab.report().reused > 0


@pytest.mark.parametrize("way", ["enabled", "compiled"])
def test_two_threads_in_one_request_are_told_and_the_call_that_runs_goes_on(way: str) -> None:
    """Without a session, in the middle of a call: between two graphs of an enabled model, or in the only one."""
    is_in, may_go = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            is_in.set()
            assert may_go.wait(60)

    model, bare = Tiny(between=wait if way == "enabled" else None), Tiny()
    if way == "enabled":
        called: Any = model
        pab_fx.enable(model, config_of(), inner="eager")
    else:

        def inner(gm: Any, example_inputs: Any) -> Any:
            return lambda *args: (wait(), gm.forward(*args))[1]

        called = torch.compile(model, backend=pab_fx.PABBackend(config_of(), inner=inner))
    loop = Loop(called, TIMESTEPS, 0)
    for _ in range(3):
        loop.step()
    thread = threading.Thread(target=loop.step)
    with torch.no_grad():
        thread.start()
        assert is_in.wait(60)
        with pytest.raises(RuntimeError, match=r"two threads call one model at once.*pab\.session"):
            called(**inputs(0, TIMESTEPS[3]))
        may_go.set()
        thread.join(60)
        loop.run()
    assert loop.check(bare) > 0


@pytest.mark.parametrize(
    ("where", "inner"), [("in no session", "eager"), ("in a session", "replaying")], indirect=["inner"]
)
def test_a_request_that_fails_leaves_the_others_where_they_are(enabled: Shared, where: str) -> None:
    model, bare, pab = enabled
    loops = [Loop(model, TIMESTEPS, 10 * i) for i in range(3)]
    requests = [pab.session(), pab.session(), contextlib.nullcontext()]
    if where == "in no session":  # the last one is what fails
        failing: Any = requests.pop()
        loops.pop()
    else:
        failing = pab.session()
    for step in range(len(TIMESTEPS)):
        for loop, request in zip(loops, requests, strict=True):
            with request:
                loop.step()
        with failing, contextlib.suppress(Exception):
            model(**inputs(step, TIMESTEPS[step])) if step != 2 else model(torch.ones(1, 5, 9), None, None)
    assert all(loop.check(bare) for loop in loops)
    assert pab.report().reused > 0


@as_cuda_graphs
def test_a_failed_session_starts_afresh_at_any_timestep(enabled: Shared) -> None:
    model, bare, pab = enabled
    session = pab.session()
    with session:
        failing = Loop(model, TIMESTEPS)
        for _ in range(2):
            failing.step()
        with pytest.raises(Exception):  # noqa: B017, PT011
            model(torch.ones(1, 5, 9), None, None)
        assert held(pab) == 0
        assert Loop(model, TIMESTEPS[2:], 10).run().check(bare)
    assert pab.report().reused > 0


@as_cuda_graphs
def test_a_session_gives_back_what_it_kept_when_it_goes(enabled: Shared) -> None:
    model, bare, pab = enabled
    loops = [Loop(model, TIMESTEPS, 10 * i) for i in range(3)]
    sessions = [pab.session() for _ in loops]
    sizes = [held(pab)]

    def three_steps(i: int) -> None:  # a function: up to Python 3.12 a frame that was looked at keeps its variables
        with sessions[i]:
            for _ in range(3):
                loops[i].step()

    for i in range(3):
        three_steps(i)
        sizes.append(held(pab))
    each = sizes[1] - sizes[0]
    assert each > 0
    assert sizes == [0, each, 2 * each, 3 * each]
    assert all(loop.check(bare) for loop in loops)
    assert pab.report().reused > 0
    alive = [weakref.ref(session) for session in sessions]
    while sessions:
        sessions.pop()
        gc.collect()
        assert held(pab) == each * len(sessions)
    assert [reference() for reference in alive] == [None] * 3
    assert len(pab.backend.runtime.stores()) == 1


def test_forecasts_of_sessions_that_take_turns_do_not_depend_on_what_runs_the_graphs() -> None:
    """Several slots a module, of which one is read to compute another: to the bit, as CUDA graphs or eagerly."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, order, inner in (("eager", 1, "eager"), ("replaying", 1, replaying), ("order 0", 0, replaying)):
        torch.compiler.reset()
        model = Tiny()
        config = PABConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3, forecast_order=order
        )
        with pab_fx.enable(model, config, inner=inner) as pab:
            loops = [Loop(model, TIMESTEPS, 10 * i) for i in range(2)]
            sessions = [pab.session() for _ in loops]
            for _ in (*TIMESTEPS, *TIMESTEPS):
                for loop, session in zip(loops, sessions, strict=True):
                    with session:
                        loop.step()
                    if loop.is_done:  # the next generation, in the buffers of this one
                        found.setdefault(name, []).extend(loop.found)
                        loop.found = []
            assert pab.report().reused > 0
    assert len(found["eager"]) == 4 * len(TIMESTEPS)
    assert all(map(torch.equal, found["eager"], found["replaying"]))
    assert not all(map(torch.equal, found["order 0"], found["replaying"]))


def test_with_cuda_graphs_a_session_takes_over_the_buffers_of_one_that_is_over() -> None:
    """Graphs are recorded for the addresses that they read: once for each of the sessions that run at a time."""
    model, bare, inner = Tiny(), Tiny(), Recording()
    with pab_fx.enable(model, config_of(), inner=inner) as pab:
        recorded = []
        for number in range(3):
            loops = [Loop(model, TIMESTEPS, 10 * number + i) for i in range(2)]
            sessions = [pab.session() for _ in loops]
            for _ in TIMESTEPS:
                for loop, session in zip(loops, sessions, strict=True):
                    with session:
                        loop.step()
            assert all(loop.check(bare) for loop in loops)
            del session
            sessions.clear()
            gc.collect()
            recorded.append(inner.recordings)
    assert recorded == [2 * len(inner.graphs)] * 3


def test_a_loop_after_a_pipeline_in_one_session_starts_afresh(inner: Any) -> None:
    """At a lower timestep, in the session of a pipeline's call that was cut off."""
    pipe, bare = tiny_pipeline(), Tiny()
    model = pipe.transformer
    with pab_fx.enable(pipe, config_of(), inner=inner) as pab, pab.session():
        with pytest.raises(CutOff):
            pipe(8, callback=raising_at(1))
        assert Loop(model, (400, 300, 200, 150, 50)).run().check(bare)
        assert pab.report().reused > 0


# ------------------------------------------------------------------------------ pipelines over one transformer


def sharing(pipe: Any, cls: Any = None, **kwargs: Any) -> Any:
    """Another pipeline with the components of `pipe`, apart from the scheduler: that counts steps."""
    other = (cls or type(pipe)).from_pipe(pipe, **kwargs)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


class Request:
    """A generation in a thread of its own, which does the next step when it is told to.

    Args:
        generate: runs the generation; it calls its argument after each step.
    """

    def __init__(self, generate: Callable[[Callable[[], None]], torch.Tensor]) -> None:
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._is_cut_off = False
        self.result: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.is_done = False
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        self._thread.start()

    def _run(self, generate: Callable[[Callable[[], None]], torch.Tensor]) -> None:
        self._go.acquire()
        try:
            with torch.no_grad():
                self.result = generate(self._park)
        except BaseException as error:
            # its traceback would keep the pipeline alive
            self.error = error.with_traceback(None)
        self.is_done = True
        self._parked.release()

    def _park(self) -> None:
        self._parked.release()
        self._go.acquire()
        if self._is_cut_off:
            raise CutOff

    def step(self) -> None:
        """Let it go on to the end of its next step, or to its end."""
        if self.is_done:
            return
        self._go.release()
        assert self._parked.acquire(timeout=120)
        if self.is_done:
            self._thread.join()

    def run(self) -> Request:
        while not self.is_done:
            self.step()
        return self

    def cut_off(self) -> Request:
        """Raise in it, where it is parked."""
        self._is_cut_off = True
        return self.run()


def request(pipe: Any, entry: PipelineEntry, **overrides: Any) -> Request:
    """A call of a pipeline that stops after each step."""

    def generate(park: Callable[[], None]) -> torch.Tensor:
        def callback(_: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            park()
            return kwargs

        return pipelines.run(pipe, entry, callback_on_step_end=callback, **overrides)

    return Request(generate)


def in_turns(requests: Sequence[Request]) -> None:
    while not all(each.is_done for each in requests):
        for each in requests:
            each.step()


@functools.cache
def reference(name: str, overrides: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    """What the hooks make of a generation, which is not what the bare pipeline does."""
    entry, given = pipelines.BY_NAME[name], dict(overrides)
    plain, expected = plain_and_hooked_run(entry, config_of, **given)
    assert not torch.equal(expected, plain)
    return expected


class Server:
    """Four pipelines over one enabled transformer, a call of each, and the hooks' result for it."""

    def __init__(self, *calls: tuple[str, dict[str, Any]], **options: Any) -> None:
        self.entries = [pipelines.BY_NAME[name] for name, _ in calls]
        self.calls = [overrides for _, overrides in calls]
        first = self.entries[0].build()
        self.pipes = [first]
        for entry in self.entries[1:]:
            self.pipes.append(sharing(first, getattr(diffusers, entry.class_name)))
        self.expected = []
        for entry, given in zip(self.entries, self.calls, strict=True):
            self.expected.append(reference(entry.name, tuple(given.items())))
        self.model = first.transformer
        assert all(pipe.transformer is self.model for pipe in self.pipes)
        self.pab = pab_fx.enable(first, config_of(), **{"inner": "eager", **options})

    def request(self, i: int, **further: Any) -> Request:
        return request(self.pipes[i], self.entries[i], **self.calls[i], **further)

    def check(self, i: int, found: torch.Tensor | None) -> None:
        assert found is not None
        assert torch.equal(found, self.expected[i]), (self.entries[i].name, self.calls[i])

    def close(self) -> None:
        """All is given back: caches at once, the rest with the pipelines."""
        assert self.pab.report().reused > 0
        assert held(self.pab) == 0
        alive = [weakref.ref(pipe) for pipe in self.pipes]
        self.pipes.clear()
        gc.collect()
        assert [reference() for reference in alive] == [None] * len(alive)
        assert len(self.pab.backend.runtime.stores()) == 1
        self.pab.disable()


def four(name: str, **further: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Four calls of one kind of pipeline that differ in length, size and noise."""
    seeded: list[dict[str, Any]] = [{}, {"num_inference_steps": 5}, {"num_inference_steps": 11}, {"height": 32}]
    return tuple((name, {**given, **further}) for given in seeded)


FLUX = (
    ("FluxPipeline", {}),
    ("FluxImg2ImgPipeline", {"strength": 0.5}),
    ("FluxPipeline-true_cfg", {"num_inference_steps": 6}),
    ("FluxImg2ImgPipeline", {"num_inference_steps": 12}),
)
servers = pytest.mark.parametrize(
    "calls",
    [
        pytest.param(FLUX, id="Flux"),
        pytest.param(four("LattePipeline"), id="Latte", marks=pytest.mark.slow),
        pytest.param(four("WanPipeline"), id="Wan", marks=pytest.mark.slow),  # cache contexts
        pytest.param(four("ChromaPipeline"), id="Chroma", marks=pytest.mark.slow),  # branches without
        pytest.param(four("StableDiffusion3Pipeline"), id="SD3", marks=pytest.mark.slow),
        pytest.param(four("CogVideoXPipeline"), id="CogVideoX", marks=pytest.mark.slow),
    ],
)


@servers
def test_four_pipelines_in_threads_that_take_turns_step_by_step_are_each_as_if_alone(calls: Any) -> None:
    server = Server(*calls)
    for _ in range(2):
        requests = [server.request(i) for i in range(4)]
        in_turns(requests)
        for i, each in enumerate(requests):
            assert each.error is None, each.error
            server.check(i, each.result)
    del requests, each
    server.close()


@servers
def test_a_pipeline_that_is_cut_off_or_ends_leaves_the_others_where_they_are(calls: Any) -> None:
    server = Server(*calls)
    requests = [server.request(i) for i in range(4)]
    for each in requests:
        each.step()
    for number in range(3):
        requests[1].cut_off()  # again and again, in its first, second and third step
        assert isinstance(requests[1].error, CutOff)
        requests[1] = server.request(1)
        for _ in range(number + 2):
            requests[1].step()
        requests[0].step()
    server.pipes[2].maybe_free_model_hooks()  # what a server does to clean up, between two of its steps
    in_turns(requests)
    for i in (0, 1, 3):
        server.check(i, requests[i].result)
    assert requests[2].is_done
    del requests, each
    server.close()


@contextlib.contextmanager
def locked(model: Any) -> Iterator[None]:
    """A lock around the model's calls: a model under `torch.compile` serves one at a time."""
    compiled, lock = model._compiled_call_impl, threading.Lock()

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return compiled(*args, **kwargs)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places wherever they can
    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
        sys.setswitchinterval(interval)


@servers
def test_four_pipelines_in_threads_with_a_lock_around_the_model_are_each_as_if_alone(calls: Any) -> None:
    server = Server(*calls)
    found: list[list[torch.Tensor]] = [[] for _ in calls]
    failed: list[BaseException] = []

    def serve(i: int) -> None:
        try:
            for number in range(2):
                if number == 1 and i % 2:
                    with contextlib.suppress(CutOff):
                        pipelines.run(
                            server.pipes[i], server.entries[i], **server.calls[i], callback_on_step_end=raising_at(2)
                        )
                found[i].append(pipelines.run(server.pipes[i], server.entries[i], **server.calls[i]))
        except BaseException as error:
            failed.append(error)

    with locked(server.model):
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=240)
    assert not failed, failed
    for i, results in enumerate(found):
        assert len(results) == 2
        for each in results:
            server.check(i, each)
    server.close()


def raising_at(step: int) -> Callable[..., Any]:
    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            raise CutOff
        return kwargs

    return callback


@pytest.mark.parametrize(("order", "inner"), [((0, 1), "eager"), ((1, 0), "replaying")], indirect=["inner"])
def test_pipelines_in_one_session_start_afresh_after_one_that_was_cut_off(order: tuple[int, int], inner: Any) -> None:
    """Both have counted as many generations, and the second one does not begin at a higher timestep."""
    pipes = [tiny_pipeline()]
    pipes.append(sharing(pipes[0]))
    cut_off, whole = (pipes[i] for i in order)
    expected, plain = oracle(8, seed=1), tiny_pipeline()(8, seed=1)
    assert not torch.equal(expected, plain)
    with pab_fx.enable(pipes[0], config_of(), inner=inner) as pab:
        with pab.session():
            with pytest.raises(CutOff):
                cut_off(8, seed=2, callback=raising_at(2))
            assert torch.equal(whole(8, seed=1), expected)
        assert pab.report().reused > 0
        gc.collect()
        assert held(pab) == 0


@as_cuda_graphs
def test_a_pipeline_that_runs_inside_of_another_in_one_session_is_a_request_of_its_own(inner: Any) -> None:
    outer = tiny_pipeline()
    other = sharing(outer)
    found: list[torch.Tensor] = []

    def callback(_: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            found.append(other(8, seed=1))
        return kwargs

    with pab_fx.enable(outer, config_of(), inner=inner) as pab, pab.session():
        assert torch.equal(outer(8, seed=2, callback=callback), oracle(8, seed=2))
        assert torch.equal(*found, oracle(8, seed=1))
        assert pab.report().reused > 0


def test_counts_outlive_the_request_that_was_counted() -> None:
    pipe = tiny_pipeline()
    with pab_fx.enable(pipe, config_of(), inner="eager") as pab:
        with pab.session():
            pipe(8)
        gc.collect()
        assert len(pab.backend.runtime.stores()) == 1
        assert pab.report().reused > 0


@pytest.mark.parametrize("step", range(1, 5))
def test_freeing_the_hooks_of_one_pipeline_leaves_the_others_where_they_are(step: int) -> None:
    pipe = tiny_pipeline()
    other = sharing(pipe)
    expected = oracle(8)

    def callback(_: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            other.maybe_free_model_hooks()
            thread = threading.Thread(target=other.maybe_free_model_hooks)
            thread.start()
            thread.join()
        return kwargs

    with pab_fx.enable(pipe, config_of(), inner="eager") as pab:
        assert torch.equal(pipe(8, callback=callback), expected)
        assert pab.report().reused > 0


def check_with_previews(pipe: Any, other: Any, steps: int) -> None:
    """Assert that a pipeline, and another one that runs in its callback after each step, are both as if alone."""
    previews: list[torch.Tensor] = []

    def callback(_: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        previews.append(other(steps, seed=1))
        return kwargs

    assert torch.equal(pipe(8, callback=callback), oracle(8))
    expected = oracle(steps, seed=1)
    assert all(torch.equal(each, expected) for each in previews)


@eagerly
def test_a_pipeline_that_runs_in_a_callback_of_another_leaves_it_where_it_is(inner: Any) -> None:
    pipe = tiny_pipeline()
    other = sharing(pipe)
    with pab_fx.enable(pipe, config_of(), inner=inner) as pab:
        check_with_previews(pipe, other, 4)
        assert pab.report().reused > 0


def test_a_callback_of_one_pipeline_is_not_asked_for_the_timestep_of_another() -> None:
    pipe = tiny_pipeline()
    other = sharing(pipe)
    with pab_fx.enable(pipe, config_of(lambda: pipe.current_timestep), inner="eager") as pab:
        assert torch.equal(other(6, seed=1), oracle(6, seed=1))  # the first one does not run
        check_with_previews(pipe, other, 6)
        assert pab.report().reused > 0
    assert not torch.equal(other(6, seed=1), oracle(6, seed=1))
    assert not torch.equal(pipe(8), oracle(8))


@pytest.mark.parametrize(("end", "inner"), [("interrupted", "replaying"), ("cut off", "eager")], indirect=["inner"])
def test_a_pipeline_over_a_model_that_is_only_compiled_gives_back_what_it_kept(end: str, inner: Any) -> None:
    """`torch.compile(pipe.transformer, backend=...)`: the generation ends with the pipeline's call all the same."""
    pipe = tiny_pipeline()
    backend = pab_fx.PABBackend(config_of(), inner=inner)
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    held_at: list[int] = []

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        held_at.append(sum(role.cache_bytes for role in backend.report().roles))
        if i == 2:
            pipe._interrupt = True
        return kwargs

    if end == "interrupted":
        pipe(8, callback=callback)
        assert max(held_at) > 0
        assert sum(role.cache_bytes for role in backend.report().roles) == 0
        assert torch.equal(pipe(8, strength=0.5), oracle(8, strength=0.5))
    else:
        with pytest.raises(CutOff):
            pipe(8, callback=raising_at(2))
        assert torch.equal(pipe(8), oracle(8))  # the timestep rises
    assert backend.report().reused > 0
    assert not torch.equal(oracle(8, strength=0.5), tiny_pipeline()(8, strength=0.5))


def test_a_step_may_call_the_model_once_a_branch_before_it_reads_what_it_returned(inner: Any) -> None:
    pipe, contexts = tiny_pipeline(), ("cond", "uncond")
    with pab_fx.enable(pipe, config_of(), inner=inner) as pab:
        found = pipe(8, contexts=contexts)
        assert torch.equal(found, oracle(8, contexts=contexts))
        assert pab.report().reused > 0
    assert not torch.equal(found, pipe(8, contexts=contexts))


def test_an_enabled_model_returns_what_later_calls_leave_as_it_is(enabled: Shared) -> None:
    model, _, pab = enabled
    clock, bare = zoo.Clock(), Tiny()
    hooked, found, expected = zoo.hooked(bare, config_of(clock)), [], []
    for step, t in enumerate(TIMESTEPS):
        clock.t = t
        found.append(model(**inputs(step, t)))
        expected.append(hooked(**inputs(step, t)))
    assert all(map(torch.equal, found, expected))
    assert pab.report().reused > 0


# ------------------------------------------------------------------------------------------- a pipeline for soaks


class TinyPipeline(DiffusionPipeline):
    """The loop that all pipelines of diffusers share, around a `Tiny`."""

    @property
    def current_timestep(self) -> Any:
        return self._current_timestep

    def to(self, *args: Any, **kwargs: Any) -> TinyPipeline:
        """`from_pipe` calls it; a `Tiny` is where it is."""
        return self

    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        steps: int,
        strength: float = 1.0,
        seed: int = 0,
        batch: int = 1,
        length: int = 5,
        contexts: Sequence[str | None] = (None,),
        tells: bool = True,
        callback: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        self._interrupt, self._current_timestep = False, None
        latents, text = (inputs(seed, 0, batch, length)[name] for name in ("hidden_states", "text"))
        self.scheduler.set_timesteps(steps)
        order = self.scheduler.order
        start = max(steps - int(steps * strength), 0) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        for i, t in enumerate(self.scheduler.timesteps[start:]):
            if self._interrupt:
                continue
            if tells:
                self._current_timestep = t
            outputs = []
            for context in contexts:
                inside = self.transformer.cache_context(context) if context else contextlib.nullcontext()
                with inside:
                    outputs.append(self.transformer(hidden_states=latents, text=text, timestep=t.float()))
            guided = torch.stack(outputs).mean(0).tanh()
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
            if callback is not None:
                latents = callback(self, i, t, {"latents": latents}).pop("latents", latents)
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return latents


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(),
}


def tiny_pipeline(scheduler: str = "flow", transformer: Any = None) -> TinyPipeline:
    pipe = TinyPipeline(transformer or Tiny(), SCHEDULERS[scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class HookedBranches(nn.Module):
    """In place of a transformer: a copy with diffusers' hooks for each call that a step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = zoo.Clock()
        self.copies: list[nn.Module] = []
        self.seen: Any = None

    def cache_context(self, name: str) -> Any:
        return contextlib.nullcontext()

    def step(self) -> None:
        """A step ends."""
        self.branch = 0

    branch = 0

    def forward(self, **kwargs: Any) -> torch.Tensor:
        self.clock.t = float(kwargs["timestep"])
        if self.branch == len(self.copies):
            self.copies.append(zoo.hooked(Tiny(), config_of(self.clock)))
        self.branch += 1
        return self.copies[self.branch - 1](**kwargs)  # type: ignore[no-any-return]


def oracle(steps: int, scheduler: str = "flow", **kwargs: Any) -> torch.Tensor:
    """A call of a `TinyPipeline` under diffusers' hooks."""
    branches = HookedBranches()

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        branches.step()
        return kwargs

    return tiny_pipeline(scheduler, branches)(steps, callback=callback, **kwargs)


# --------------------------------------------------------------------------------------------------------- soak


def plan(start: int, stride: int, length: int) -> tuple[float, ...]:
    """Falling timesteps, as a loop of one's own has them."""
    return tuple(float(max(start - stride * i, 1)) for i in range(length))


plans = st.builds(plan, st.sampled_from((1000, 950, 800, 500)), st.integers(20, 160), st.integers(2, 9))
shapes = st.fixed_dictionaries({"batch": st.integers(1, 3), "length": st.sampled_from((5, 7))})
branches = st.sampled_from(((None,), ("cond",), ("cond", "uncond"), (None, "cond", "uncond")))
calls = st.fixed_dictionaries(
    {
        "steps": st.integers(3, 9),
        "strength": st.sampled_from((1.0, 0.7, 0.4)),
        "contexts": st.sampled_from(((None,), ("cond", "uncond"), (None, None))),
        "tells": st.booleans(),
    }
)


def pipeline_call(pipe: TinyPipeline, given: dict[str, Any]) -> Request:
    def generate(park: Callable[[], None]) -> torch.Tensor:
        def callback(_: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            park()
            return kwargs

        return pipe(callback=callback, **given)

    return Request(generate)


class Soak(RuleBasedStateMachine):
    """A server: sessions and pipelines over one model, in any order, each as if it were alone.

    The model stays enabled from one run of the machine to the next.
    """

    model: Tiny
    pab: PAB
    generations = 0
    changed = 0
    reused = 0

    def __init__(self) -> None:
        super().__init__()
        self.bare = Tiny()
        self.sessions = [self.pab.session() for _ in range(3)]
        self.loops: list[Loop | None] = [None] * 3
        first = tiny_pipeline("flow", self.model)
        self.pipes = [first, *(TinyPipeline(self.model, SCHEDULERS[name]()) for name in ("flow Heun", "DDIM", "DPM++"))]
        self.schedulers = ["flow", "flow Heun", "DDIM", "DPM++"]
        self.requests: list[tuple[Request, dict[str, Any], str] | None] = [None] * 4
        self.seed = 0

    def next_seed(self) -> int:
        self.seed += 20
        return self.seed

    # --- loops of one's own, in sessions

    @rule(i=st.integers(0, 2), timesteps=plans, contexts=branches, shape=shapes, is_new=st.booleans())
    def begin_loop(self, i: int, timesteps: Any, contexts: Any, shape: Any, is_new: bool) -> None:
        """A generation in a new session, or where the timestep rises in the one that there is."""
        before = self.loops[i]
        self.end_loop(i)
        if before is None or is_new or timesteps[0] <= max(before.timesteps):
            self.sessions[i] = self.pab.session()
        self.loops[i] = Loop(self.model, timesteps, self.next_seed(), contexts, **shape)
        Soak.generations += 1

    @rule(i=st.integers(0, 2), steps=st.integers(1, 6))
    def step_loop(self, i: int, steps: int) -> None:
        loop = self.loops[i]
        with self.sessions[i]:
            for _ in range(steps):
                if loop is not None and not loop.is_done:
                    loop.step()

    @rule(i=st.integers(0, 2), timesteps=plans)
    def fail_in_the_model(self, i: int, timesteps: Any) -> None:
        """The call raises, and its session goes on with a generation at whatever timestep."""
        self.end_loop(i)
        with self.sessions[i], pytest.raises(Exception):  # noqa: B017, PT011
            self.model(torch.ones(1, 5, 9), None, None)
        self.loops[i] = Loop(self.model, timesteps, self.next_seed())
        Soak.generations += 1

    def end_loop(self, i: int) -> None:
        loop = self.loops[i]
        if loop is not None:
            Soak.changed += loop.check(self.bare)
        self.loops[i] = None

    # --- pipelines, in threads

    @rule(i=st.integers(0, 3), given=calls, shape=shapes)
    def begin_call(self, i: int, given: Any, shape: Any) -> None:
        self.end_call(i)
        name = self.schedulers[i]
        if name == "DDIM":  # it counts no steps: a pipeline that tells nothing cannot make two calls in a step
            given = {**given, "tells": given["tells"] or len(given["contexts"]) > 1}
        given = {**given, **shape, "seed": self.next_seed()}
        self.requests[i] = pipeline_call(self.pipes[i], given), given, name
        Soak.generations += 1

    @rule(i=st.integers(0, 3), steps=st.integers(1, 6))
    def step_call(self, i: int, steps: int) -> None:
        running = self.requests[i]
        for _ in range(steps):
            if running is not None:
                running[0].step()

    @rule(i=st.integers(0, 3), how=st.sampled_from(("finish", "cut off", "interrupt")))
    def end_call(self, i: int, how: str = "finish") -> None:
        if (running := self.requests[i]) is None:
            return
        self.requests[i] = None
        request, given, scheduler = running
        if how == "cut off" and not request.is_done:
            request.cut_off()
            assert isinstance(request.error, CutOff)
            return
        if how == "interrupt" and not request.is_done:
            self.pipes[i]._interrupt = True
            request.run()
            assert request.error is None
            return
        request.run()
        assert request.error is None, request.error
        assert request.result is not None
        assert torch.equal(request.result, oracle(scheduler=scheduler, **given)), given

    @rule(i=st.integers(0, 3), name=st.sampled_from(tuple(SCHEDULERS)))
    def swap_scheduler(self, i: int, name: str) -> None:
        self.end_call(i)
        self.schedulers[i], self.pipes[i].scheduler = name, SCHEDULERS[name]()

    @rule(i=st.integers(0, 3))
    def free_hooks(self, i: int) -> None:
        """Between two calls."""
        self.end_call(i)
        self.pipes[i].maybe_free_model_hooks()

    @rule(i=st.integers(0, 3))
    def replace_pipeline(self, i: int) -> None:
        self.end_call(i, "cut off")
        self.pipes[i] = TinyPipeline(self.model, SCHEDULERS[self.schedulers[i]]())

    @invariant()
    def nothing_is_kept_of_requests_that_are_gone(self) -> None:
        assert len(self.pab.backend.runtime.stores()) <= 1 + len(self.sessions) + len(self.pipes)

    def teardown(self) -> None:
        for i in range(3):
            self.end_loop(i)
        for i in range(4):
            self.end_call(i, "cut off" if i % 2 else "finish")
        Soak.reused += self.pab.report().reused
        self.sessions.clear()
        self.pipes.clear()
        gc.collect()
        assert held(self.pab) == 0
        assert len(self.pab.backend.runtime.stores()) == 1


def soak(runs: int, steps: int, inner: Any = "eager") -> None:
    Soak.generations = Soak.changed = Soak.reused = 0
    Soak.model = Tiny()
    with pab_fx.enable(Soak.model, config_of(), inner=inner, dynamic=True) as Soak.pab:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Soak,
            settings=settings(
                max_examples=runs,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert Soak.changed > 0
        assert Soak.reused > 0


@as_cuda_graphs
def test_20_generations_on_one_model_are_each_as_if_alone(inner: Any) -> None:
    soak(2, 60, inner)
    assert Soak.generations >= 20


@pytest.mark.slow
def test_1000_generations_on_one_model_are_each_as_if_alone() -> None:
    soak(runs=60, steps=80)
    assert Soak.generations >= 1000
