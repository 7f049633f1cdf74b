"""Counters and caches belong to one model instance in one cache context, and to one generation."""

import contextlib
import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from diffusers import CacheMixin
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import pab_fx
from pab_fx import Attentions, Every, PABBackend, PABConfig, Policy

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])
ways = pytest.mark.parametrize(
    ("lowering", "inner"), [("specialize", "replaying"), ("cond", "eager")], indirect=["inner"]
)
"""Each lowering, and each way to run the graphs; where all four pairs matter, `lowerings` and the fixture `inner`."""


pytestmark = pytest.mark.usefixtures("no_gradients")


class Attention(nn.Module, AttentionModuleMixin):
    """What diffusers' hooks take for an attention, small enough to be traced in no time."""

    def __init__(self, channels: int, text_channels: int | None = None) -> None:
        super().__init__()
        self.is_cross_attention = text_channels is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(text_channels or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        key = self.to_kv(x if text is None else text)
        return self.to_out(scaled_dot_product_attention(self.to_q(x), key, key))


class Block(nn.Module):
    """Self-attention and cross-attention on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn1 = Attention(8)
        self.attn2 = Attention(8, 6)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm(x))
        return x + self.attn2(x, text)


class Tiny(nn.Module, CacheMixin):
    """A transformer of two blocks: the smallest one with all that state hangs on.

    Args:
        between: is called between the blocks, out of Dynamo's sight: the graph breaks there.
    """

    def __init__(self, seed: int = 0, between: Callable[[], None] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([Block(), Block()])
        self.between = torch.compiler.disable(between) if between else None
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states + 0.01 * timestep
        for block in self.blocks:
            x = block(x, text)
            if self.between is not None:
                self.between()
        return x


def inputs(step: int, t: float, batch: int = 1, length: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a `Tiny` is called with in a step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(batch, length, 8, generator=generator).to(dtype),
        "text": text_of(batch, dtype),
        "timestep": torch.tensor(float(t), dtype=dtype),
    }


@functools.cache
def text_of(batch: int, dtype: torch.dtype) -> torch.Tensor:
    """The same tensor in every step, as that of a prompt is."""
    with torch.inference_mode(False):
        return torch.linspace(-1, 1, 18).reshape(1, 3, 6).repeat(batch, 1, 1).to(dtype)


class Run:
    """One model under PAB and its oracle: a copy with diffusers' hooks, reset where a generation begins."""

    def __init__(self, model: nn.Module, compiled: Callable[..., torch.Tensor], clock: zoo.Clock) -> None:
        self.compiled, self.clock = compiled, clock
        self.plain = copy.deepcopy(model)
        self.plain.__dict__.pop("_compiled_call_impl", None)
        self.oracle = zoo.hooked(self.plain, CONFIG(clock))
        self.differs = 0

    def begin(self) -> "Run":
        """Tell the oracle, and nobody else, that a generation begins."""
        self.oracle._reset_stateful_cache()  # type: ignore[operator]
        return self

    def step(self, number: int, t: float, **shape: Any) -> None:
        """One step, equal to the oracle's bit for bit."""
        self.clock.t = t
        kwargs = inputs(number, t, **shape)
        expected, plain = self.oracle(**kwargs), self.plain(**kwargs)
        found = self.compiled(**kwargs)
        assert torch.equal(found, expected), f"step {number} at timestep {t}"
        self.differs += not torch.equal(found, plain)

    def steps(self, timesteps: Iterable[float], first: int = 0, **shape: Any) -> "Run":
        for number, t in enumerate(timesteps, first):
            self.step(number, t, **shape)
        return self


def CONFIG(clock: zoo.Clock) -> Any:
    return zoo.diffusers_config(clock, ranges=(2, None, 3))


def compiled_run(
    model: nn.Module, lowering: str = "specialize", inner: Any = "eager", **options: Any
) -> tuple[Run, PABBackend]:
    clock = zoo.Clock()
    backend = PABBackend(CONFIG(clock), inner=inner, lowering=lowering, **options)
    return Run(model, torch.compile(model, backend=backend), clock), backend


def held(backend: PABBackend) -> int:
    """Bytes that the backend's caches hold."""
    return sum(role.cache_bytes for role in backend.report().roles)


# ------------------------------------------------------------------------------------------------- generations


@lowerings
def test_generations_one_after_another_start_afresh(lowering: str, inner: Any) -> None:
    run, backend = compiled_run(Tiny(), lowering, inner)
    for number in range(3):
        run.begin().steps(TIMESTEPS, first=10 * number)
        assert backend.report().reused == (number + 1) * 2 * (3 + 4)
    assert run.differs == 3 * 5
    assert len(backend.graphs) == 1


@ways
@pytest.mark.parametrize("cut_off_after", [2, 3, 6])
def test_new_generation_after_an_aborted_one_starts_afresh(lowering: str, cut_off_after: int, inner: Any) -> None:
    run, _ = compiled_run(Tiny(), lowering, inner)
    with contextlib.suppress(KeyboardInterrupt):
        run.begin().steps(TIMESTEPS[:cut_off_after])
        raise KeyboardInterrupt
    run.begin().steps(TIMESTEPS, first=10)
    assert run.differs > 0


@pytest.mark.parametrize("restart", [900, 800, 750], ids=["at the same timestep", "below", "inside the window"])
def test_new_generation_after_one_aborted_in_its_first_step_starts_afresh_where_timesteps_are_known(
    restart: float,
) -> None:
    running: list[tuple[float, ...]] = [TIMESTEPS]
    run, _ = compiled_run(Tiny(), timesteps=lambda: running[-1])
    run.begin().step(0, TIMESTEPS[0])
    running.append((restart, *(t for t in TIMESTEPS if t < restart)))
    run.begin().steps(running[-1], first=10)
    assert run.differs > 0


def test_new_generation_at_a_lower_timestep_starts_afresh_after_a_reset() -> None:
    run, backend = compiled_run(Tiny())
    run.begin().steps(TIMESTEPS[:2])
    backend.reset()
    run.begin().steps(TIMESTEPS[2:], first=10)
    assert run.differs > 0


@lowerings
def test_new_generation_after_an_exception_inside_a_graph_starts_afresh(lowering: str) -> None:
    failing: list[bool] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            if failing:
                raise RuntimeError("out of memory")
            return gm(*args)

        return compiled

    clock = zoo.Clock()
    model = Tiny()
    backend = PABBackend(CONFIG(clock), inner=compiler, lowering=lowering)
    run = Run(model, torch.compile(model, backend=backend), clock)
    run.begin().steps(TIMESTEPS[:3])
    failing.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.compiled(**inputs(3, 500))
    assert held(backend) == 0
    failing.clear()
    run.begin().steps(TIMESTEPS[3:], first=10)  # the rest of the schedule, as image-to-image would run it
    assert run.differs > 0


@pytest.mark.parametrize("enabled", [False, True])
def test_new_generation_after_an_exception_between_graphs_starts_afresh(enabled: bool, inner: Any) -> None:
    failing: list[bool] = []

    def between() -> None:
        if failing and failing.pop():
            raise RuntimeError("interrupted")

    clock, model = zoo.Clock(), Tiny(between=between)
    if enabled:
        pab_fx.enable(model, CONFIG(clock), inner=inner)
        run = Run(model, model, clock)
    else:
        run = Run(model, torch.compile(model, backend=PABBackend(CONFIG(clock), inner=inner)), clock)
    run.begin().steps(TIMESTEPS[:3])
    failing[:] = [True]
    clock.t = TIMESTEPS[3]
    with pytest.raises(RuntimeError, match="interrupted"):
        run.compiled(**inputs(3, TIMESTEPS[3]))
    # The first block has counted the step that failed, the second has not.
    following = TIMESTEPS[3:] if enabled else TIMESTEPS
    run.begin().steps(following, first=10)
    assert run.differs > 0


@ways
def test_batch_size_resolution_and_dtype_may_change_between_generations(lowering: str, inner: Any) -> None:
    model = Tiny()
    run, _ = compiled_run(model, lowering, inner)
    for first, shape in enumerate(({}, {"batch": 2}, {"length": 7}, {})):
        before = run.differs
        run.begin().steps(TIMESTEPS, first=10 * first, **shape)
        assert run.differs > before
    for part in (model, run.oracle, run.plain):
        part.double()
    run.begin().steps(TIMESTEPS, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "lowering", "inner"),
    [({"batch": 2}, "specialize", "replaying"), ({"length": 7}, "cond", "eager")],
    indirect=["inner"],
)
def test_tensors_of_another_shape_start_a_generation_even_where_the_timestep_does_not_rise(
    lowering: str, shape: dict[str, int], inner: Any
) -> None:
    run, _ = compiled_run(Tiny(), lowering, inner)
    run.begin().steps((700, 650))
    run.begin().steps((600, 550, 500, 450), first=10, **shape)
    assert run.differs > 1


