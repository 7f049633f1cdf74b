"""Sequence parallelism of diffusers and guidance parallelism under PAB: equal to one process, and less to communicate.

The first part is about graphs and needs no processes; see `parallel_ranks` for those.
"""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from parallel_models import TIMESTEPS
from parallel_ranks import on_ranks
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from pab_fx import PABConfig, rewrite, specialize
from pab_fx.graph import effects
from pab_fx.passes.form import conditionals
from pab_fx.passes.invariants import split_invariants

c10d = torch.ops._c10d_functional
CONFIG = PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4)


def collectives(gm: fx.GraphModule) -> list[str]:
    """Names of the collectives and waits in a graph and in the branches of its conditions."""
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
    return [effects.op_name(node) for part in parts for node in part.graph.nodes if effects.is_collective(node)]


def gathered(x: Tensor) -> Tensor:
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "ranks"))


class Attention(nn.Module):
    """Exchanges what it attends to with other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, source: Tensor, exchanges: bool = True) -> Tensor:
        keys = self.to_k(source)
        keys = gathered(keys) if exchanges else keys
        return self.to_out(scaled_dot_product_attention(self.to_q(x), keys, keys))


class Model(nn.Module):
    """Two attentions; what is exchanged where is for its children to say."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()


class Inside(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return gathered(x + self.attn2(x, x))


class Before(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.attn1(x, gathered(x * 2), False)
        return gathered(x + self.attn2(x, gathered(x * 3), False))


class Shared(Model):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        whole = gathered(x * 2)
        x = x + self.attn1(x, whole, False)
        return gathered(x + self.attn2(x, whole, False))


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


ONE = ["all_gather_into_tensor", "wait_tensor"]


@pytest.mark.parametrize("model", [Inside, Before, Shared])
def test_a_graph_that_reuses_has_no_collective_left_but_the_models_own(model: type[Model]) -> None:
    gm = traced(model())
    rewritten = rewrite(gm, CONFIG)
    assert sorted(collectives(rewritten)) == sorted(collectives(gm))
    assert sorted(collectives(specialize(rewritten))) == sorted(collectives(gm))
    roles = {"spatial", "cross"} if model is not Inside else {"spatial"}
    assert collectives(specialize(rewritten, reuse=roles & set(_roles(rewritten)))) == ONE


def _roles(rewritten: fx.GraphModule) -> list[str]:
    return [conditional.role for conditional in conditionals(rewritten).values()]


def test_collectives_inside_of_an_attention_stand_in_its_condition() -> None:
    for model in (Inside(), Before()):
        rewritten = rewrite(traced(model), CONFIG)
        outside = [effects.op_name(node) for node in rewritten.graph.nodes if effects.is_collective(node)]
        assert outside == ONE


def test_a_collective_of_two_attentions_goes_when_both_reuse() -> None:
    rewritten = rewrite(traced(Shared()), CONFIG)
    assert len(collectives(specialize(rewritten, reuse={"attn1"}))) == 2 * len(ONE)
    assert len(collectives(specialize(rewritten, reuse={"attn1", "attn2"}))) == len(ONE)


def test_a_collective_that_nobody_reads_stays() -> None:
    """Other ranks take part in it, and may read it."""

    class Unread(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            gathered(x)
            return x + self.attn1(x, x, False)

    rewritten = rewrite(traced(Unread()), CONFIG)
    for decided in (specialize(rewritten), specialize(rewritten, reuse={"spatial"})):
        assert collectives(decided) == ONE


def dead(make: Any) -> tuple[fx.Graph, list[str]]:
    """A graph that yields its input, after what `make` made of that and one user of it have lost their use."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    user = graph.call_function(torch.neg, (make(graph, x),))
    graph.output(x)
    unused = effects.unused(graph) - {user}
    effects.eliminate_dead_code(graph, unused)
    return graph, [effects.op_name(node) for node in graph.nodes if node.op == "call_function"]


def test_collectives_of_several_tensors_go_with_all_of_their_waits() -> None:
    def several(graph: fx.Graph, x: fx.Node) -> fx.Node:
        both = graph.call_function(c10d.all_reduce_coalesced.default, ([x, x], "sum", "ranks"))
        waits = [
            graph.call_function(c10d.wait_tensor.default, (graph.call_function(operator.getitem, (both, i)),))
            for i in range(2)
        ]
        return graph.call_function(torch.add, tuple(waits))

    assert dead(several)[1] == []


def test_a_collective_in_place_stays_with_its_wait() -> None:
    def in_place(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(
            c10d.wait_tensor.default, (graph.call_function(c10d.all_reduce_.default, (x, "sum", "ranks")),)
        )

    assert dead(in_place)[1] == ["all_reduce_", "wait_tensor"]


def test_a_wait_stays_while_its_collective_is_read_otherwise() -> None:
    def read_twice(graph: fx.Graph, x: fx.Node) -> fx.Node:
        whole = graph.call_function(c10d.all_gather_into_tensor.default, (x, 2, "ranks"))
        graph.call_function(torch.ops.aten.copy_.default, (x, whole))
        return graph.call_function(c10d.wait_tensor.default, (whole,))

    assert dead(read_twice)[1] == ["all_gather_into_tensor", "copy_", "wait_tensor"]


def test_no_collective_is_computed_once_a_generation() -> None:
    """Whether a text is the same tensor as in the step before, each rank would find out for itself."""

    def model(x: Tensor, text: Tensor) -> tuple[Tensor]:
        return (x + gathered(text.sin()),)

    gm = fx.symbolic_trace(model)
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.ones(2)
    split = split_invariants(gm, {1})
    assert split is not None
    assert (collectives(split.once), collectives(split.rest)) == ([], ONE)


# ------------------------------------------------------------------------------------------------ several processes

HERE = [
    ("sequence", {"model": "wan", "ulysses": 2}),
    ("sequence", {"model": "qwen", "ulysses": 2, "lowering": "cond", "through_backend": True, "forecast_order": 1}),
    ("lockstep", {"model": "wan"}),
    ("pipeline", {}),
    ("guidance", {}),
    ("ring_without_sums", {}),
    ("sequence", {"model": "ltx", "ulysses": 2, "blocks": True}),
    ("signal", {}),
]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks saw; started once, also by tests that run in several processes themselves."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            torch.save(on_ranks(folder, 2, HERE, timeout=400), folder / "seen.pt")
        seen = torch.load(folder / "seen.pt", weights_only=False)
    return {
        " ".join([name, *map(str, options.values())]): each for (name, options), each in zip(HERE, seen, strict=True)
    }


def outputs(steps: list[Any]) -> list[Tensor]:
    return [output for step in steps for output in step.outputs]


def assert_equal(one: list[Any], other: list[Any], tolerance: float = 0.0) -> None:
    """Steps have the same outputs: bitwise, or up to rounding."""
    for a, b in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


ULYSSES = {"spatial": {"all_to_all": 4}}
"""What an attention exchanges by its role: queries, keys, values, outputs."""


def assert_broadcasts_less(seen: list[dict[str, Any]], exchanges: dict[str, dict[str, int]]) -> None:
    """What a generation over several ranks has to show, whatever the model.

    Args:
        seen: by `sequence`, on each rank.
        exchanges: the collectives of an attention that computes, by its role.
    """

    def own(attentions: Counter[str]) -> Counter[str]:
        every = (
            Counter({kind: n * attentions[role] for kind, n in kinds.items()}) for role, kinds in exchanges.items()
        )
        return sum(every, Counter())

    for on_rank in seen:
        assert on_rank["graphs"] == 1
        assert_equal(on_rank["first"], on_rank["with"])
        assert_equal(on_rank["with"], seen[0]["with"])
        assert [step.computed for step in on_rank["with"]] == [step.computed for step in seen[0]["with"]]
        modules = on_rank["with"][0].computed
        for without, step in zip(on_rank["without"], on_rank["with"], strict=True):
            assert without.collectives >= own(modules) > Counter()
            expected = without.collectives - own(modules - step.computed)
            assert (step.collectives, step.waits) == (expected, expected.total())
        assert any(not step.computed for step in on_rank["with"])
    changed = zip(outputs(seen[0]["with"]), outputs(seen[0]["without"]), strict=True)
    assert max((a - b).abs().max() for a, b in changed) > 0.1


def test_ulysses_equals_one_process_to_the_bit_and_a_reused_attention_issues_no_collective(
    two_ranks: dict[str, list[Any]],
) -> None:
    """Each head is computed by one rank, on the tokens of all in their order."""
    seen = two_ranks["sequence wan 2"]
    assert_equal(seen[0]["with"], seen[0]["alone"])
    assert_broadcasts_less(seen, ULYSSES)
    assert seen[0]["with"][1].collectives == {"all_gather": 1}  # of the model's output


def test_forecasts_of_joint_attention_as_one_graph_equal_one_process_and_issue_no_collective_where_they_reuse(
    two_ranks: dict[str, list[Any]],
) -> None:
    """Ranks bring text and image in turns, so that an attention sums up in another order than one process.

    What is kept is read as a forecast.
    """
    seen = two_ranks["sequence qwen 2 cond True 1"]
    assert_equal(seen[0]["with"], seen[0]["alone"], 1e-5)
    assert_broadcasts_less(seen, ULYSSES)


def assert_decides_alike(seen: list[dict[str, list[int]]]) -> None:
    """That ranks which would decide otherwise by their own part reuse in the same steps."""
    together, apart = [each["together"] for each in seen], [each["apart"] for each in seen]
    assert all(each == together[0] for each in together)
    assert apart[0] != apart[-1]


def test_all_ranks_decide_by_one_signal(two_ranks: dict[str, list[Any]]) -> None:
    """Only one of them has tokens that change."""
    assert_decides_alike(two_ranks["signal"])


def assert_skips_blocks(seen: list[dict[str, Any]], of_blocks: dict[str, int], of_model: dict[str, int]) -> None:
    """That a step exchanges what blocks do where it computes them, and what the model does, each once or not at all."""
    assert_broadcasts_less(seen, {"blocks": of_blocks})
    for step in seen[0]["with"]:
        assert step.collectives == Counter(of_model) + Counter(of_blocks if step.computed else {})


def test_a_step_that_skips_blocks_as_a_whole_exchanges_nothing_but_the_models_last_gather(
    two_ranks: dict[str, list[Any]],
) -> None:
    """Two blocks of two attentions, of four exchanges each."""
    seen = two_ranks["sequence ltx 2 True"]
    assert_equal(seen[0]["with"], seen[0]["alone"])
    assert_skips_blocks(seen, {"all_to_all": 2 * 2 * 4}, {"all_gather": 1})


def test_ranks_decide_alike_when_one_is_late_or_was_interrupted(two_ranks: dict[str, list[Any]]) -> None:
    seen = two_ranks["lockstep wan"]
    expected = seen[0]["expected"]
    decided = [step.computed for step in expected]
    assert len({tuple(sorted(computed.items())) for computed in decided}) > 2
    for generation in ("expected", "one is late", "one was interrupted", "one was interrupted, all were reset"):
        for on_rank in seen:
            assert [step.computed for step in on_rank[generation]] == decided
            assert_equal(on_rank[generation], expected)


def test_a_pipeline_over_two_ranks_equals_one_process_also_after_an_interruption(
    two_ranks: dict[str, list[Any]],
) -> None:
    seen = two_ranks["pipeline"]
    expected = seen[0]["alone"]
    assert (expected - seen[0]["alone, without PAB"]).abs().max() > 1e-3
    for on_rank in seen:
        for generation in ("first", "one is late", "one was interrupted"):
            torch.testing.assert_close(on_rank[generation], expected, rtol=0, atol=0)


def assert_guidance(seen: list[dict[str, Any]]) -> None:
    assert [on_rank["branch"] for on_rank in seen] == [0] * (len(seen) // 2) + [1] * (len(seen) // 2)
    assert (seen[0]["alone"] - seen[0]["without PAB"]).abs().max() > 1e-3
    for on_rank in seen:
        assert on_rank["counts"] == seen[0]["counts"]
        assert on_rank["counts"]["spatial", True] > 0
        torch.testing.assert_close(on_rank["latents"], seen[0]["alone"], rtol=0, atol=0)


def test_two_branches_on_two_ranks_equal_both_in_one_process(two_ranks: dict[str, list[Any]]) -> None:
    seen = two_ranks["guidance"]
    assert_guidance(seen)
    assert all(on_rank["collectives"] == {"all_gather": len(TIMESTEPS)} for on_rank in seen)


def test_ring_is_refused_by_diffusers_on_a_cpu(two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks["ring_without_sums"] == ("Native attention does not support return_lse=True",) * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "exchanges", "tolerance"),
    [
        ("flux", ULYSSES, 1e-5),
        ("flux2", ULYSSES, 1e-5),
        ("ltx", ULYSSES | {"cross": {"all_to_all": 4}}, 0.0),
        ("chronoedit", ULYSSES, 0.0),
        ("helios", {"spatial": {"all_to_all": 4, "all_gather": 1}, "cross": {"all_gather": 1}}, 0.0),
    ],
)
def test_other_models_over_two_ranks_equal_one_process(
    model: str, exchanges: dict[str, dict[str, int]], tolerance: float, tmp_path: Path
) -> None:
    (seen,) = on_ranks(tmp_path, 2, [("sequence", {"model": model, "ulysses": 2})], timeout=400)
    assert_equal(seen[0]["with"], seen[0]["alone"], tolerance)
    assert_broadcasts_less(seen, exchanges)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "of_blocks", "of_model", "tolerance"),
    [
        ("wan", {"all_to_all": 4}, {"all_gather": 1}, 0.0),
        ("flux", {"all_to_all": 2 * 4}, {"all_gather": 1}, 1e-5),
        ("helios", {"all_to_all": 4, "all_gather": 3}, {}, 0.0),
    ],
)
def test_other_models_that_skip_blocks_as_a_whole(
    model: str, of_blocks: dict[str, int], of_model: dict[str, int], tolerance: float, tmp_path: Path
) -> None:
    options = {"model": model, "ulysses": 2, "blocks": True, "lowering": "cond", "regional": model == "flux"}
    (seen,) = on_ranks(tmp_path, 2, [("sequence", options)], timeout=400)
    assert_equal(seen[0]["with"], seen[0]["alone"], tolerance)
    assert_skips_blocks(seen, of_blocks, of_model)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_by_inductor_as_a_whole_or_by_block(lowering: str, regional: bool, tmp_path: Path) -> None:
    """Inductor rounds otherwise, and for two lengths of the sequence it may choose two ways."""
    options = {"model": "wan", "ulysses": 2, "inner": "inductor", "lowering": lowering, "regional": regional}
    (seen,) = on_ranks(tmp_path, 2, [("sequence", options)], timeout=500)
    assert_equal(seen[0]["with"], seen[0]["alone"], 1e-4)
    assert_broadcasts_less(seen, ULYSSES)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"regional": True}, {"forecast_order": 2}], ids=str)
def test_by_block_and_with_forecasts_it_equals_one_process_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    (seen,) = on_ranks(tmp_path, 2, [("sequence", {"model": "wan", "ulysses": 2, **options})], timeout=400)
    assert_equal(seen[0]["with"], seen[0]["alone"])
    assert_broadcasts_less(seen, ULYSSES)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wan", "flux"])
def test_a_ring_equals_one_process_where_attention_returns_its_sums(model: str, tmp_path: Path) -> None:
    """As it does on GPUs. Partial attentions are added up, in another order on each rank."""
    (seen,) = on_ranks(tmp_path, 2, [("sequence", {"model": model, "ring": 2})], timeout=400)
    assert_equal(seen[0]["with"], seen[0]["alone"], 1e-5)
    assert_broadcasts_less(seen, {"spatial": {"all_gather": 1}})


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """Ulysses, ring with Ulysses, guidance with Ulysses, and a signal."""
    scenarios = [
        ("sequence", {"model": "wan", "ulysses": 4}),
        ("lockstep", {"model": "wan"}),
        ("guidance", {"ulysses": 2}),
        ("sequence", {"model": "wan", "ulysses": 2, "ring": 2}),
        ("signal", {}),
    ]
    ulysses, lockstep, guidance, both, signal = on_ranks(tmp_path, 4, scenarios, timeout=500)
    assert_equal(ulysses[0]["with"], ulysses[0]["alone"])
    assert_broadcasts_less(ulysses, ULYSSES)
    for on_rank in lockstep:
        assert all(len(steps) == len(TIMESTEPS) for steps in on_rank.values())
        for steps in on_rank.values():
            assert_equal(steps, lockstep[0]["expected"])
    assert_guidance(guidance)
    assert_decides_alike(signal)
    assert_equal(both[0]["with"], both[0]["alone"], 1e-5)
    for on_rank in both:
        assert any(step.collectives == {"all_gather": 1} for step in on_rank["with"])


# --------------------------------------------------------------------------------------------------- examples


def torchrun(ranks: int, *arguments: str) -> str:
    """What an example prints."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *arguments]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_table_in_the_documents_is_what_the_example_prints() -> None:
    document = (Path(__file__).parents[1] / "docs/parallelism.md").read_text()
    for ranks, table in re.findall(r"<!-- table: (\d) ranks -->\n(.*?)\n\n", document, re.DOTALL):
        assert table in torchrun(int(ranks), "examples/sequence_parallel.py")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_example_of_guidance_equals_one_process(ranks: int) -> None:
    assert "largest difference to one process: 0 " in torchrun(ranks, "examples/guidance_parallel.py", "--steps", "8")
