"""Policies together: parts inside of parts, each against a plain eager reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Part, distance, equal
from test_blocks import (
    TIMESTEPS,
    Attention,
    Denoiser,
    DiT,
    JoinedMMDiT,
    MMDiT,
    SpaceAndTime,
    build,
    inputs,
    trajectory,
)
from test_ranges_across_breaks import BrokenDiT
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pab_fx
from pab_fx import (
    AfterTimesteps,
    Attentions,
    Blocks,
    Every,
    FeedForwards,
    Hermite,
    How,
    Last,
    Model,
    Policy,
    Residual,
    Rule,
    SkipRange,
    Steps,
    Taylor,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

STEPS = len(TIMESTEPS)
PARTS: tuple[type, ...] = (Model, Blocks, Attentions, FeedForwards)


class Reference:
    """A model of which each part computes or reads what was kept, as its policy says; inner parts only as it computes.

    Args:
        model: one of `test_blocks`.
        policies: one at most for each of `PARTS`.
    """

    def __init__(self, model: Denoiser, policies: Sequence[Policy]) -> None:
        self._model, self._at = copy.deepcopy(model), (0, 0.0)
        self._policies = {type(policy.where): policy for policy in policies}
        self.parts: dict[type, list[Part]] = {}
        for name, module in self._model.named_modules():
            is_feed_forward = isinstance(module, nn.Sequential) and "blocks" in name
            kind = Attentions if isinstance(module, Attention) else FeedForwards if is_feed_forward else None
            if kind is not None:
                module.forward = self._replaced(kind, module.forward)  # type: ignore[method-assign]
        run, self._whole = self._model.run, self._part(Model)
        blocks = self._part(Blocks)
        if blocks is not None:
            self._model.run = lambda streams, embedding: tuple(  # type: ignore[method-assign]
                blocks(*self._at, self._model.identity(streams), lambda: run(streams, embedding))
            )

    def trajectory(self) -> list[Tensor]:
        found = []
        for self._at in enumerate(TIMESTEPS):
            given = inputs(*self._at)
            if self._whole is None:
                found.append(self._model(*given).clone())
            else:
                (output,) = self._whole(*self._at, given[:1], lambda given=given: (self._model(*given),))  # type: ignore[misc]
                found.append(output.clone())
        return found

    @property
    def reused(self) -> int:
        return sum(part.reused for parts in self.parts.values() for part in parts)

    def _part(self, kind: type) -> Part | None:
        if kind not in self._policies:
            return None
        self.parts.setdefault(kind, []).append(Part(self._policies[kind], STEPS))
        return self.parts[kind][-1]

    def _replaced(self, kind: type, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Other calls of a module in a step are parts of their own."""
        calls: list[Part] = []
        done: dict[tuple[int, float], int] = {}

        def forward(*args: Tensor) -> Tensor:
            call = done[self._at] = done.get(self._at, -1) + 1
            if call == len(calls):
                part = self._part(kind)
                if part is None:
                    return compute(*args)
                calls.append(part)
            return calls[call](*self._at, args, lambda: (compute(*args),))[0]

        return forward


def check(kind: type[Denoiser], policies: Sequence[Policy], **options: Any) -> tuple[Reference, list[Tensor]]:
    """The compiled model does what the reference does, over two generations, and the second starts afresh.

    Returns:
        The reference, and what it yields.
    """
    model = build(kind)
    reference = Reference(model, policies)
    expected = reference.trajectory()
    with pab_fx.enable(model, policies, inner="eager", timesteps=TIMESTEPS, **options) as pab:
        for generation in range(2):
            found = trajectory(model)
            assert equal(found, expected), f"generation {generation}, {distance(found, expected)}\n{pab.report()}"
        assert pab.report().reused == 2 * reference.reused
    return reference, expected


NESTS: list[list[Policy]] = [
    [Policy(Blocks(), Every(3), Residual()), Policy(Attentions(), SkipRange(2, 0, 1000), Last())],
    [
        Policy(Attentions(), Every(2), Taylor(1)),
        Policy(Blocks(), Every(3, warmup=4), Taylor(1, of=Residual())),
        Policy(FeedForwards(), Every(4), Taylor(2)),
    ],
    [
        Policy(Model(), Every(3), Residual()),
        Policy(Blocks(), Every(2), Residual()),
        Policy(Attentions(), SkipRange(3, 0, 1000)),
    ],
]

lowerings = pytest.mark.parametrize("lowering", ["specialize", "cond"])