@ways
def test_dynamic_shapes_need_one_capture(lowering: str, inner: Any) -> None:
    clock, model = zoo.Clock(), Tiny()
    backend = PABBackend(CONFIG(clock), inner=inner, lowering=lowering)
    run = Run(model, torch.compile(model, backend=backend, dynamic=True), clock)
    for batch, length in ((2, 5), (3, 7), (2, 6)):
        run.begin().steps(TIMESTEPS, batch=batch, length=length)
    assert run.differs == 3 * 5
    assert len(backend.graphs) == 1


def test_caches_made_in_inference_mode_are_read_without_it(inner: Any) -> None:
    run, _ = compiled_run(Tiny(), inner=inner)
    with torch.inference_mode():
        run.begin().steps(TIMESTEPS[:2])
    run.steps(TIMESTEPS[2:], first=2)
    assert run.differs > 1


# ------------------------------------------------------------------------------------------------------ owners


@ways
def test_two_models_with_one_backend_object_keep_their_state_apart(lowering: str, inner: Any) -> None:
    clock = zoo.Clock()
    backend = PABBackend(CONFIG(clock), inner=inner, lowering=lowering)
    runs = []
    for seed in range(2):
        model = Tiny(seed)
        runs.append(Run(model, torch.compile(model, backend=backend), clock).begin())
    # The second model is a step behind the first, and starts its second generation in the middle of the first's.
    first, second = (900, 700, 600, 500, 400, 300), (900, 800, 500, 900, 700, 600)
    for number, (t, other) in enumerate(zip(first, second, strict=True)):
        runs[0].step(number, t)
        if number == 3:
            runs[1].begin()
        runs[1].step(number, other)
    assert all(run.differs > 1 for run in runs)


