"""Caches in fewer bytes: what is read differs by no more than rounding, and is kept again to the bit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from pab_fx._torch import cond_op
from pab_fx.graph.copies import copy_of
from pab_fx.graph.dataflow import value
from pab_fx.graph.modules import ModuleNames
from pab_fx.passes import order
from pab_fx.passes.compress import DTYPES, LARGEST, SMALLEST_SCALE, dequantise, quantise, stored
from pab_fx.passes.conditions import insert_conditions
from pab_fx.passes.form import Predicate, Slot, inputs_of, mark_of
from pab_fx.passes.strides import stride_order
from pab_fx.policy import Attentions, Last, Policy, SkipRange
from pab_fx.select.tag import tag

INT8, FLOAT8, BFLOAT16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
search = settings(deadline=None, derandomize=True, database=None, max_examples=200)
scaled = pytest.mark.parametrize("dtype", LARGEST, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
floats = pytest.mark.parametrize("original", FLOATS, ids=str)


pytestmark = pytest.mark.usefixtures("no_gradients")


# ------------------------------------------------------------------------------------------------- numbers


def read_back(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor after it was stored and read."""
    parts = tuple(stored(tensor, dtype).values())
    return dequantise(*parts, tensor.dtype) if len(parts) == 2 else parts[0].to(tensor.dtype)


def tokens(original: torch.dtype, seed: int = 0) -> Tensor:
    """Tokens of very different sizes, with elements of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, 50)[:, None]
    return (torch.randn(2, 50, 64, generator=generator) ** 3 * sizes).clamp(-6e4, 6e4).to(original)


def rounding(tensor: Tensor) -> Tensor:
    """The most by which rounding to the tensor's own dtype is off: normal numbers, and subnormal ones."""
    info = torch.finfo(tensor.dtype)
    return tensor.float().abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


@floats
def test_int8_is_off_by_half_a_step(original: torch.dtype) -> None:
    x = tokens(original)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    # half a step, a millionth more as the scale is rounded, and the rounding of what is read to its dtype
    bound = step * 0.5 * (1 + 1e-5) + rounding(x) * 2
    assert ((read_back(x, INT8).float() - x.float()).abs() <= bound).all()


@floats
def test_float8_is_off_by_a_sixteenth_of_each_element(original: torch.dtype) -> None:
    x = tokens(original)
    step = x.float().abs().amax(-1, keepdim=True) / 448
    # 3 bits of mantissa: half a step is 2^-4 of a normal number; below 2^-6, steps are 2^-9 throughout
    bound = torch.maximum(x.float().abs() * 2**-4, step * 2**-10) * (1 + 1e-5) + rounding(x) * 2
    assert ((read_back(x, FLOAT8).float() - x.float()).abs() <= bound).all()


def test_bfloat16_is_off_by_2_to_the_minus_8_of_each_element() -> None:
    x = tokens(torch.float32)
    assert ((read_back(x, BFLOAT16) - x).abs() <= x.abs() * 2**-8).all()  # half a step of 7 bits of mantissa


@scaled
@floats
def test_the_largest_element_of_a_token_is_kept_closely(dtype: torch.dtype, original: torch.dtype) -> None:
    x = tokens(original)
    largest, found = x.abs().amax(-1).float(), read_back(x, dtype).abs().amax(-1).float()
    # 17 significant bits of the scale, more than the 16-bit dtypes have
    assert ((found - largest).abs() <= largest * (2**-16 if original is torch.float32 else 0)).all()


@scaled
def test_a_token_of_zeros_is_read_as_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 64)
    x[0, 0] = 1
    found = read_back(x, dtype)
    assert torch.equal(found != 0, x != 0)