@lowerings
@pytest.mark.parametrize("policies", NESTS, ids=["attentions", "forecasts", "three-deep"])
@pytest.mark.parametrize("kind", [DiT, JoinedMMDiT])
def test_parts_inside_of_parts_do_what_their_policies_say(
    kind: type[Denoiser], policies: list[Policy], lowering: str
) -> None:
    reference, expected = check(kind, policies, lowering=lowering)
    assert all(sum(part.reused for part in parts) for parts in reference.parts.values())
    assert not equal(expected, trajectory(build(kind)))


def rules() -> st.SearchStrategy[Rule]:
    steps = st.frozensets(st.integers(0, STEPS - 1), min_size=2, max_size=8).map(sorted).map(tuple)
    return st.one_of(
        st.builds(Every, st.integers(1, 4), warmup=st.integers(1, 3), cooldown=st.integers(0, 2)),
        st.builds(SkipRange, st.integers(2, 4), st.sampled_from([0, 300]), st.sampled_from([700, 1000])),
        st.builds(Steps, steps, of=st.just(STEPS)),
        st.builds(AfterTimesteps, st.lists(st.tuples(st.sampled_from(TIMESTEPS), st.integers(1, 3)), max_size=3)),
    )


def hows(where: type) -> st.SearchStrategy[How]:
    values: list[How] = [Last(), Residual()] if where in (Model, Blocks) else [Last()]
    return st.one_of(
        st.sampled_from(values),
        st.builds(Taylor, st.integers(0, 2), of=st.sampled_from(values)),
        st.builds(Hermite, st.integers(1, 2), of=st.sampled_from(values)),
    )


def policies() -> st.SearchStrategy[list[Policy]]:
    """At most one for each kind of part, in any order."""
    kinds = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4, unique=True)
    return kinds.flatmap(
        lambda kinds: st.tuples(*(st.builds(Policy, st.just(k()), rules(), hows(k)) for k in kinds)).map(list)
    )


drawn = given(
    kind=st.sampled_from([DiT, MMDiT, JoinedMMDiT, SpaceAndTime]),
    policies=policies(),
    lowering=st.sampled_from(["specialize", "cond"]),
)


@drawn
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_list_of_policies_does_what_the_reference_does(
    kind: type[Denoiser], policies: list[Policy], lowering: str
) -> None:
    torch._dynamo.reset()
    check(kind, policies, lowering=lowering)


@pytest.mark.slow
@drawn
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_lists_of_policies_do_what_the_reference_does(
    kind: type[Denoiser], policies: list[Policy], lowering: str
) -> None:
    torch._dynamo.reset()
    check(kind, policies, lowering=lowering)


@pytest.mark.parametrize(
    "options",
    [
        {"lowering": "cond"},
        pytest.param({"lowering": "specialize", "regional": True}, marks=pytest.mark.slow),
        pytest.param({"lowering": "cond", "dynamic": True}, marks=pytest.mark.slow),  # a minute of compiling
    ],
    ids=["cond", "regional", "dynamic"],
)
def test_parts_inside_of_parts_with_inductor(options: dict[str, Any]) -> None:
    model = build(MMDiT)
    expected = Reference(model, NESTS[2]).trajectory()
    with pab_fx.enable(model, NESTS[2], timesteps=TIMESTEPS, **options) as pab:
        found = trajectory(model)
        assert pab.report().reused > 0
    assert distance(found, expected) < 1e-5  # kernels are fused


@pytest.mark.parametrize("options", [{"inner": pab_fx.testing.replaying}, {"cache_dtype": torch.bfloat16}])
@lowerings
def test_parts_inside_of_parts_with_other_caches(options: dict[str, Any], lowering: str) -> None:
    model = build(MMDiT)
    expected = Reference(model, NESTS[1]).trajectory()
    given = {"inner": "eager", **options}
    with pab_fx.enable(model, NESTS[1], timesteps=TIMESTEPS, lowering=lowering, **given) as pab:
        trajectory(model)
        found = trajectory(model)
        assert pab.report().reused > 0
    scale = max(float(each.abs().max()) for each in expected)
    assert distance(found, expected) <= (0.01 * scale if "cache_dtype" in options else 0)  # 8 significant bits


@pytest.mark.parametrize("policies", NESTS, ids=["attentions", "forecasts", "three-deep"])
def test_programs_hold_parts_inside_of_parts(policies: list[Policy]) -> None:
    """Counted in the graph: what rests keeps what it has, and goes by its own last step that computed."""
    model = build(MMDiT)
    expected = Reference(model, policies).trajectory()
    first = inputs(0, TIMESTEPS[0])
    gm = pab_fx.rewrite(torch.export.export(model, first).module(), policies, model=model)
    program: Any = pab_fx.export(model, {}, policies, args=first, timesteps=TIMESTEPS, contexts=("a", "b")).module()
    for _ in range(2):
        assert equal([gm(*inputs(*at)).clone() for at in enumerate(TIMESTEPS)], expected)
        context = torch.tensor(1)
        assert equal([program(*inputs(*at), pab_context=context).clone() for at in enumerate(TIMESTEPS)], expected)