def test_resetting_one_model_leaves_the_other_where_it_is(inner: Any) -> None:
    clock = zoo.Clock()
    backend = PABBackend(CONFIG(clock), inner=inner)
    models = [Tiny(seed) for seed in range(2)]
    runs = [Run(model, torch.compile(model, backend=backend), clock).begin() for model in models]
    for run in runs:
        run.steps((700, 600))
    models[0]._reset_stateful_cache()  # what a pipeline calls when it is done
    runs[0].begin().steps((600, 550), first=10)
    runs[1].steps((550, 500), first=2)
    assert all(run.differs > 1 for run in runs)


@pytest.mark.parametrize(
    ("shared", "lowering", "inner"),
    [(False, "specialize", "replaying"), (True, "cond", "eager")],
    ids=["", "with a weight in common"],
    indirect=["inner"],
)
def test_one_blocks_code_serves_all_blocks_with_a_cache_each(lowering: str, shared: bool, inner: Any) -> None:
    clock, model = zoo.Clock(), Tiny()
    if shared:
        model.blocks[1].attn1.to_kv.weight = model.blocks[0].attn1.to_kv.weight
    run = Run(model, model, clock)
    backend = PABBackend(CONFIG(clock), inner=inner, lowering=lowering)
    for block in model.blocks:
        block.compile(backend=backend)  # type: ignore[operator]
    run.begin().steps(TIMESTEPS).begin().steps(TIMESTEPS, first=10)
    assert run.differs == 2 * 5
    assert len(backend.graphs) == 1
    assert [(role.role, role.modules) for role in backend.report().roles] == [("spatial", 2), ("cross", 2)]