@scaled
@floats
@pytest.mark.parametrize("end", ["tiny", "smallest_normal", "max"])
def test_extreme_magnitudes_stay_finite(dtype: torch.dtype, original: torch.dtype, end: str) -> None:
    extreme = getattr(torch.finfo(original), end)
    x = torch.linspace(-1, 1, 65).mul(extreme).to(original)[None]
    found = read_back(x, dtype)
    assert found.isfinite().all()
    # relative to the token: half a step of int8, a sixteenth with float8, both more than the rounding of the dtypes
    assert ((found.float() - x.float()).abs() <= x.float().abs().max() * 2**-4 + 1e-28).all()


@scaled
def test_what_is_too_small_for_a_scale_is_read_as_zero(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), LARGEST[dtype] * SMALLEST_SCALE * 0.9)
    assert torch.equal(read_back(x, dtype), torch.zeros_like(x))


@every_dtype
@floats
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_read_as_finite(dtype: torch.dtype, original: torch.dtype, broken: float) -> None:
    x = tokens(original)
    x[0, 3, 5] = broken
    found = read_back(x, dtype)
    assert not found[0, 3, 5].isfinite()
    others = torch.ones(x.shape[:-1], dtype=torch.bool)
    others[0, 3] = False
    assert found[others].isfinite().all()


@st.composite
def drawn_tokens(draw: st.DrawFn) -> Tensor:
    """A few tokens of any finite numbers of a dtype, near each other or not, in any layout."""
    original = draw(st.sampled_from(FLOATS))
    number = st.floats(allow_nan=False, allow_infinity=False, width=16 if original is torch.float16 else 32)
    size = draw(st.floats(1e-4, 1e4))
    near = st.floats(-1.0, 1.0).map(lambda each: each * size)
    elements = draw(st.one_of(st.lists(number, min_size=32, max_size=32), st.lists(near, min_size=32, max_size=32)))
    limit = torch.finfo(original).max
    return torch.tensor(elements).clamp(-limit, limit).to(original).reshape(2, 16)


@search
@given(drawn_tokens(), st.sampled_from(list(LARGEST)))
def test_what_was_read_is_kept_again_to_the_bit(x: Tensor, dtype: torch.dtype) -> None:
    quantised, scale = quantise(x, dtype)
    found = dequantise(quantised, scale, x.dtype)
    again, scale_again = quantise(found, dtype)
    assert torch.equal(scale, scale_again)
    assert torch.equal(dequantise(again, scale_again, x.dtype), found)
    if x.dtype is not torch.float16 or dtype is INT8:  # float16's subnormal numbers have fewer bits than float8
        assert torch.equal(quantised.float(), again.float())


@scaled
@floats
def test_nothing_drifts_however_often_it_is_kept(dtype: torch.dtype, original: torch.dtype) -> None:
    first = found = read_back(tokens(original), dtype)
    for _ in range(5):
        found = read_back(found, dtype)
        assert torch.equal(found, first)


# ------------------------------------------------------------------------------------------ what is stored


@every_dtype
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2)], ids=str)
def test_what_is_stored_lies_in_memory_as_the_cache(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 5, 64)
    x = torch.empty_permuted(x.shape, order).copy_(x)
    quantised, *scale = stored(x, dtype).values()
    assert stride_order(quantised) == order
    assert quantised.stride() == x.stride()
    assert quantised.shape == x.shape
    if scale:
        assert scale[0].shape == (2, 3, 5, 1)
        assert scale[0].dtype is torch.float32
        assert dequantise(quantised, scale[0], x.dtype).stride() == x.stride()


