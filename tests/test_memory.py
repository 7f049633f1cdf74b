"""What is kept: never twice, no longer than it is of use, smaller or elsewhere where that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel, WanTransformer3DModel
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from torch.testing._internal.two_tensor import TwoTensor

import pab_fx
from pab_fx import Blocks, Every, PABConfig, Policy, Residual, Taylor
from pab_fx.bench._torch import peak_of_live_bytes
from pab_fx.report.data import ContextReport
from pab_fx.run.holding import Offloaded, Static, addresses
from pab_fx.run.state import Cell
from pab_fx.testing import Replayed, replaying

TIMESTEPS = (900, 700, 600, 500, 400, 300, 50)
CONFIG = PABConfig(
    spatial_attention_block_skip_range=2,
    temporal_attention_block_skip_range=3,
    cross_attention_block_skip_range=6,
)
COMPUTE_ALL = PABConfig(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1))


def build() -> LatteTransformer3DModel:
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        caption_channels=16,
        video_length=4,
    )
    return model.eval().requires_grad_(False)


def call(model: Any, t: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(t))
    latents, text = torch.randn(1, 4, 4, 16, 16, generator=generator), torch.ones(1, 8, 16)
    with torch.no_grad():
        output: torch.Tensor = model(latents, torch.tensor([t]), text, return_dict=False)[0]
    return output


class Recording:
    """`replaying`, which counts how often graphs would be recorded."""

    records_graphs = True

    def __init__(self) -> None:
        self.graphs: list[Replayed] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Replayed:
        self.graphs.append(replaying(gm, example_inputs))
        return self.graphs[-1]

    @property
    def recordings(self) -> int:
        return sum(graph.recordings for graph in self.graphs)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dynamic_graphs_that_are_compiled_later_equal_the_first_ones(inner: str) -> None:
    """Within rounding: Inductor fuses, and AOTAutograd decomposes, in another order than eager."""
    outputs = []
    for name in ("eager", inner):
        torch.compiler.reset()
        model = build()
        with pab_fx.enable(model, CONFIG, inner=name, dynamic=True) as pab:
            outputs.append([call(model, t) for t in TIMESTEPS])
            assert pab.report().reused > 0
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def held(pab: pab_fx.PAB) -> int:
    return sum(role.cache_bytes for role in pab.report().roles)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_a_step_holds_one_copy_of_the_caches_beside_what_the_compiled_model_needs(lowering: str) -> None:
    plain = build()
    plain.compile()
    call(plain, 900)
    needed = peak_of_live_bytes(lambda: call(plain, 900))
    torch.compiler.reset()
    model = build()
    pab = pab_fx.enable(model, CONFIG, lowering=lowering, timesteps=TIMESTEPS)
    for t in TIMESTEPS:
        call(model, t)
    assert pab.report().reused > 0
    pab.reset()
    one_tensor = 4 * 64 * 64 * 4
    # a condition takes and returns tensors of their own, and what it returns is a copy of what was kept
    passing = (3 if lowering == "cond" else 1) * one_tensor
    for t in TIMESTEPS:
        before = held(pab)
        most = before + peak_of_live_bytes(lambda t=t: call(model, t))  # type: ignore[misc]
        full = sum(role.full_bytes for role in pab.report().roles)
        assert full == 3 * one_tensor
        assert most <= needed + full + passing, (t, most, needed, full)
    assert held(pab) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_a_cache_that_is_reused_and_kept_on_is_not_copied(lowering: str) -> None:
    model = build()
    every_third = PABConfig(spatial_attention_block_skip_range=3)
    pab = pab_fx.enable(model, every_third, lowering=lowering, timesteps=TIMESTEPS)
    places = []
    for t in (900, 700, 600, 500):
        call(model, t)
        cells = [cell for store in pab.backend.runtime.stores() for _, _, cell in store.cells()]
        places.append([kept.data_ptr() for cell in cells for kept in cell.caches or ()])
    computed, reused, kept_on, last = places  # 900 is computed, 700 and 600 are reused, 500 is computed
    assert len(computed) == 1
    assert reused == computed
    assert not kept_on
    assert len(last) == 1


def test_the_report_tells_the_bytes_of_each_role_in_each_cache_context() -> None:
    model = build()
    pab = pab_fx.enable(model, CONFIG, inner="eager")
    for t in (700, 600):
        with pab_fx.cache_context("cond"):
            call(model, t)
    with pab_fx.cache_context("uncond"):
        call(model, 700)
    roles = {role.role: role for role in pab.report().roles}
    one = 4 * 64 * 64 * 4
    # the next call of "cond" computes the spatial attention
    assert roles["spatial"].contexts == (ContextReport("cond", 0, one), ContextReport("uncond", one, one))
    assert roles["cross"].contexts == (ContextReport("cond", one, one), ContextReport("uncond", one, one))
    assert "uncond" in str(pab.report())
    pab.reset()
    assert held(pab) == 0


@cache
def with_caches_as_they_are(lowering: str) -> tuple[list[torch.Tensor], int]:
    """The output of each step, and the bytes that caches take after the fourth."""
    torch.compiler.reset()
    model = build()
    with pab_fx.enable(model, CONFIG, inner="eager", lowering=lowering) as pab:
        outputs = [call(model, t) for t in TIMESTEPS[:4]]
        bytes_held = held(pab)
        outputs += [call(model, t) for t in TIMESTEPS[4:]]
        assert pab.report().reused > 0
    torch.compiler.reset()
    return outputs, bytes_held


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "smaller", "error", "inner"),
    [
        ("bfloat16", 2, 2**-7, "eager"),
        ("int8", 4 * 64 / 68, 2**-6, "eager"),
        ("int8", 4 * 64 / 68, 2**-6, replaying),
        (torch.float8_e4m3fn, 4 * 64 / 68, 2**-3, "eager"),
    ],
)
def test_smaller_caches_change_little_and_take_less(
    dtype: Any, smaller: float, error: float, inner: Any, lowering: str
) -> None:
    """The bound is a generous multiple of the dtype's rounding: what is kept is one summand of many."""
    expected, full = with_caches_as_they_are(lowering)
    model = build()
    pab = pab_fx.enable(model, CONFIG, inner=inner, lowering=lowering, cache_dtype=dtype)
    found = [call(model, t).clone() for t in TIMESTEPS[:4]]
    assert full == pytest.approx(smaller * held(pab))
    assert pab.report().reused > 0
    assert torch.equal(expected[0], found[0])  # a step that computes is exact
    distances = [float((a - b).norm() / a.norm()) for a, b in zip(expected[:4], found, strict=True)]
    assert 0 < max(distances) < error