def test_a_block_that_is_compiled_alone_is_timed_by_the_model_around_it() -> None:
    clock, model = zoo.Clock(), Tiny()
    run = Run(model, model, clock)
    config = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
    backend = PABBackend(config, inner="eager")  # no callback: the blocks' graphs have no timestep
    for block in model.blocks:
        block.compile(backend=backend)  # type: ignore[operator]
    run.begin().steps(TIMESTEPS)
    assert run.differs == 5


def test_a_model_without_a_timestep_is_not_timed_by_another_model() -> None:
    class Encoder(nn.Module):
        """A text encoder, say, that somebody compiles with the same backend."""

        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(6).requires_grad_(False)

        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return self.attn(text)  # type: ignore[no-any-return]

    backend = PABBackend(PABConfig(spatial_attention_block_skip_range=2), inner="eager")
    encoder, model = Encoder(), Tiny()
    compiled_encoder = torch.compile(encoder, backend=backend)
    torch.compile(model, backend=backend)(**inputs(0, 500))  # a generation that was cut off in the window
    with pytest.warns(UserWarning, match="timestep"):
        compiled_encoder(torch.randn(1, 3, 6))
    prompt = torch.randn(1, 3, 6)
    assert torch.equal(compiled_encoder(prompt), encoder(prompt))


class Named(nn.Module):
    """A model that calls its timestep something else than diffusers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        (timestep,) = named.values()
        return self.model(hidden_states, text, timestep)  # type: ignore[no-any-return]


def steps_of(model: Callable[..., torch.Tensor], name: str, pairs: bool = False) -> list[torch.Tensor]:
    """A generation in which each input is the step's own; every step twice with `pairs`."""
    found = []
    for i, t in enumerate(TIMESTEPS):
        given = inputs(i, t)
        given[name] = given.pop("timestep")
        found += [model(**given).clone() for _ in range(1 + pairs)]
    return found


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "time"])
def test_a_timestep_is_known_by_any_of_its_names(name: str) -> None:
    model = Named()
    plain = steps_of(model, name)
    with pab_fx.enable(model, spatial_attention_block_skip_range=2, inner="eager") as pab:
        found = steps_of(model, name)
        reused = [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
        assert reused == [False, True, False, True, False, True, False]  # 900 and 50 are outside of PAB's range
        assert pab.report().reused == 2 * 3


def test_without_a_timestep_it_is_said_what_that_means_and_calls_are_taken_for_steps() -> None:
    model = Named()
    with pab_fx.enable(model, Policy(Attentions(), Every(2)), inner="eager") as pab:
        with pytest.warns(UserWarning, match="an argument called timestep or timesteps or t or time, so a rule that"):
            steps_of(model, "signal")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of calls without a timestep none looks like a second branch
            steps_of(model, "signal", pairs=True)
        assert pab.report().reused > 0


def test_an_attention_that_runs_before_the_timestep_is_read_is_timed_by_its_own_step() -> None:
    class Refining(Tiny):
        """Its first block is a graph of its own, which takes no timestep."""

        def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](hidden_states, text)
            self.between()
            return self.blocks[1](x + 0.01 * timestep, text)  # type: ignore[no-any-return]

    clock, model = zoo.Clock(), Refining(between=lambda: None)
    config = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
    run = Run(model, torch.compile(model, backend=PABBackend(config, inner="eager")), clock)
    run.begin().steps((900, 700, 600, 500))  # cut off in the window
    run.begin().steps(TIMESTEPS, first=10)
    assert run.differs > 5


def test_a_text_that_each_step_makes_in_an_earlier_graph_is_none_that_stays_the_same(inner: Any) -> None:
    """A CUDA graph returns it in the same tensor at the same version in every step."""

    class Modulating(Tiny):
        def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            text = text * (1 + timestep / 1000)
            torch._dynamo.graph_break()
            x = hidden_states + 0.01 * timestep
            for block in self.blocks:
                x = block(x, text)
            return x

    run, backend = compiled_run(Modulating(), inner=inner)
    run.begin().steps(TIMESTEPS)
    assert run.differs == 5
    assert backend.report().reused > 0