@scaled
def test_a_cache_with_gaps_is_stored_without(dtype: torch.dtype) -> None:
    quantised, scale = quantise(torch.randn(2, 3, 5, 64).transpose(1, 2)[:, :, 1:], dtype)
    assert stride_order(quantised) == (0, 2, 1, 3)
    assert quantised.stride() == (2 * 5 * 64, 64, 5 * 64, 1)
    assert scale.untyped_storage().nbytes() == 4 * scale.numel()


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [
        (torch.ones(2, 64, dtype=torch.int64), INT8),
        (torch.ones(2, 64, dtype=torch.bool), BFLOAT16),
        (torch.ones(2, 64, dtype=torch.bfloat16), BFLOAT16),
        (torch.ones(2, 64, dtype=torch.float16), BFLOAT16),
        (torch.ones(2, 64, dtype=torch.complex64), INT8),
        (torch.ones(2, 1), INT8),  # 4 bytes a token, and 1 + 4 with its scale
        (torch.ones(2, 4, dtype=torch.bfloat16), FLOAT8),
        (torch.ones(2, 0), INT8),
        (torch.tensor(1.0), FLOAT8),
    ],
    ids=lambda each: str(each.dtype if isinstance(each, Tensor) else each),
)
def test_what_would_not_be_smaller_is_left(kept: Tensor, dtype: torch.dtype) -> None:
    assert stored(kept, dtype)[""] is kept


@every_dtype
def test_what_is_stored_is_smaller(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 64)
    size = sum(each.nbytes for each in stored(x, dtype).values())
    assert size == x.nbytes * (0.5 if dtype is BFLOAT16 else 0.25 + 1 / 64)


@pytest.mark.parametrize("shape", [(0, 7, 64), (2, 0, 64)], ids=str)
@scaled
def test_no_tokens_are_no_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert read_back(torch.ones(shape), dtype).shape == shape


# -------------------------------------------------------------------------------------------------- graphs


class Attention(nn.Module, AttentionModuleMixin):
    """What diffusers' hooks take for an attention; its output may lie in memory as channels first."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.to_qkv = nn.Linear(16, 48)
        self.to_out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        out = self.to_out(scaled_dot_product_attention(query, key, value))
        return out.transpose(1, 2).contiguous().transpose(1, 2) if self.is_transposed else out


class Block(nn.Module):
    """Attention and feed-forward on a residual stream; it may update in place what the attention yields."""

    def __init__(self, is_transposed: bool, updates: bool) -> None:
        super().__init__()
        self.updates = updates
        self.norm, self.ff = nn.LayerNorm(16), nn.Linear(16, 16)
        self.attention = Attention(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(self.norm(x))
        if self.updates:
            out.mul_(2.0)
        x = x + out
        return x + self.ff(x)


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, updates: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(is_transposed=False, updates=updates), Block(True, False))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        x = self.blocks(hidden_states)
        return x, x.sum()


def captured(
    dtype: torch.dtype = torch.float32, dynamic: bool | None = None, updates: bool = False
) -> tuple[fx.GraphModule, list[Any]]:
    """The model's graph as Dynamo hands it to a backend, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((gm, list(inputs)))
        return gm.forward

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(updates).eval().requires_grad_(False).to(dtype)
        x = torch.randn(2, 5, 16, dtype=dtype)
    torch.compile(model, backend=backend, dynamic=dynamic)(x)
    return found[0]


@dataclass(frozen=True)
class Lowered:
    """The lowered graph of a model, as it is and with smaller slots."""

    plain: fx.GraphModule
    small: fx.GraphModule


def lowered(gm: fx.GraphModule, key: bool | str, dtype: torch.dtype) -> Lowered:
    """The graph that computes (`False`), that reuses (`True`), or that holds conditions ("cond")."""
    conditional = copy_of(gm)
    policies = [Policy(Attentions(), SkipRange(2), Last(keeps_updates=True))]
    insert_conditions(conditional, tag(conditional, policies, ModuleNames.of_graph(conditional)))
    decisions = key if key == "cond" else (bool(key), bool(key))
    return Lowered(*(order.lowered(conditional, decisions, order.Lowering(True, each)) for each in (None, dtype)))


def writes_of(gm: fx.GraphModule) -> tuple[Slot, ...]:
    return mark_of(gm.graph.output_node())


def kept_by(gm: fx.GraphModule, outputs: Sequence[Any]) -> dict[Slot, Tensor]:
    writes = writes_of(gm)
    return dict(zip(writes, outputs[len(outputs) - len(writes) :], strict=True))