@pytest.mark.parametrize("given", ["int4", torch.float32, torch.int16, 3])
def test_a_dtype_that_caches_are_not_kept_in_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_dtype=.* bfloat16, int8, float8_e4m3fn"):
        pab_fx.PABBackend(cache_dtype=given)


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_device='main memory' is no device"):
        pab_fx.PABBackend(cache_device="main memory")
    with pytest.raises(ValueError, match="cache_device='meta' holds nothing here"):
        pab_fx.PABBackend(cache_device="meta")


@pytest.mark.parametrize("lowering", ["specialize", pytest.param("cond", marks=pytest.mark.slow)])
def test_caches_elsewhere_change_nothing(lowering: str, inner: Any) -> None:
    expected, _ = with_caches_as_they_are(lowering)
    model = build()
    pab = pab_fx.enable(model, CONFIG, inner=inner, lowering=lowering, cache_device="cpu")
    assert all(map(torch.equal, expected, [call(model, t).clone() for t in TIMESTEPS]))
    assert pab.report().reused > 0


@pytest.mark.parametrize("cache_device", [None, "cpu"])
def test_with_cuda_graphs_no_graph_is_recorded_again_in_later_generations(cache_device: str | None) -> None:
    model, inner = wan(), Recording()
    with pab_fx.enable(model, WAN, inner=inner, cache_device=cache_device) as pab:
        recorded = []
        for number in range(3):
            text = torch.full((1, 8, 16), 1.0 + number)
            generation(model, lambda: text)  # noqa: B023
            recorded.append(inner.recordings)
        assert pab.report().reused > 0
    assert recorded == [len(inner.graphs)] * 3