def test_a_timestep_that_is_a_number_starts_a_generation_when_it_rises() -> None:
    clock, model = zoo.Clock(), Tiny()
    config = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
    backend = PABBackend(config, inner="eager")  # Dynamo makes the first value a constant of the graph
    compiled = torch.compile(model, backend=backend)
    run = Run(model, lambda timestep, **kwargs: compiled(timestep=timestep.item(), **kwargs), clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.begin().steps((700, 600, 500, 400, 300))
        run.begin().steps((700, 600, 500, 400, 300), first=10)
    assert run.differs == 2 * 4


# ---------------------------------------------------------------------------------------------- cache contexts


@ways
@pytest.mark.parametrize("how", ["diffusers", "pab_fx"])
def test_each_cache_context_has_counters_and_caches_of_its_own(lowering: str, how: str, inner: Any) -> None:
    clock, model = zoo.Clock(), Tiny()
    backend = PABBackend(CONFIG(clock), inner=inner, lowering=lowering)
    compiled = torch.compile(model, backend=backend)
    runs = {name: Run(model, compiled, clock).begin() for name in ("cond", "uncond", None)}
    for number, t in enumerate(TIMESTEPS):
        for i, (name, run) in enumerate(runs.items()):
            if name == "uncond" and number == 2:
                continue  # a branch that is left out of a step, as guidance intervals do
            enter = pab_fx.cache_context if how == "pab_fx" else model.cache_context
            with enter(name) if name is not None else contextlib.nullcontext():
                run.step(100 * i + number, t)
    assert all(run.differs >= 4 for run in runs.values())
    assert len(backend.graphs) == 1
    model._reset_stateful_cache()
    assert held(backend) == 0


def test_a_cache_context_ends_with_its_block_also_after_an_exception() -> None:
    from pab_fx.run.contexts import current_cache_context

    model = Tiny()
    PABBackend(inner="eager")
    for enter in (pab_fx.cache_context, model.cache_context):
        with contextlib.suppress(RuntimeError), enter("cond"):
            with pab_fx.cache_context("inner"):
                assert current_cache_context.get() == "inner"
            assert current_cache_context.get() == "cond"
            raise RuntimeError
        assert current_cache_context.get() is None


def test_the_end_of_a_pipelines_call_gives_the_caches_back(inner: Any) -> None:
    run, backend = compiled_run(model := Tiny(), inner=inner)
    run.begin().steps(TIMESTEPS[:3])
    assert held(backend) > 0
    model._reset_stateful_cache()
    assert held(backend) == 0
    run.begin().steps(TIMESTEPS[2:], first=10)
    assert run.differs > 2


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("enabled", "inner"), [(False, "replaying"), (True, "eager")], indirect=["inner"])
def test_deleting_a_model_frees_its_caches(enabled: bool, inner: Any) -> None:
    def three_steps() -> tuple[nn.Module, Callable[..., torch.Tensor], list[weakref.ref[Any]]]:
        clock, model = zoo.Clock(), Tiny()
        if enabled:
            compiled, backend = model, pab_fx.enable(model, CONFIG(clock), inner=inner).backend
        else:
            backend = PABBackend(CONFIG(clock), inner=inner)
            compiled = torch.compile(model, backend=backend)
            keep_backends.append(backend)
        for number, t in enumerate(TIMESTEPS[:3]):
            clock.t = t
            compiled(**inputs(number, t))
        kept = [cache for *_, cell in backend.runtime.state.cells() for cache in cell.caches or ()]
        return model, compiled, [weakref.ref(model), *map(weakref.ref, kept)]

    keep_backends: list[PABBackend] = []  # a backend object may well outlive the models it compiled
    model, compiled, alive = three_steps()
    assert len(alive) > 1
    del model, compiled
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_resolutions_that_came_leave_nothing_behind_a_reset() -> None:
    """With conditions, a tensor stands in for each slot that is not read: of the resolution that is in use."""
    model = Tiny()
    with pab_fx.enable(model, PABConfig(), inner="eager", lowering="cond", dynamic=True) as pab:
        model(**inputs(0, TIMESTEPS[0]))
        pab.reset()
        before = tensors_of_length(range(20, 26))
        for length in range(20, 26):
            for t in TIMESTEPS[:3]:
                model(**inputs(0, t, length=length))
        assert pab.report().reused > 0
        assert len(tensors_of_length(range(20, 25))) == len(before) == 0
        pab.reset()
        assert not tensors_of_length(range(20, 26))