def state(gm: fx.GraphModule, slots: Mapping[Slot, Tensor], reuse: bool = True) -> list[Tensor]:
    """What a graph takes after the model's own inputs."""
    marks = [mark for node in gm.graph.find_nodes(op="placeholder") if (mark := mark_of(node)) is not None]
    return [slots[mark] if isinstance(mark, Slot) else torch.tensor(not reuse) for mark in marks]


def all_equal(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True)
    )


def all_stored(kept: dict[Slot, Tensor], dtype: torch.dtype) -> dict[Slot, Tensor]:
    return {
        replace(slot, part=part): each for slot, whole in kept.items() for part, each in stored(whole, dtype).items()
    }


@every_dtype
@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16], ids=str)
def test_a_computing_step_yields_the_same_and_stores_its_caches(dtype: torch.dtype, original: torch.dtype) -> None:
    gm, args = captured(original)
    graphs = lowered(gm, False, dtype)
    expected, found = graphs.plain(*args), graphs.small(*args)
    count = len(expected) - len(writes_of(graphs.plain))
    assert all_equal(found[:count], expected[:count])
    wanted = all_stored(kept_by(graphs.plain, expected), dtype)
    assert writes_of(graphs.small) == tuple(wanted)
    assert all_equal(found[count:], list(wanted.values()))


@every_dtype
@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16], ids=str)
def test_a_reusing_step_computes_with_what_was_stored(dtype: torch.dtype, original: torch.dtype) -> None:
    gm, args = captured(original)
    computing, reusing = lowered(gm, False, dtype), lowered(gm, True, dtype)
    kept = kept_by(computing.plain, computing.plain(*args))
    small = kept_by(computing.small, computing.small(*args))
    expected = reusing.plain(
        *args, *state(reusing.plain, {slot: read_back(each, dtype) for slot, each in kept.items()})
    )
    found = reusing.small(*args, *state(reusing.small, small))
    assert all_equal(found, expected)


@every_dtype
def test_a_cond_that_reuses_writes_back_what_it_read(dtype: torch.dtype) -> None:
    gm, args = captured()
    graphs = lowered(gm, "cond", dtype)
    looks = {slot: value(node) for slot, node in inputs_of(graphs.small, Slot).items()}
    unread = {slot: torch.zeros(each.shape, dtype=each.dtype) for slot, each in looks.items()}
    small = kept_by(graphs.small, graphs.small(*args, *state(graphs.small, unread, reuse=False)))
    expected = lowered(gm, True, dtype).small
    for _ in range(3):
        outputs = graphs.small(*args, *state(graphs.small, small))
        again = kept_by(graphs.small, outputs)
        assert all_equal(list(again.values()), list(small.values()))
        small = again
        assert all_equal(outputs[:2], expected(*args, *state(expected, small))[:2])


@scaled
@pytest.mark.parametrize("key", [False, True, "cond"])
def test_inputs_and_outputs_are_recorded_as_they_are(dtype: torch.dtype, key: bool | str) -> None:
    gm, _ = captured()
    graphs = lowered(gm, key, dtype)
    small, graph = graphs.small, graphs.small.graph
    slots = tuple(Slot(module, 0, part) for module in range(2) for part in ("", "scale"))
    assert tuple(inputs_of(small, Slot)) == (slots if key else ())
    assert writes_of(small) == (() if key is True else slots)
    outputs: Any = graph.output_node().args[0]
    for node in (*inputs_of(small, Slot).values(), *outputs[len(outputs) - len(writes_of(small)) :]):
        is_scale = "scale" in node.name or node.args[1:] == (1,)
        assert value(node).dtype == (torch.float32 if is_scale else dtype)
        assert tuple(value(node).shape) in ([(2, 5, 1), (2, 16, 1)] if is_scale else [(2, 5, 16), (2, 16, 5)])
    made = [node for node in graph.nodes if node.target in (quantise, dequantise)]
    assert len(made) == (4 if key == "cond" else 2)
    for node in made:
        assert node.meta["nn_module_stack"]
    assert inputs_of(small, Predicate).keys() == inputs_of(graphs.plain, Predicate).keys()


