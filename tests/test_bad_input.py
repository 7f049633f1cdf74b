"""What cannot be broadcast is computed, what is set up wrong is said with what to change; no wrong picture."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch.nn import functional as F

import pab_fx
from pab_fx import Attentions, Every, Last, PABBackend, PABConfig, Policy, Taylor

TIMESTEPS = (900, 700, 600, 500, 400, 50)
EVERY_2ND = [False, True, False, True, False, False]
lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


class Attention(nn.Module):
    """Self-attention with a projection before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = nn.Linear(4, 4), nn.Linear(4, 4)
        self.requires_grad_(False)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_of(F.scaled_dot_product_attention(query := self.into(x), query, query))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)


class Model(nn.Module):
    """Attention on a residual stream."""

    def __init__(self, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = attn or Attention()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states + 0.01 * timestep
        return x + self.attn(x)


def hidden_states(step: int) -> torch.Tensor:
    return torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(step))


def differs(
    compiled: Callable[..., torch.Tensor], model: nn.Module, scale: float = 1, begin: Callable[[], None] = lambda: None
) -> list[bool]:
    """For each step of a generation, whether the compiled model's output is another than the model's own.

    Args:
        scale: what timesteps are multiplied by before they are passed.
        begin: is called before either model is.
    """
    found = []
    for step, t in enumerate(TIMESTEPS):
        timestep = torch.tensor(t * scale)
        begin()
        expected = model(hidden_states(step), timestep)
        begin()
        found.append(not torch.equal(compiled(hidden_states(step), timestep), expected))
    return found


def pab_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "pab_fx" in str(warning.message)]


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings that the test gives rise to."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def test_a_model_that_is_set_up_well_reuses_and_warns_of_nothing(caught: list[warnings.WarningMessage]) -> None:
    model, backend = Model(), PABBackend(inner="eager")
    assert differs(torch.compile(model, backend=backend), model) == EVERY_2ND
    assert pab_warnings(caught) == []
    assert backend.report().reused == 2


# ------------------------------------------------------------------------------------- identifiers and roles


def test_identifiers_that_match_nothing_warn_once_and_list_the_attentions(
    caught: list[warnings.WarningMessage],
) -> None:
    entry, clock = zoo.BY_NAME["CogVideoXTransformer3DModel"], zoo.Clock()
    config = zoo.diffusers_config(clock)
    config.spatial_attention_block_identifiers = ("single_blocks",)
    model, backend = entry.build(), PABBackend(config, inner="eager")
    compiled = torch.compile(model, backend=backend)

    assert unequal(zoo.trajectory(entry, compiled, TIMESTEPS, clock), zoo.trajectory(entry, model, TIMESTEPS)) == 0

    (message,) = pab_warnings(caught)
    assert "matches none of the attentions found, so nothing is reused" in message
    assert "transformer_blocks.0.attn1 (spatial)" in message
    assert "transformer_blocks.1.attn1 (spatial)" in message
    assert backend.report().reused == 0
    assert {region.left_alone for region in backend.report().regions} == {"the config leaves it alone"}


def test_identifiers_that_match_something_do_not_warn(caught: list[warnings.WarningMessage]) -> None:
    entry, clock = zoo.BY_NAME["CogVideoXTransformer3DModel"], zoo.Clock()
    config = zoo.diffusers_config(clock)
    config.spatial_attention_block_identifiers = (r"blocks\.1\.",)
    model, backend = entry.build(), PABBackend(config, inner="eager")
    compiled, oracle = torch.compile(model, backend=backend), zoo.hooked(model, config)

    found = zoo.trajectory(entry, compiled, TIMESTEPS, clock)
    assert unequal(found, zoo.trajectory(entry, oracle, TIMESTEPS, clock)) == 0
    assert unequal(found, zoo.trajectory(entry, model, TIMESTEPS)) == 2
    assert pab_warnings(caught) == []
    left_alone = {region.name: region.left_alone for region in backend.report().regions}
    assert left_alone == {
        "transformer_blocks.0.attn1": "the config leaves it alone",
        "transformer_blocks.1.attn1": None,
    }