def tensors_of_length(lengths: Iterable[int]) -> list[torch.Size]:
    """Shapes of the tensors alive that are as long as one of these."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [each.shape for each in alive if each.dim() == 3 and each.shape[1] in lengths]


def test_a_model_is_freed_before_the_function_that_compiled_it_ends() -> None:
    model = Tiny()
    compiled = torch.compile(model, backend=PABBackend(inner="eager"))
    compiled(**inputs(0, 700))
    alive = weakref.ref(model)
    del model, compiled
    gc.collect()
    assert alive() is None


@lowerings
def test_caches_are_given_back_when_the_window_is_over(lowering: str, inner: Any) -> None:
    run, backend = compiled_run(Tiny(), lowering, inner)
    run.begin().steps(TIMESTEPS[:5])
    assert held(backend) > 0
    run.steps((100, 50), first=5)  # the window's lower edge is 100
    assert held(backend) == 0


def test_a_computing_step_holds_no_old_caches_while_it_runs() -> None:
    holds: list[int] = []
    seen: list[PABBackend] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            holds.append(held(seen[0]))
            return gm(*args)

        return compiled

    clock, model = zoo.Clock(), Tiny()
    config = zoo.diffusers_config(clock, ranges=(3, None, 3))
    seen.append(PABBackend(config, inner=compiler, step_invariants=False))
    compiled = torch.compile(model, backend=seen[0])
    for number, t in enumerate((790, 700, 600, 500, 400)):
        clock.t = t
        compiled(**inputs(number, t))
    one_step = 2 * 2 * 5 * 8 * 4  # blocks x attentions x tokens x channels x bytes
    assert holds == [0, one_step, 0, 0, one_step]


@pytest.mark.parametrize(
    ("how", "inner"), [("sequence", "eager"), ("tensor", "replaying"), ("function", "replaying")], indirect=["inner"]
)
def test_where_timesteps_are_known_nothing_is_kept_that_no_later_step_reuses(how: str, inner: Any) -> None:
    timesteps: Any = {"sequence": TIMESTEPS, "tensor": torch.tensor(TIMESTEPS), "function": lambda: TIMESTEPS}[how]
    run, backend = compiled_run(Tiny(), inner=inner, timesteps=timesteps)
    run.begin()
    cross, spatial = [], []
    for number, t in enumerate(TIMESTEPS):
        run.step(number, t)
        kept = {role.role: role.cache_bytes > 0 for role in backend.report().roles}
        spatial.append(kept["spatial"])
        cross.append(kept["cross"])
    assert run.differs == 5
    # at        900   700    600   500    400    300    50;  n is 0 to 6, the window (100, 800)
    assert spatial == [True, False, True, False, True, False, False]
    assert cross == [True, True, False, True, True, False, False]


def test_a_reusing_step_runs_no_attention_and_every_other_step_runs_one_graph() -> None:
    timesteps = (1000, 950, 900, 790, 700, 600, 50, 40)
    clock, model, ran = zoo.Clock(), Tiny(), []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            ran.append(gm)
            return gm(*args)

        return compiled

    config = zoo.diffusers_config(clock, ranges=(2, None, 2))
    backend = PABBackend(config, inner=compiler, timesteps=timesteps, step_invariants=False)
    run = Run(model, torch.compile(model, backend=backend), clock)
    run.oracle = zoo.hooked(run.plain, config)
    run.begin().steps(timesteps)

    assert run.differs == 2  # n = 3 and n = 5
    (graph,) = backend.graphs
    computing, reusing = (graph.graphs[key] for key in ((False,) * 4, (True,) * 4))
    assert len(graph.graphs) == 2
    assert ran == [*[computing] * 3, reusing, computing, reusing, computing, computing]
    assert attentions(computing) == 4
    assert attentions(reusing) == 0
    # Of the attentions' linear layers and norms nothing is left either.
    assert not any("linear" in name or "norm" in name for name in operations(reusing))


def operations(gm: torch.fx.GraphModule) -> list[str]:
    """What the nodes of a graph call, in order."""
    return [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes if "call" in node.op]


def attentions(gm: torch.fx.GraphModule) -> int:
    return sum("scaled_dot_product_attention" in name for name in operations(gm))


def test_timesteps_are_asked_for_anew_in_each_generation(inner: Any) -> None:
    scheduled: list[tuple[float, ...]] = [()]
    run, backend = compiled_run(Tiny(), inner=inner, timesteps=lambda: scheduled[-1])
    for generation, timesteps in enumerate(((900, 700, 600, 50), (950, 650, 640, 630, 620), (1000, 700))):
        scheduled.append(timesteps)
        run.begin().steps(timesteps, first=10 * generation)
        assert held(backend) == 0
    assert run.differs == 2 + 4 + 1


class Heads(nn.Module, AttentionModuleMixin):
    """Attention with two heads, whose output keeps them: [B, H, S, D] that lies in memory as [B, S, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.to_q, self.to_k))
        return scaled_dot_product_attention(query, key, key)