def test_specialize_decides_what_lies_inside_of_what_computes() -> None:
    model = build(DiT)
    policies = [Policy(Blocks(), Every(3), Residual()), Policy(Attentions(), Every(2))]
    gm = pab_fx.rewrite(torch.export.export(model, inputs(0, TIMESTEPS[0])).module(), policies, model=model)
    for reuse, attends, adds in (({"blocks"}, 0, 0), ({"spatial"}, 0, 3), ((), 3, 3)):
        code = pab_fx.specialize(gm, reuse=reuse).code
        assert "cond" not in code
        assert code.count("scaled_dot_product_attention.default(") == attends
        assert code.count("gelu.default(") == adds


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function(self, *args, **kwargs)

    return wrapper


class DecoratedDiT(DiT):
    """As most transformers of diffusers, which scale adapters around their forward."""

    forward = decorated(DiT.forward)


@pytest.mark.parametrize("kind", [DiT, DecoratedDiT])
def test_the_whole_model_is_skipped(kind: type[Denoiser]) -> None:
    policy = Policy(Model(), Every(3), Taylor(1, of=Residual()))
    _, expected = check(kind, [policy])
    assert not equal(expected, trajectory(build(kind)))
    model = build(kind)
    with pab_fx.enable(model, policy, inner="eager") as pab:
        trajectory(model)
        (graph,) = pab.backend.graphs
    reusing = min(graph.graphs.values(), key=lambda gm: len(gm.graph.nodes))
    assert not any("linear" in str(node.target) for node in reusing.graph.nodes)


class VarianceDiT(DiT):
    """Predicts a variance too, as DiT and PixArt do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(8, 8)


def test_a_model_that_predicts_a_variance_has_no_residual_and_can_be_kept_as_it_is() -> None:
    model = build(VarianceDiT)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Model(), Every(2), Residual()), inner="eager") as pab:
        assert equal(trajectory(model), plain)
        assert "no residual" in str(pab.report())
    check(VarianceDiT, [Policy(Model(), Every(2), Last())])


def test_a_model_whose_graph_breaks_is_not_skipped_as_a_whole_and_it_is_said() -> None:
    model = build(BrokenDiT)
    plain = trajectory(model)
    with pab_fx.enable(model, Policy(Model(), Every(2)), inner="eager") as pab:
        assert equal(trajectory(model), plain)
        assert "the graph breaks inside of it" in str(pab.report())


def test_the_report_says_when_a_part_is_skipped_with_the_one_around_it() -> None:
    model = build(DiT)
    policies = [Policy(Blocks(), Every(3), Residual()), Policy(Attentions(), SkipRange(2, 0, 1000))]
    with pab_fx.enable(model, policies, inner="eager", timesteps=TIMESTEPS) as pab:
        trajectory(model)
        report = pab.report()
    strips = {strip.role: strip for strip in report.schedule.strips}
    assert strips["blocks"].steps == "CCRRCRRCRRCRR"
    assert strips["spatial"].steps == "CRSSCSSRSSCSS"
    roles = {role.role: (role.computed, role.reused) for role in report.roles}
    assert roles["spatial"] == (3 * strips["spatial"].computed, 3 * strips["spatial"].reused) == (9, 6)
    assert all("S is skipped" in text for text in (str(report), report.html()))
    shares = [region.flops_share for region in report.regions if not region.inside]
    assert sum(share for share in shares if share) <= 1


FEW = ("FluxTransformer2DModel", "LatteTransformer3DModel")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in zoo.BY_NAME])
def test_attentions_are_cached_in_blocks_that_are_skipped_as_a_whole(name: str) -> None:
    """The same inputs give the same outputs again, whichever part reuses; others do not."""
    entry = zoo.BY_NAME[name]
    model, same, others = entry.build(), entry.step(600.0, 0), entry.step(600.0, 1)
    # in the steps that follow all compute, blocks reuse, attentions reuse, blocks reuse, and so on
    policies = [Policy(Blocks(), Every(2, warmup=1), Residual()), Policy(Attentions(), Every(4, warmup=1))]
    plain = _tensors(model(**others))
    with pab_fx.enable(model, policies, inner="eager", lowering="cond") as pab:
        computed = _tensors(model(**same))
        again = [_tensors(model(**same)) for _ in range(5)]
        changed, report = _tensors(model(**others)), pab.report()
    assert report.reused > 0
    for outputs in again:
        for found, expected in zip(outputs, computed, strict=True):
            # x + (y - x) rounds
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not all(map(torch.equal, changed, plain))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