@pytest.mark.parametrize("timesteps", [(500.0,), (901.0, 500.0)], ids=["the first", "a later one"])
def test_timesteps_that_are_not_the_generations_warn(
    timesteps: tuple[float, ...], caught: list[warnings.WarningMessage]
) -> None:
    compiled = torch.compile(Model(), backend=PABBackend(inner="eager", timesteps=(901.0, 701.0)))
    with torch.no_grad():
        for t in timesteps:
            compiled(hidden_states(0), torch.tensor(t))
    assert any("called at timestep 500, which is none of timesteps=" in each for each in pab_warnings(caught))


def test_a_window_in_which_no_timestep_lies_warns(caught: list[warnings.WarningMessage]) -> None:
    config = PABConfig(spatial_attention_timestep_skip_range=(810, 890))
    compiled = torch.compile(Model(), backend=PABBackend(config, inner="eager", timesteps=(900.0, 800.0, 700.0)))
    with torch.no_grad():
        compiled(hidden_states(0), torch.tensor(900.0))
    (message,) = pab_warnings(caught)
    assert "none of the generation's 3 timesteps, 900 to 700, lies in the window (810, 890)" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor(35), "order must be an integer from 0 to 34, got 35"),
        (lambda: Last(1), r"keeps_updates must be True or False, got 1"),
        (lambda: PABConfig(forecast_dtype="bfloat16"), "is for forecast_order >= 1"),
        (lambda: pab_fx.enable(Model(), fullgraph=3), "fullgraph must be True or False, got 3"),
        (lambda: pab_fx.enable(Model(), dynamic="yes"), "dynamic must be True or False, got 'yes'"),
        (
            lambda: pab_fx.rewrite(torch.fx.symbolic_trace(Model()), Policy(Attentions(), Every(2, cooldown=2))),
            "rewrite takes none: use pab_fx.export",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ask", [lambda pab: pab.session(), lambda pab: pab.warmup(), lambda pab: pab.set_config(None)])
def test_what_is_disabled_takes_no_orders(ask: Callable[[Any], Any]) -> None:
    pab = pab_fx.enable(Model(), inner="eager")
    pab.disable()
    with pytest.raises(RuntimeError, match="PAB was disabled on this model"):
        ask(pab)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fast", "those of a whole generation, such as scheduler.timesteps, got 'fast'"),
        ((900, float("nan")), "got nan"),
        (TIMESTEPS[::-1], "begin at .* and end at .* those of a generation fall"),
    ],
)
def test_timesteps_that_are_no_generations_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PABBackend(inner="eager", timesteps=given)


def test_timesteps_may_be_tensors() -> None:
    given = torch.tensor(TIMESTEPS)
    for each in (given, list(given), given.numpy()):
        assert PABBackend(inner="eager", timesteps=each).runtime.timesteps == TIMESTEPS


@pytest.mark.parametrize("name", ["regional", "step_invariants"])
def test_a_switch_that_is_no_bool_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        PABBackend(**{name: "no"})


def test_a_warning_points_at_the_line_that_called_the_model(caught: list[warnings.WarningMessage]) -> None:
    compiled = torch.compile(Model(), backend=PABBackend(PABConfig(cross_attention_block_skip_range=2), inner="eager"))
    with torch.no_grad():
        compiled(hidden_states(0), torch.tensor(500.0))
    (warning,) = (each for each in caught if "pab_fx" in str(each.message))
    assert warning.filename == __file__


def test_a_role_that_the_model_has_no_attention_of_warns_and_lists_the_attentions(
    caught: list[warnings.WarningMessage],
) -> None:
    model = Model()
    backend = PABBackend(PABConfig(temporal_attention_block_skip_range=3), inner="eager")
    assert not any(differs(torch.compile(model, backend=backend), model))
    (message,) = pab_warnings(caught)
    assert "attn (spatial)" in message


def test_mlp_blocks_that_match_nothing_warn_and_list_the_feed_forwards(
    caught: list[warnings.WarningMessage],
) -> None:
    entry = zoo.BY_NAME["PixArtTransformer2DModel"]
    model = entry.build()
    config = PABConfig(mlp={"timesteps": TIMESTEPS[1], "blocks": (7,)})
    compiled = torch.compile(model, backend=PABBackend(config, inner="eager"))
    assert unequal(zoo.trajectory(entry, compiled, TIMESTEPS), zoo.trajectory(entry, model, TIMESTEPS)) == 0
    (message,) = pab_warnings(caught)
    assert "transformer_blocks.0.ff" in message