class Transposing(nn.Module):
    """A block that takes its attention's heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Heads()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states + 0.01 * timestep
        return x + self.attn1(x).transpose(1, 2).flatten(2)


@lowerings
def test_what_one_graph_keeps_has_the_strides_another_was_compiled_for(lowering: str) -> None:
    """Inductor checks the strides of every input. To rounding: it fuses the sum into what follows."""
    clock = zoo.Clock()
    model = Transposing().eval().requires_grad_(False)
    backend = PABBackend(CONFIG(clock), lowering=lowering)
    compiled, oracle = torch.compile(model, backend=backend), zoo.hooked(copy.deepcopy(model), CONFIG(clock))
    for number, clock.t in enumerate(TIMESTEPS):
        kwargs = {"hidden_states": inputs(number, 0)["hidden_states"], "timestep": torch.tensor(float(clock.t))}
        torch.testing.assert_close(compiled(**kwargs), oracle(**kwargs))
    assert backend.report().reused


class Tied(nn.Module, CacheMixin):
    """Two blocks whose attentions are modules of their own with the same parameters.

    Args:
        breaks: whether the graph breaks between them.
    """

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        for name in ("to_q", "to_kv", "to_out"):
            for own, other in zip(self.blocks[0].children(), self.blocks[1].children(), strict=True):
                if hasattr(own, name):
                    getattr(other, name).weight = getattr(own, name).weight
                    getattr(other, name).bias = getattr(own, name).bias
        self.breaks = breaks

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states + 0.01 * timestep
        for block in self.blocks:
            x = block(x, text)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("breaks", "regional", "lowering", "inner"),
    [
        (False, False, "specialize", "replaying"),
        (False, False, "cond", "eager"),
        (True, False, "specialize", "replaying"),
        (False, True, "cond", "eager"),
    ],
    indirect=["inner"],
)
def test_modules_that_share_their_parameters_do_not_share_their_state(
    breaks: bool, regional: bool, lowering: str, inner: Any
) -> None:
    model = Tied(breaks).eval().requires_grad_(False)
    clock = zoo.Clock()
    plain = copy.deepcopy(model)
    pab = pab_fx.enable(model, CONFIG(clock), inner=inner, lowering=lowering, regional=regional)
    run = Run(plain, model, clock)
    run.steps(TIMESTEPS).begin().steps(TIMESTEPS)
    assert run.differs
    assert pab.report().reused