def test_the_operand_of_a_cond_is_what_was_read() -> None:
    gm, _ = captured()
    graph = lowered(gm, "cond", INT8).small.graph
    conds = graph.find_nodes(op="call_function", target=cond_op)
    assert len(conds) == 2
    for cond in conds:
        operand = cond.args[3][0].args[0]  # held to its strides
        assert operand.target is dequantise
        assert value(operand).dtype is torch.float32


@every_dtype
def test_what_is_updated_in_place_is_stored_after_the_update(dtype: torch.dtype) -> None:
    gm, args = captured(updates=True)
    computing = lowered(gm, False, dtype)
    kept = kept_by(computing.plain, computing.plain(*args))
    small = kept_by(computing.small, computing.small(*args))
    assert all_equal(list(small.values()), list(all_stored(kept, dtype).values()))


@every_dtype
def test_what_is_updated_in_place_after_it_was_read_is_written_back(dtype: torch.dtype) -> None:
    """The graph with whole caches updates the cache that it was given, as diffusers' hooks do; in each reuse again."""
    gm, args = captured(updates=True)
    computing, reusing = lowered(gm, False, dtype), lowered(gm, True, dtype)
    small = kept_by(computing.small, computing.small(*args))
    kept = {name: read_back(each, dtype) for name, each in kept_by(computing.plain, computing.plain(*args)).items()}
    for _ in range(3):
        expected = reusing.plain(*args, *state(reusing.plain, kept))
        found = reusing.small(*args, *state(reusing.small, small))
        small = {**small, **kept_by(reusing.small, found)}
        assert all_equal(found[:2], expected)  # doubling is exact


def test_bfloat16_leaves_caches_that_are_no_wider() -> None:
    gm, _ = captured(torch.bfloat16)
    for key in (False, True, "cond"):
        graphs = lowered(gm, key, BFLOAT16)
        assert writes_of(graphs.small) == writes_of(graphs.plain)
        assert graphs.small.code == graphs.plain.code


@every_dtype
@pytest.mark.parametrize("key", [True, "cond"])
def test_symbolic_sizes_stay_symbolic(dtype: torch.dtype, key: bool | str) -> None:
    gm, args = captured(dynamic=True)
    assert any(isinstance(value(node), torch.SymInt) for node in gm.graph.find_nodes(op="placeholder"))
    computing, reusing = lowered(gm, False, dtype), lowered(gm, key, dtype)
    for node in inputs_of(reusing.small, Slot).values():
        assert isinstance(value(node).shape[0], torch.SymInt)
        assert value(node).shape[-1] == 1 or "scale" not in node.name
    for size in (5, 9):
        sized: list[Any] = [each if isinstance(each, Tensor) or each != 5 else size for each in args]
        sized = [torch.randn(2, size, 16) if isinstance(each, Tensor) and each.dim() == 3 else each for each in sized]
        kept = kept_by(computing.plain, computing.plain(*sized))
        small = kept_by(computing.small, computing.small(*sized))
        wide = {slot: read_back(each, dtype) for slot, each in kept.items()}
        expected = reusing.plain(*sized, *state(reusing.plain, wide))
        found = reusing.small(*sized, *state(reusing.small, small))
        assert all_equal(found[:2], expected[:2])


def test_another_dtype_is_refused() -> None:
    gm, _ = captured()
    with pytest.raises(ValueError, match="kept in"):
        lowered(gm, True, torch.int32)


@pytest.mark.slow
@scaled
def test_inductor_stores_and_reads_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 16)
    write, read = torch.compile(quantise), torch.compile(dequantise)
    quantised, scale = write(x, dtype)
    expected, expected_scale = quantise(x, dtype)
    assert torch.equal(quantised.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    found = read(quantised, scale, torch.float32)
    assert torch.equal(found, dequantise(expected, expected_scale, torch.float32))
    assert torch.equal(write(found, dtype)[1], scale)