def test_with_cuda_graphs_what_follows_waits_for_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run of a graph writes to its outputs, and knows nothing of streams that still read them."""
    calls: list[str] = []

    class Stream(contextlib.nullcontext[None]):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def record_event(self) -> str:
            calls.append(f"{self.name} records an event")
            return "that event"

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    current = Stream("current")
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: tensor.new_empty(tensor.shape))
    Offloaded(torch.device("cpu"), has_cuda_graphs=True).hold(Cell("spatial", None), [torch.empty(2, device="meta")])
    assert calls == ["side waits for current", "side records an event", "current waits for that event"]


def test_at_one_address_a_slot_may_become_what_another_was() -> None:
    """As where a how keeps the last two outputs: the graph returns the buffer that it read the last one from."""
    static, cell = Static(), Cell("spatial", None)
    kept = static.hold(cell, [torch.full((2,), 1.0), torch.full((2,), 0.0)])
    again = static.hold(cell, [torch.full((2,), 2.0), kept[0]])
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in kept]
    assert [each.tolist() for each in again] == [[2.0, 2.0], [1.0, 1.0]]


def test_what_is_offloaded_comes_back() -> None:
    offloaded, tensor = Offloaded(torch.device("cpu")), torch.randn(3, 4)
    (kept,) = offloaded.hold(Cell("spatial", None), [tensor])
    assert torch.equal(offloaded.lend(kept), tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own need a GPU")
def test_what_is_offloaded_from_a_gpu_lies_in_pinned_memory_and_comes_back() -> None:
    offloaded, tensor = Offloaded(torch.device("cpu")), torch.randn(1 << 20, device="cuda")
    expected = tensor.clone()
    (kept,) = offloaded.hold(Cell("spatial", None), [tensor])
    assert kept[0].device.type == "cpu"
    assert kept[0].is_pinned()
    del tensor
    assert torch.equal(offloaded.lend(kept), expected)


def test_with_cuda_graphs_a_cache_stays_at_its_address() -> None:
    static, cell = Static(), Cell("spatial", None)
    first = static.hold(cell, [torch.ones(2, 3)])
    cell.reset()
    second = static.hold(cell, [torch.zeros(2, 3)])
    assert first[0].data_ptr() == second[0].data_ptr()
    assert not second[0].any()
    assert static.hold(cell, [torch.ones(4, 3)])[0].shape == (4, 3)  # of another generation


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_parameters_and_static_caches_are_known_to_keep_their_address(lowering: str) -> None:
    """As far as a CPU goes: CUDA graphs read those inputs in place that AOTAutograd counts as static."""
    found: list[tuple[int, int]] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            context = TracingContext.try_get()  # of graphs that are compiled later it is not known from outside
            if context is not None:
                metadata: Any = context.fw_metadata
                found.append((len(metadata.static_input_indices), len(inputs)))
            return graph.forward

        return aot_module_simplified(gm, list(example_inputs), fw_compiler=count)

    model = build()
    backend = pab_fx.PABBackend(CONFIG, inner=compiler, lowering=lowering)
    backend._lowering, backend.runtime.holder = replace(backend._lowering, static_slots=True), Static()
    compiled = torch.compile(model, backend=backend)
    for t in (700, 600):
        call(compiled, t)
    assert backend.report().reused > 0
    # all but latents, timestep, text and conditions
    assert found
    assert all(count - static <= 3 + (6 if lowering == "cond" else 0) for static, count in found)


def test_a_quantised_tensor_lies_where_its_parts_lie() -> None:
    """It has no memory of its own to ask for, and `enable` asks for that of every input."""
    parts = torch.ones(2), torch.zeros(2)
    assert addresses([TwoTensor(*parts)]) == addresses(parts)


def test_warmup_compiles_every_graph_that_a_generation_needs() -> None:
    compiled: list[int] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled.append(len(gm.graph.nodes))
        return gm.forward

    model = build()
    pab = pab_fx.enable(model, CONFIG, inner=inner, step_invariants=False)
    with pytest.raises(RuntimeError, match="call the model"):
        pab.warmup()
    call(model, 900)
    assert len(compiled) == 1
    pab.warmup(TIMESTEPS)
    ahead = len(compiled)
    assert ahead > 1
    pab.reset()
    for t in TIMESTEPS:
        call(model, t)
    assert len(compiled) == ahead
    assert pab.report().reused > 0
    pab.warmup()  # whatever the timesteps
    for t in range(995, 0, -31):
        call(model, t)
    known = len(compiled)
    for t in range(990, 0, -7):
        call(model, t)
    assert len(compiled) == known


def wan() -> Any:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model.eval().requires_grad_(False)


def generation(model: Any, text: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(latents + t / 999, torch.tensor([t]), text(), return_dict=False)[0].clone() for t in TIMESTEPS]


WAN = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3)
BLOCKS = Policy(Blocks(), Every(3), Taylor(1, of=Residual()))


@pytest.mark.parametrize(
    ("config", "options", "inner"),
    [
        (WAN, {}, "replaying"),
        (WAN, {"lowering": "cond"}, "replaying"),
        (WAN, {"regional": True}, "eager"),
        (WAN, {"dynamic": True}, "eager"),
        (BLOCKS, {}, "replaying"),
        pytest.param(BLOCKS, {"lowering": "cond"}, "eager", marks=pytest.mark.slow),
        pytest.param(BLOCKS, {"regional": True}, "eager", marks=pytest.mark.slow),
    ],
    indirect=["inner"],
    ids=str,
)
def test_what_does_not_change_is_computed_once_a_generation_to_the_bit(
    config: Any, options: dict[str, Any], inner: Any
) -> None:
    text = torch.randn(1, 8, 16)
    model = wan()
    plain = generation(model, lambda: text)
    with pab_fx.enable(model, config, inner=inner, step_invariants=False) as pab:
        expected = generation(model, lambda: text)
        assert pab.report().once.operations == 0
    assert not all(map(torch.equal, plain, expected))
    torch.compiler.reset()
    with pab_fx.enable(model, config, inner=inner, **options) as pab:
        for number in (1, 2):
            assert all(map(torch.equal, generation(model, lambda: text), expected))
            once = pab.report().once
            assert once.operations > 4  # the keys and values of the text, and its embedding
            assert (once.computed, once.taken) == (number, number * (len(TIMESTEPS) - 1))
            assert once.kept_bytes > 0
        assert pab.report().reused > 0
        assert "computed once a generation" in str(pab.report())
        pab.reset()
        assert pab.report().once.kept_bytes == 0


def texts_that_are_equal() -> Callable[[], torch.Tensor]:
    text = torch.ones(1, 8, 16)
    return text.clone


def texts_that_differ() -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return lambda: torch.randn(1, 8, 16, generator=generator)


def one_text_that_is_updated() -> Callable[[], torch.Tensor]:
    text = torch.ones(1, 8, 16)
    return lambda: text.add_(0.25)


TEXTS = (texts_that_are_equal, texts_that_differ, one_text_that_is_updated)


@cache
def with_all_computed_in_each_step() -> dict[Any, list[torch.Tensor]]:
    """A generation with each of `TEXTS`, in which nothing is computed once."""
    torch.compiler.reset()
    model = wan()
    with pab_fx.enable(model, WAN, inner="eager", step_invariants=False) as pab:
        found = {texts: generation(model, texts()) for texts in TEXTS}
        assert pab.report().reused > 0
    torch.compiler.reset()
    return found


@pytest.mark.parametrize("texts", TEXTS)
def test_a_text_that_is_another_tensor_or_was_updated_is_computed_anew(
    texts: Callable[[], Callable[[], torch.Tensor]], inner: Any
) -> None:
    model, expected = wan(), with_all_computed_in_each_step()[texts]
    with pab_fx.enable(model, WAN, inner=inner) as pab:
        assert all(map(torch.equal, generation(model, texts()), expected))
        assert pab.report().reused > 0


def test_weights_that_change_between_generations_are_heeded(inner: Any) -> None:
    text, model = torch.randn(1, 8, 16), wan()
    with pab_fx.enable(model, WAN, inner=inner) as pab:
        before = generation(model, lambda: text)
        model.blocks[0].attn2.to_k.weight.data.mul_(2)  # leaves no trace in the parameter's version
        after = generation(model, lambda: text)
        assert pab.report().once.computed == 2
    with pab_fx.enable(model, WAN, inner=inner, step_invariants=False):
        assert all(map(torch.equal, after, generation(model, lambda: text)))
    assert not torch.equal(before[0], after[0])


def test_a_weight_that_is_updated_where_it_leaves_no_trace_is_found_by_a_check(inner: Any) -> None:
    text, model = torch.randn(1, 8, 16), wan()
    latents = torch.randn(1, 4, 2, 8, 8)
    with pab_fx.enable(model, WAN, inner=inner, step_invariants="check") as pab:
        expected = generation(model, lambda: text)
        assert pab.report().once.taken > 0
        with torch.no_grad():
            model(latents, torch.tensor([900.0]), text)
            model.blocks[0].attn2.to_k.weight.data.mul_(2)
            with pytest.raises(RuntimeError, match=r"would differ.*through \.data.*reset\(\)"):
                model(latents, torch.tensor([800.0]), text)
        pab.reset()
        model.blocks[0].attn2.to_k.weight.data.div_(2)
        assert all(map(torch.equal, generation(model, lambda: text), expected))


def test_cond_and_uncond_keep_what_is_theirs(inner: Any) -> None:
    texts, model = {name: torch.randn(1, 8, 16) for name in ("cond", "uncond")}, wan()
    outputs = []
    for step_invariants in (False, True):
        torch.compiler.reset()
        with pab_fx.enable(model, WAN, inner=inner, step_invariants=step_invariants) as pab:
            latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
            for t in TIMESTEPS:
                for name, text in texts.items():
                    with pab_fx.cache_context(name), torch.no_grad():
                        outputs.append(model(latents + t / 999, torch.tensor([t]), text, return_dict=False)[0])
            if step_invariants:
                assert (pab.report().once.computed, pab.report().once.taken) == (2, 2 * (len(TIMESTEPS) - 1))
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:]))


def test_under_inference_mode_nothing_is_kept_that_could_have_been_updated(inner: Any) -> None:
    model = wan()
    outputs = []
    for step_invariants in (False, True):
        torch.compiler.reset()
        with pab_fx.enable(model, WAN, inner=inner, step_invariants=step_invariants), torch.inference_mode():
            text = torch.ones(1, 8, 16)
            outputs.append([each.clone() for each in generation(model, lambda: text.mul_(1.5))])  # noqa: B023
    assert all(map(torch.equal, *outputs))
