"""A config says what it means or is refused, with the name of the field and what to write there instead."""

import dataclasses
import gc
import importlib.metadata
import math
import pkgutil
import re
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pab_fx
from pab_fx import LayerBroadcast, MLPBroadcast, PABBackend, PABConfig, pab_backend
from pab_fx.backend import backend_of
from pab_fx.options import as_key
from pab_fx.policy import assigned
from pab_fx.testing import strategies

ROLES = ("spatial", "temporal", "cross")
EVERY_2ND = [False, True, False, True]
roles = pytest.mark.parametrize("role", ROLES)
configs = pytest.mark.parametrize("config", [PABConfig, PyramidAttentionBroadcastConfig])

not_a_range = pytest.mark.parametrize("value", [0, -1, True, False, 2.0, 2.5, math.nan, math.inf, "2", (2,)], ids=repr)
not_a_window = pytest.mark.parametrize(
    "value",
    [
        None,
        800,
        "100, 800",
        (),
        (100,),
        (100, 400, 800),
        (100, "800"),
        (None, 800),
        (True, 800),
        (math.nan, 800),
    ],
    ids=repr,
)


class Attending(nn.Module):
    """An attention that depends on the timestep in name only."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        attended = nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)
        return hidden_states + attended + 0 * timestep


def reuses(model: Callable[..., torch.Tensor], timesteps: tuple[float, ...] = (900, 700, 600, 500)) -> list[bool]:
    """For each step, whether `model`, an `Attending`, gives another output than without broadcast."""
    plain, found = Attending(), []
    for step, t in enumerate(timesteps):
        x = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(step))
        timestep = torch.tensor(float(t))
        found.append(not torch.equal(model(x, timestep), plain(x, timestep)))
    return found


# ------------------------------------------------------------------------------------------- ranges, windows


@configs
@roles
@not_a_range
def test_a_range_that_is_no_integer_of_at_least_1_is_refused(config: Any, role: str, value: Any) -> None:
    name = f"{role}_attention_block_skip_range"
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= 1, got "):
        PABBackend(config(**{name: value}), inner="eager")


@configs
@roles
@not_a_window
def test_a_window_that_is_no_pair_of_numbers_is_refused(config: Any, role: str, value: Any) -> None:
    name = f"{role}_attention_timestep_skip_range"
    with pytest.raises(ValueError, match=rf"{name} must be two numbers \(lo, hi\), got "):
        PABBackend(config(**{name: value}), inner="eager")


@configs
@roles
def test_a_reversed_window_is_refused_and_shown_the_right_way_round(config: Any, role: str) -> None:
    name = f"{role}_attention_timestep_skip_range"
    with pytest.raises(ValueError, match=rf"{name} is reversed: \(800, 100\); write it as \(100, 800\)"):
        PABBackend(config(**{name: (800, 100)}), inner="eager")


@given(st.integers(1, 50), st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)))
def test_every_integer_of_at_least_1_and_every_ordered_window_is_taken(
    skip_range: int, window: tuple[float, float]
) -> None:
    config = PABConfig(
        temporal_attention_block_skip_range=skip_range,
        temporal_attention_timestep_skip_range=sorted(window),  # type: ignore[arg-type]
    )
    assert config.skip_range("temporal") == skip_range
    assert config.window("temporal") == tuple(sorted(window))
    assert config.skip_range("spatial") is None


def test_a_window_may_be_any_iterable_of_two_numbers() -> None:
    for window in ([100, 800], iter((100, 800)), range(100, 801, 700)):
        assert PABConfig(spatial_attention_timestep_skip_range=window).window("spatial") == (100, 800)  # type: ignore[arg-type]


def test_without_any_range_spatial_attention_is_broadcast_every_2nd_step() -> None:
    config = PABConfig()
    assert [config.skip_range(role) for role in ROLES] == [2, None, None]
    assert {config.window(role) for role in ROLES} == {(100, 800)}
    assert PABConfig(cross_attention_block_skip_range=6).skip_range("spatial") is None
    assert PABConfig(mlp=MLPBroadcast((700,))).skip_range("spatial") is None


# ------------------------------------------------------------------------------------------------------ names


@configs
@roles
def test_identifiers_must_be_a_tuple_of_strings(config: Any, role: str) -> None:
    name = f"{role}_attention_block_identifiers"
    with pytest.raises(ValueError, match=rf"{name} must be a tuple of regular expressions, got 'blocks'"):
        PABBackend(config(**{name: "blocks"}), inner="eager")
    with pytest.raises(ValueError, match=rf"{name} must hold strings, got 1"):
        PABBackend(config(**{name: (1,)}), inner="eager")


@configs
@roles
def test_an_identifier_that_is_no_regular_expression_is_refused(config: Any, role: str) -> None:
    name = f"{role}_attention_block_identifiers"
    with pytest.raises(ValueError, match=rf"{name}.*'blocks\['"):
        PABBackend(config(**{name: ("blocks[",)}), inner="eager")


@configs
def test_a_timestep_callback_must_be_callable(config: Any) -> None:
    with pytest.raises(ValueError, match="current_timestep_callback must be callable, got 500"):
        PABBackend(config(current_timestep_callback=500), inner="eager")


def test_an_unknown_option_is_refused_with_the_names_that_are_like_it() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'spatial_range'.*spatial_attention_block_skip_range"):
        PABConfig.of({"spatial_range": 2})
    with pytest.raises(ValueError, match=r"unknown option 'spatial_range'.*spatial_attention_block_skip_range"):
        PABConfig.preset("latte", spatial_range=2)
    with pytest.raises(TypeError, match="spatial_range"):
        PABConfig(spatial_range=2)  # type: ignore[call-arg]


def test_an_unknown_role_is_refused_with_the_names_there_are() -> None:
    for look_up in (PABConfig().skip_range, PABConfig().window, PABConfig().identifiers):
        with pytest.raises(ValueError, match=r"unknown role 'spacial'.*spatial, temporal, cross"):
            look_up("spacial")


def test_a_config_of_another_kind_is_refused() -> None:
    for config in ({"spatial_attention_block_skip_range": 2}, "latte", PABConfig):
        with pytest.raises(
            ValueError,
            match=r"config must be a PABConfig, diffusers' .*, SeaCacheConfig or FasterCacheConfig",
        ):
            PABBackend(config)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- presets


def test_the_presets_are_the_published_ones() -> None:
    cogvideox, latte, open_sora = (PABConfig.preset(name) for name in ("cogvideox", "latte", "open-sora"))

    assert [cogvideox.skip_range(role) for role in ROLES] == [2, None, None]
    assert cogvideox.window("spatial") == (100, 850)
    assert cogvideox.mlp == ()

    assert [latte.skip_range(role) for role in ROLES] == [2, 3, 6]
    assert {latte.window(role) for role in ROLES} == {(100, 800)}
    assert latte.mlp == (MLPBroadcast((720, 640, 560, 480, 400), (0, 1, 2, 3, 4), 2),)

    assert [open_sora.skip_range(role) for role in ROLES] == [2, 4, 6]
    assert {open_sora.window(role) for role in ROLES} == {(450, 930)}
    assert open_sora.mlp == ()


def test_a_preset_takes_overrides() -> None:
    config = PABConfig.preset("latte", cross_attention_block_skip_range=4, mlp=None)
    assert [config.skip_range(role) for role in ROLES] == [2, 3, 4]
    assert config.mlp == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sora", "did you mean 'open-sora'"),
        ("", "the presets are 'cogvideox', 'latte', 'open-sora'"),
        (None, "the presets are 'cogvideox', 'latte', 'open-sora'"),
        (["latte"], "did you mean 'latte'"),
    ],
    ids=repr,
)
def test_an_unknown_preset_is_refused_with_the_names_that_are_like_it(name: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"unknown preset .*{said}"):
        PABConfig.preset(name)


# -------------------------------------------------------------------------------------------------------- mlp


def test_every_form_of_mlp_means_the_same() -> None:
    broadcast = MLPBroadcast(timesteps=(720, 640), blocks=(0, 1), skip_count=2)
    apart = (MLPBroadcast((720,), (0, 1), 2), MLPBroadcast((640,), (0, 1), 2))
    videosys = {720: {"block": [0, 1], "skip_count": 2}, 640: {"block": [0, 1], "skip_count": 2}}

    assert PABConfig(mlp=broadcast).mlp == (broadcast,)
    assert PABConfig(mlp=[broadcast]).mlp == (broadcast,)
    assert PABConfig(mlp={"timesteps": [720, 640], "blocks": range(2), "skip_count": 2}).mlp == (broadcast,)
    assert PABConfig(mlp=videosys).mlp == apart
    assert PABConfig(mlp=[apart[0], {"timesteps": 640, "blocks": (0, 1), "skip_count": 2}]).mlp == apart
    assert PABConfig(mlp=None).mlp == ()


def test_mlp_without_blocks_means_every_block() -> None:
    assert PABConfig(mlp={"timesteps": (720,)}).mlp[0].blocks is None
    assert PABConfig(mlp={720: {"skip_count": 2}}).mlp[0].blocks is None


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ("latte", "mlp must be an MLPBroadcast or a mapping, got 'latte'"),
        (720, "mlp must be an MLPBroadcast or a mapping, got 720"),
        ((720, 640), "mlp must be an MLPBroadcast or a mapping, got 720"),
        ({}, "mlp: timesteps is missing"),
        ({"blocks": (0,)}, "mlp: timesteps is missing"),
        ({"timestep": 720}, "unknown option 'timestep' in mlp: did you mean 'timesteps'?"),
        ({"timesteps": ()}, "mlp: timesteps is empty"),
        ({"timesteps": None}, "mlp: timesteps must be numbers on the scheduler's scale, got None"),
        ({"timesteps": "720"}, "mlp: timesteps must be numbers on the scheduler's scale, got '720'"),
        ({"timesteps": (720, True)}, "mlp: timesteps must be numbers on the scheduler's scale, got True"),
        ({"timesteps": (math.nan,)}, "mlp: timesteps must be numbers on the scheduler's scale, got nan"),
        ({"timesteps": 720, "skip_count": 0}, "mlp: skip_count must be an integer >= 1, got 0"),
        ({"timesteps": 720, "skip_count": True}, "mlp: skip_count must be an integer >= 1, got True"),
        ({"timesteps": 720, "skip_count": 2.0}, r"mlp: skip_count must be an integer >= 1, got 2\.0"),
        ({"timesteps": 720, "blocks": (-1,)}, "mlp: a block index must be an integer >= 0, got -1"),
        ({"timesteps": 720, "blocks": "01"}, "mlp: a block index must be an integer >= 0, got '01'"),
        ({"timesteps": 720, "blocks": (True,)}, "mlp: a block index must be an integer >= 0, got True"),
        ({720: 2}, r"mlp: 720 must map to \{'block': \[...\], 'skip_count': n\}, got 2"),
        ({720: {"block": [0]}}, "mlp: 720 must map to .*, got {'block': "),
        ({720: {"blocks": [0], "skip_count": 2}}, "mlp: 720 must map to .*, got {'blocks': "),
        ({720: {"block": [0], "skip_count": 0}}, "mlp: skip_count must be an integer >= 1, got 0"),
    ],
    ids=repr,
)
def test_a_bad_mlp_is_refused(mlp: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABConfig(mlp=mlp)


def test_one_block_needs_no_list() -> None:
    assert MLPBroadcast(720, blocks=3).blocks == (3,)  # type: ignore[arg-type]
    assert PABConfig(mlp={720: {"block": 3, "skip_count": 2}}).mlp[0].blocks == (3,)


# ----------------------------------------------------------------------------------------------------- layers


def test_every_form_of_layers_means_the_same() -> None:
    layer = LayerBroadcast(("blocks.0", "blocks.1"), skip_range=3, timestep_skip_range=(200, 700))
    fields = {"identifiers": ["blocks.0", "blocks.1"], "skip_range": 3, "timestep_skip_range": [200, 700]}
    for layers in (layer, [layer], fields, (fields,)):
        assert PABConfig(layers=layers).layers == (layer,)
    assert PABConfig(layers=layer).skip_range("spatial") is None
    assert PABConfig(layers=[]).layers == PABConfig(layers=None).layers == ()


def test_of_several_layers_the_first_that_matches_counts() -> None:
    policies = PABConfig(layers=[LayerBroadcast(("0.attn2",)), LayerBroadcast(("attn2$",), skip_range=4)]).policies()
    assert assigned(policies, "cross", "blocks.0.attn2")[1] is None
    assert assigned(policies, "cross", "blocks.1.attn2")[1] == policies[1]
    assert assigned(policies, "spatial", "blocks.1.attn1")[1] is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.0", "layers must be a LayerBroadcast, a mapping of its fields, or several, got 'blocks.0'"),
        (
            {"blocks.0": 3},
            "unknown option 'blocks.0' in layers: it has 'identifiers', 'skip_range', 'timestep_skip_range'",
        ),
        ({"skip_range": 3}, "layers: identifiers is missing"),
        ({"identifiers": ()}, "layers: identifiers is empty"),
        ({"identifiers": "blocks"}, "layers: identifiers must be a tuple of regular expressions, got 'blocks'"),
        ({"identifiers": ("blocks.(",)}, "layers: identifiers holds .* no regular expression"),
        ({"identifiers": ("0",), "skip_range": 0}, "layers: skip_range must be an integer >= 1, got 0"),
        ({"identifiers": ("0",), "timestep_skip_range": (9, 1)}, "layers: timestep_skip_range is reversed"),
    ],
    ids=repr,
)
def test_a_bad_layer_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABConfig(layers=layers)


# ------------------------------------------------------------------------------------------------------ files


@given(strategies.configs())
def test_a_saved_config_is_loaded_as_it_was(config: PABConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pab.json"
        config.save(path)
        assert PABConfig.load(path) == config


def test_layers_and_presets_are_saved_and_a_callback_is_not(tmp_path: Path) -> None:
    config = PABConfig.preset("latte", layers=LayerBroadcast(("blocks.0",), skip_range=3))
    path = tmp_path / "pab.json"
    with pytest.warns(UserWarning, match="current_timestep_callback is code and does not go into .*pab.json"):
        dataclasses.replace(config, current_timestep_callback=lambda: 500).save(path)
    assert PABConfig.load(path) == config
    assert PABConfig.load(path, spatial_attention_block_skip_range=5).skip_range("spatial") == 5
    assert "callback" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "pab.json is no JSON"),
        ("[3]", r"pab.json must hold an object, .* got \[3\]"),
        ('{"ranges": 3}', "pab.json: unknown option 'ranges'"),
        (
            '{"spatial_attention_block_skip_range": 0}',
            "pab.json: spatial_attention_block_skip_range must be an integer",
        ),
    ],
)
def test_a_file_that_holds_no_config_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pab.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PABConfig.load(path)


# ---------------------------------------------------------------------------------------------------- backend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering": "branch"}, "lowering='branch' is unknown; it is one of 'specialize', 'cond'"),
        ({"lowering": None}, "lowering=None is unknown; it is one of 'specialize', 'cond'"),
        (
            {"inner": "inductr"},
            "inner='inductr' is not a registered Dynamo backend: did you mean .*'inductor'",
        ),
        ({"inner": 3}, "inner must be the name of a backend or a callable"),
        ({"inner": None}, "inner must be the name of a backend or a callable"),
        ({"passes": (len, 3)}, "passes must hold functions gm -> gm, got 3"),
        ({"passes": len}, "passes must "),
        ({"timesteps": ("soon",)}, "timesteps must .*'soon'"),
        ({"timesteps": 500}, "timesteps must .*500"),
    ],
    ids=repr,
)
def test_a_bad_option_of_the_backend_is_refused_before_anything_runs(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABBackend(**options)
    with pytest.raises(ValueError, match=message):
        pab_fx.enable(nn.Linear(2, 2), **options)


def test_an_option_that_the_inner_backend_would_ignore_is_refused() -> None:
    for options in ({"mode": "max-autotune"}, {"options": {"max_autotune": True}}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*inductor"):
            PABBackend(inner="eager", **options)  # type: ignore[arg-type]


def test_an_unknown_mode_or_option_of_inductor_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="mode='fastest'"):
        PABBackend(mode="fastest")
    with pytest.raises(ValueError, match="max_autotone"):
        PABBackend(options={"max_autotone": True})


def test_any_registered_backend_and_any_compiler_may_be_the_inner_one() -> None:
    seen: list[Any] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    for inner in ("eager", "aot_eager", compiler):
        torch.compiler.reset()
        assert reuses(torch.compile(Attending(), backend=PABBackend(inner=inner))) == EVERY_2ND
    assert len(seen) == 2


# ------------------------------------------------------------------------------------ torch.compile(options)


def test_options_of_torch_compile_are_the_backends_and_the_configs() -> None:
    for options, expected in (
        ({"inner": "eager"}, EVERY_2ND),
        ({"inner": "eager", "lowering": "cond"}, EVERY_2ND),
        ({"inner": "eager", "spatial_attention_block_skip_range": 3}, [False, True, True, False]),
        (
            {"inner": "eager", "spatial_attention_timestep_skip_range": (550, 650)},
            [False, False, False, False],
        ),
        (
            {"inner": "eager", "config": PABConfig(spatial_attention_block_skip_range=3)},
            [False, True, True, False],
        ),
        ({"inner": "eager", "config": PABConfig(cross_attention_block_skip_range=3)}, [False] * 4),
        ({"inner": "eager", "timesteps": (900, 700, 600, 500)}, EVERY_2ND),
    ):
        torch.compiler.reset()
        assert reuses(torch.compile(Attending(), backend=pab_backend, options=options)) == expected, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowring": "cond"}, "unknown option 'lowring' for the backend 'pab': did you mean 'lowering'"),
        ({"spatial_range": 2}, "unknown option 'spatial_range'.*spatial_attention_block_skip_range"),
        (
            {"spatial_attention_block_skip_range": 0},
            "spatial_attention_block_skip_range must be an integer >= 1",
        ),
        ({"config": PABConfig(), "mlp": None}, "give either config or its fields as options, not both: mlp"),
        ({"inner": "inductr"}, "inner='inductr' is not a registered Dynamo backend"),
        ({"lowering": "branch"}, "lowering='branch' is unknown"),
    ],
    ids=repr,
)
def test_a_bad_option_of_torch_compile_is_refused_before_anything_runs(
    options: Mapping[str, Any], message: str
) -> None:
    model = torch.compile(Attending(), backend=pab_backend, options=options)  # type: ignore[call-overload]
    with pytest.raises(Exception, match=f"ValueError: {message}"):
        model(torch.ones(1, 1, 3, 4), torch.tensor(500.0))


def test_timesteps_given_as_tensors_are_told_apart_by_their_values() -> None:
    captured: list[Any] = []

    def capture(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured[:] = gm, example_inputs
        return gm.forward

    reuses(torch.compile(Attending(), backend=capture, dynamic=False))
    timesteps = torch.tensor([700.0, 600.0])
    for last in (600.0, 50.0):
        timesteps[1] = last  # the same object, as a tensor at a freed one's address would be
        graph: Any = pab_backend(*captured, options={"inner": "eager", "timesteps": timesteps})
        assert graph._runtime.known_timesteps() == (700.0, last)


def backend_for(**options: Any) -> PABBackend:
    """The backend that `backend="pab"` takes for these options."""
    return backend_of({"inner": "eager", **options}, None)


@pytest.mark.parametrize("made", [np.array, torch.tensor, list, lambda given: list(map(np.float64, given))])
def test_backends_by_name_are_told_apart_by_the_values_of_arrays(made: Callable[[list[float]], Any]) -> None:
    """An array may lie where another one was freed; the same one with other values stands for that."""
    timesteps = made([700.0, 600.0, 500.0])
    first = backend_for(timesteps=timesteps)
    timesteps[1] = 550.0
    second = backend_for(timesteps=timesteps)
    assert (first.runtime.known_timesteps(), second.runtime.known_timesteps()) == ((700, 600, 500), (700, 550, 500))
    assert backend_for(timesteps=made([700.0, 550.0, 500.0])) is second


def test_options_are_told_apart_by_every_value_of_an_array_inside_of_another() -> None:
    steps = np.linspace(1000, 0, 2000)
    other = steps.copy()
    other[1000] = 0.5  # which is not printed
    assert as_key({"given": [steps]}) == as_key({"given": [steps.copy()]}) != as_key({"given": [other]})
    assert as_key({"given": (steps,)}) != as_key({"given": [steps]})


SAME = {
    "a config": lambda: {"config": PABConfig(spatial_attention_block_skip_range=2)},
    "a list of a config": lambda: {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_block_identifiers": ["a"],
    },
    "a dtype": lambda: {"cache_dtype": torch.int8},
    "a device": lambda: {"cache_device": torch.device("cpu")},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_equal_options_by_name_are_one_backend(options: Callable[[], dict[str, Any]]) -> None:
    assert backend_for(**options()) is backend_for(**options()) is not backend_for()


def test_options_that_differ_in_type_alone_are_checked_each() -> None:
    backend_for(spatial_attention_block_skip_range=1)
    with pytest.raises(ValueError, match="skip_range"):
        backend_for(spatial_attention_block_skip_range=True)


def test_an_option_that_is_told_apart_by_its_identity_is_kept_alive() -> None:
    """Else another one at its address would get the backend that was made for it."""

    class Keep:
        """A pass, alone, in a list, or as the timesteps' function."""

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, gm: Any = None) -> Any:
            return (700.0, 600.0) if gm is None else gm

    for options in (lambda each: {"passes": [each]}, lambda each: {"timesteps": each}):
        made = [Keep(), Keep()]
        backends = [backend_for(**options(each)) for each in made]
        assert backends[0] is backend_for(**options(made[0])) is not backends[1]
        alive = weakref.ref(made[0])
        del made, backends
        gc.collect()
        assert alive() is not None