def test_a_model_without_attention_runs_as_it_is(caught: list[warnings.WarningMessage]) -> None:
    model, backend = Model(nn.Linear(4, 4)), PABBackend(inner="eager")
    model.requires_grad_(False)
    assert not any(differs(torch.compile(model, backend=backend), model))
    assert backend.report().regions == ()


def unequal(left: list[tuple[torch.Tensor, ...]], right: list[tuple[torch.Tensor, ...]]) -> int:
    """In how many steps two trajectories differ."""
    return sum(
        any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True)) for outputs in zip(left, right, strict=True)
    )


# -------------------------------------------------------------------------------------------------- gradients


@lowerings
def test_with_gradients_the_model_runs_unbroadcast_says_so_and_can_be_trained(
    lowering: str, caught: list[warnings.WarningMessage]
) -> None:
    model, backend = Model().requires_grad_(True), PABBackend(inner="eager", lowering=lowering)
    compiled = torch.compile(model, backend=backend)

    assert not any(differs(compiled, model))
    (message,) = pab_warnings(caught)
    assert "PAB is for inference" in message
    assert "required by parameters" in message
    assert "torch.no_grad(), or model.requires_grad_(False)" in message

    compiled(hidden_states(0), torch.tensor(700.0)).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(hidden_states(0), torch.tensor(700.0)).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]

    with torch.no_grad():
        assert differs(compiled, model) == EVERY_2ND
    assert not any(differs(compiled, model))


def test_gradients_of_the_inputs_are_right() -> None:
    model = Model()
    compiled = torch.compile(model, backend=PABBackend(inner="eager"))
    assert differs(compiled, model) == EVERY_2ND
    for step, t in enumerate((700, 600, 500)):
        gradients = []
        for callable_ in (model, compiled):
            x = hidden_states(step).requires_grad_()
            callable_(x, torch.tensor(float(t))).square().sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_input_that_requires_gradients_is_told_from_parameters(
    enabled: bool, caught: list[warnings.WarningMessage]
) -> None:
    model = Model()
    plain = copy.deepcopy(model)
    if enabled:
        pab_fx.enable(model, inner="eager")
    else:
        model.compile(backend=PABBackend(inner="eager"))
    for step, t in enumerate(TIMESTEPS):
        x = hidden_states(step).requires_grad_()
        assert torch.equal(model(x, torch.tensor(float(t))), plain(x, torch.tensor(float(t))))
    (message,) = pab_warnings(caught)
    assert "required by inputs" in message
    assert "torch.no_grad(), or pass inputs that you have called detach() on" in message
    assert "requires_grad_" not in message
    assert differs(lambda x, t: model(x.requires_grad_().detach(), t), plain) == EVERY_2ND


def test_frozen_parameters_need_no_no_grad() -> None:
    model = Model()
    assert torch.is_grad_enabled()
    assert differs(torch.compile(model, backend=PABBackend(inner="eager")), model) == EVERY_2ND


# -------------------------------------------------------------------------------------------------- timesteps


@lowerings
def test_a_timestep_off_the_windows_scale_warns_and_says_what_to_set(
    lowering: str, caught: list[warnings.WarningMessage]
) -> None:
    model, backend = Model(), PABBackend(inner="eager", lowering=lowering)
    compiled = torch.compile(model, backend=backend)
    assert not any(differs(compiled, model, scale=1e-3))
    assert not any(differs(compiled, model, scale=1e-3))
    (message,) = pab_warnings(caught)
    assert "timestep 0.9" in message
    assert "up to 800" in message
    assert "current_timestep_callback" in message


def test_a_timestep_off_the_scale_is_put_right_by_a_callback(caught: list[warnings.WarningMessage]) -> None:
    clock, model = zoo.Clock(), Model()
    backend = PABBackend(PABConfig(current_timestep_callback=clock), inner="eager")
    compiled = torch.compile(model, backend=backend)

    def timed(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        clock.t = timestep.item() * 1000
        return compiled(x, timestep)

    assert differs(timed, model, scale=1e-3) == EVERY_2ND
    assert pab_warnings(caught) == []


def test_windows_may_be_given_on_the_models_own_scale(caught: list[warnings.WarningMessage]) -> None:
    config = PABConfig(spatial_attention_timestep_skip_range=(0.1, 0.8))
    model = Model()
    compiled = torch.compile(model, backend=PABBackend(config, inner="eager"))
    assert differs(compiled, model, scale=1e-3) == EVERY_2ND
    assert pab_warnings(caught) == []


@pytest.mark.parametrize("value", [None, "soon", object()], ids=["None", "a string", "an object"])
def test_a_callback_that_returns_no_number_is_an_error_that_says_so(value: Any) -> None:
    config = PABConfig(current_timestep_callback=lambda: value)
    compiled = torch.compile(Model(), backend=PABBackend(config, inner="eager"))
    with pytest.raises(Exception, match=r"current_timestep_callback returned .*number"):
        compiled(hidden_states(0), torch.tensor(700.0))


@pytest.mark.parametrize(
    "make", [float, int, torch.tensor, lambda t: torch.tensor([t, t]), lambda t: torch.tensor(int(t))]
)
def test_a_callback_may_return_a_number_or_a_tensor(make: Callable[[float], Any]) -> None:
    clock, model = zoo.Clock(), Model()
    config = PABConfig(current_timestep_callback=lambda: make(clock.t))
    compiled = torch.compile(model, backend=PABBackend(config, inner="eager"))

    def timed(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        clock.t = timestep.item()
        return compiled(x, timestep)

    assert differs(timed, model) == EVERY_2ND


def test_without_any_timestep_everything_is_computed_and_a_warning_says_what_to_set(
    caught: list[warnings.WarningMessage],
) -> None:
    model, backend = Attention(), PABBackend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    for step in range(4):
        assert torch.equal(compiled(hidden_states(step)), model(hidden_states(step)))
    (message,) = pab_warnings(caught)
    assert "timestep" in message
    assert "current_timestep_callback" in message
    assert backend.report().reused == 0


def test_without_a_timestep_input_a_callback_will_do(caught: list[warnings.WarningMessage]) -> None:
    clock, model = zoo.Clock(), Attention()
    backend = PABBackend(PABConfig(current_timestep_callback=clock), inner="eager")
    compiled = torch.compile(model, backend=backend)

    def timed(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        clock.t = timestep.item()
        return compiled(x)

    assert differs(timed, lambda x, timestep: model(x)) == EVERY_2ND  # type: ignore[arg-type]
    assert pab_warnings(caught) == []


def test_a_timestep_that_is_not_a_number_at_all_reuses_nothing() -> None:
    model, backend = Model(), PABBackend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    for step in range(4):
        timestep = torch.tensor(float("nan"))
        assert compiled(hidden_states(step), timestep).isnan().all()
    assert backend.report().reused == 0
    assert differs(compiled, model) == EVERY_2ND


# ------------------------------------------------------------------------------- what cannot be broadcast safely


class DropsOut(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.attend(x), 0.5, self.training)


class DropsOutInside(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_of(self.dropout(F.scaled_dot_product_attention(query := self.into(x), query, query)))


class AttendsWithDropout(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = 0.5 if self.training else 0.0
        return self.out_of(F.scaled_dot_product_attention(query := self.into(x), query, query, dropout_p=p))


class AddsNoise(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x + torch.randn_like(x) * self.training)


class FillsWithNoise(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attend(x)
        return attended + torch.empty_like(attended).normal_() if self.training else attended


@lowerings
@pytest.mark.parametrize("attention", [DropsOut, DropsOutInside, AttendsWithDropout, AddsNoise, FillsWithNoise])
def test_an_attention_that_draws_random_numbers_is_computed_in_every_step(
    lowering: str, attention: type[Attention]
) -> None:
    model, backend = Model(attention()).train(), PABBackend(inner="eager", lowering=lowering)
    compiled = torch.compile(model, backend=backend)
    assert not any(differs(compiled, model, begin=lambda: torch.manual_seed(0)))  # type: ignore[arg-type, return-value]
    assert "it draws random numbers" in str(backend.report())
    assert backend.report().reused == 0

    compiled.eval()
    model.eval()
    if attention is not AddsNoise:  # it goes on drawing
        assert differs(compiled, model) == EVERY_2ND


class Counts(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.attend(x) * self.calls


class WritesItsInput(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attend(x)
        x.mul_(0.5)
        return attended


class WritesAView(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attend(x)
        x[:, 0] = 0
        return attended


@lowerings
@pytest.mark.parametrize("attention", [Counts, WritesItsInput, WritesAView])
def test_an_attention_that_changes_something_outside_is_computed_in_every_step(
    lowering: str, attention: type[Attention]
) -> None:
    torch.manual_seed(0)
    model, plain = Model(attention()), Model(attention())
    plain.load_state_dict(model.state_dict())
    backend = PABBackend(inner="eager", lowering=lowering)
    assert not any(differs(torch.compile(model, backend=backend), plain))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert backend.report().reused == 0
    (region,) = backend.report().regions
    assert region.left_alone is not None
    assert f"left alone: attn (spatial): {region.left_alone}" in str(backend.report())


@lowerings
def test_an_attention_that_assigns_to_its_module_does_not_in_a_reusing_step_as_with_hooks(lowering: str) -> None:
    class CountsByAssignment(Counts, AttentionModuleMixin):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return self.attend(x) * self.calls

    torch.manual_seed(0)
    clock = zoo.Clock()
    model, config = Model(CountsByAssignment()), zoo.diffusers_config(clock)
    oracle = zoo.hooked(model, config)
    compiled = torch.compile(model, backend=PABBackend(config, inner="eager", lowering=lowering))
    for step, t in enumerate(TIMESTEPS):
        clock.t = t
        x, timestep = hidden_states(step), torch.tensor(float(t))
        assert torch.equal(compiled(x, timestep), oracle(x, timestep))
    assert model.attn.calls == oracle.attn.calls == EVERY_2ND.count(False)  # type: ignore[union-attr]


@lowerings
def test_an_attention_that_changes_only_what_is_its_own_is_broadcast(lowering: str) -> None:
    class Scales(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.into(x)
            query.mul_(2)
            attended = F.scaled_dot_product_attention(query, query, query)
            attended[:, 0] = 0
            return self.out_of(attended)

    model, backend = Model(Scales()), PABBackend(inner="eager", lowering=lowering)
    assert differs(torch.compile(model, backend=backend), model) == EVERY_2ND
    assert backend.report().reused == 2


@lowerings
def test_one_attention_that_is_unsafe_leaves_the_others_broadcast(lowering: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.safe, self.unsafe = Attention(), Counts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.unsafe(x + self.safe(x))

    torch.manual_seed(0)
    model, plain = Model(Two()), Model(Two())
    plain.load_state_dict(model.state_dict())
    backend = PABBackend(inner="eager", lowering=lowering)
    assert differs(torch.compile(model, backend=backend), plain) == EVERY_2ND
    left_alone = {region.name: region.left_alone is not None for region in backend.report().regions}
    assert left_alone == {"attn.safe": False, "attn.unsafe": True}
    assert torch.equal(model.attn.unsafe.calls, torch.tensor(float(len(TIMESTEPS))))


def test_a_pass_that_returns_no_graph_is_an_error_that_names_it() -> None:
    def forgets_to_return(gm: torch.fx.GraphModule) -> Any:
        gm.recompile()

    compiled = torch.compile(Model(), backend=PABBackend(inner="eager", passes=[forgets_to_return]))
    with pytest.raises(Exception, match="forgets_to_return"):
        compiled(hidden_states(0), torch.tensor(700.0))


def test_mlp_timesteps_that_the_generation_does_not_have_warn(caught: list[warnings.WarningMessage]) -> None:
    entry = zoo.BY_NAME["PixArtTransformer2DModel"]
    config = PABConfig(mlp={"timesteps": TIMESTEPS[1] + 1})
    compiled = torch.compile(entry.build(), backend=PABBackend(config, inner="eager", timesteps=TIMESTEPS))
    zoo.trajectory(entry, compiled, TIMESTEPS)
    (message,) = pab_warnings(caught)
    assert "List timesteps of the scheduler" in message


class Hookable(Attention, AttentionModuleMixin):
    """An attention that diffusers' hooks take for one."""


class Twice(Model):
    """One attention on two inputs in each step."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states + 0.01 * timestep
        return x + self.attn(x) + 3 * self.attn(2 * x + 1)


def test_a_module_that_is_called_several_times_in_a_step_is_named() -> None:
    torch.compiler.reset()
    config = zoo.diffusers_config(zoo.Clock(), (2, None, None))
    compiled = torch.compile(Twice(Hookable()).eval(), backend=PABBackend(config, inner="eager"))
    with torch.no_grad(), pytest.warns(UserWarning, match="called several times in a step: attn"):
        compiled(hidden_states(0), torch.tensor(900.0))