def test_a_config_that_can_be_changed_is_told_apart_by_its_identity() -> None:
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
    assert as_key(config) == as_key(config) != as_key(dataclasses.replace(config))


def test_models_compiled_with_the_same_options_share_nothing_but_code() -> None:
    options = {"inner": "eager"}
    first, second = (torch.compile(Attending(), backend=pab_backend, options=options) for _ in range(2))
    assert reuses(first) == reuses(second) == reuses(first) == EVERY_2ND


def test_the_entry_point_names_the_backend() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group = pyproject.split('[project.entry-points."torch_dynamo_backends"]')[1].split("[")[0]
    name, target = (part.strip().strip('"') for part in group.strip().split("="))
    assert name == "pab"
    assert pkgutil.resolve_name(target) is pab_backend


def test_the_backend_is_found_by_name_where_the_package_is_installed() -> None:
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="pab"):
        pytest.skip("pab_fx runs from its source tree: pip install it to have its entry point")
    assert reuses(torch.compile(Attending(), backend="pab", options={"inner": "eager"})) == EVERY_2ND


@pytest.mark.parametrize(
    ("config", "hint"), [("latte", "PABConfig.preset('latte')"), ({"mlp": None}, "PABConfig.of")], ids=repr
)
def test_what_stands_for_a_config_elsewhere_is_refused_with_what_to_write(config: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        PABBackend(config, inner="eager")


@pytest.mark.parametrize("value", [[], {}, "ff", 5], ids=repr)
def test_an_mlp_that_lists_nothing_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="mlp"):
        PABConfig(mlp=value)


def test_options_of_inductor_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="options must be a mapping"):
        PABBackend(options="max_autotune")  # type: ignore[arg-type]


def test_a_backend_prints_what_it_does() -> None:
    assert "inner='eager', lowering='cond'" in repr(PABBackend(inner="eager", lowering="cond"))
