"""The benchmark: what it runs is what it says, and what it reports follows from what it saw."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from pab_fx import PABConfig
from pab_fx.bench import BenchError, Settings, run_bench, run_model
from pab_fx.bench._torch import cold_compiler, peak_of_live_bytes
from pab_fx.bench.apart import Inner
from pab_fx.bench.caches import CACHES, Plan
from pab_fx.bench.chart import save_chart
from pab_fx.bench.contenders import (
    CACHE_DIT,
    COLUMNS,
    PLAIN,
    SETUPS,
    SHORT_NAMES,
    Broadcasting,
    CacheDit,
    Contender,
    LowerBound,
    Setting,
    contender,
    is_ours,
)
from pab_fx.bench.measure import Clock, Spread, Trajectory, by_kind, distance, ratios
from pab_fx.bench.models import NAMES, SIZES, BenchModel, model_of, timesteps_of
from pab_fx.bench.page import OURS, kept, page_of
from pab_fx.bench.results import BenchResult, ModelResult, markdown_of, result_of
from pab_fx.bench.settings import columns_of, config_of
from pab_fx.bench.timing import CudaEvents, WallClock
from pab_fx.cli import app
from pab_fx.enable import enable
from pab_fx.testing import replaying

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = Settings(models=("wan",), size="quick", rounds=2, inner="eager")
SHORT = ("compile", "pab_fx specialize")
OF_PAB = tuple(column for column in COLUMNS if column not in CACHE_DIT)
times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


def setting_of(model: BenchModel, steps: int = 8, policy: str = "pab") -> tuple[Setting, Trajectory]:
    clock, network = Clock(), model.build(CPU)
    cache = CACHES[policy](model, None, steps, clock)
    timesteps = timesteps_of(steps, cache.spacing)
    inputs = model.inputs(timesteps, CPU)
    setting = Setting(network, cache, timesteps, Plan.of(network, cache.config, timesteps), inputs, Inner("eager"))
    return setting, Trajectory(timesteps, inputs, clock, WallClock())


@pytest.fixture(scope="module")
def result() -> BenchResult:
    """All columns of a model in which two roles reuse at different steps."""
    return run_bench(QUICK)


@pytest.fixture(scope="module")
def wan(result: BenchResult) -> ModelResult:
    return result.models[0]


# ------------------------------------------------------------------------------------------------- a run


def test_all_columns_run_and_the_one_that_spoils_the_others_runs_last(wan: ModelResult) -> None:
    assert tuple(column.column for column in wan.columns) == OF_PAB
    assert tuple(SHORT_NAMES.values()) == COLUMNS
    assert all(len(column.seconds) == QUICK.rounds for column in wan.columns)


def test_every_column_reuses_what_the_schedule_says(wan: ModelResult) -> None:
    """1000, 875, ... 125: spatial reuses in 5 of the 8 steps at odd calls from 875 to 125, cross where `n mod 6`."""
    timesteps = timesteps_of(8)
    inside = [n for n, t in enumerate(timesteps) if n > 0 and 100 < t < 800]
    expected = 3 * sum(n % 2 != 0 for n in inside) + 3 * sum(n % 6 != 0 for n in inside)
    reused = {column.column: column.reused for column in wan.columns}
    assert reused == {name: 0 if name in PLAIN else expected for name in OF_PAB}
    assert wan.kinds == {"computing": 3, "partly": 2, "reusing": 3}


def test_outputs_are_those_of_the_hooks_and_others_are_not(wan: ModelResult) -> None:
    distances = {column.column: column.distance for column in wan.columns}
    assert distances.pop("lower bound") is None
    for name, found in distances.items():
        assert found is not None
        assert found > 1e-2 if name in PLAIN else found < 1e-5, name


def test_pab_fx_is_captured_once_and_hooks_exhaust_the_limit(wan: ModelResult) -> None:
    columns = {column.column: column for column in wan.columns}
    for name in ("compile", "compile regional", "pab_fx specialize", "pab_fx cond", "regional"):
        assert (columns[name].captures, columns[name].late_captures, columns[name].breaks) == (1, 0, 0), name
    assert columns["pab_fx cond"].graphs == columns["compile"].graphs == 1
    assert columns["hooks + compile"].captures == torch._dynamo.config.recompile_limit
    assert (columns["eager"].captures, columns["hooks"].captures) == (0, 0)


def test_ratios_are_of_the_same_round(wan: ModelResult) -> None:
    columns = {column.column: column for column in wan.columns}
    compiled, bound = columns["compile"].seconds, columns["lower bound"].seconds
    assert columns["compile"].of_bound == Spread.of([a / b for a, b in zip(compiled, bound, strict=True)])
    for name in ("compile", "lower bound"):
        assert columns[name].speedup == Spread.of([a / b for a, b in zip(compiled, columns[name].seconds, strict=True)])
    both = columns["hooks + compile"].seconds
    assert columns["compile"].over_hooks == Spread.of([a / b for a, b in zip(both, compiled, strict=True)])


def test_numbers_are_json_and_come_back(result: BenchResult) -> None:
    read = json.loads(json.dumps(result.as_json()))
    assert read["schema"] == 1
    assert set(read) == {"schema", *(field.name for field in dataclasses.fields(BenchResult))}
    (model,) = read["models"]
    assert set(model) == {field.name for field in dataclasses.fields(ModelResult)}
    for column, saw in zip(model["columns"], result.models[0].columns, strict=True):
        assert column["generation"] == dataclasses.asdict(saw.generation)
        assert column["generation"]["low"] <= column["generation"]["median"] <= column["generation"]["high"]
        assert set(column["step_seconds"]) == {"computing", "partly", "reusing"}
        assert column["peak_bytes"] > 0


def test_the_chart_is_a_picture_of_every_column(result: BenchResult, tmp_path: Path) -> None:
    save_chart(result, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        colours = image.convert("RGB").getcolors(image.width * image.height)
    assert colours is not None
    filled = {colour for count, colour in colours if count > 1000}
    assert {(0x1F, 0x6F, 0xEB), (0xC9, 0xA2, 0x27), (0x9A, 0xA0, 0xA6), (255, 255, 255)} <= filled


def test_the_table_in_markdown_has_a_row_for_each_column(result: BenchResult) -> None:
    lines = [line for line in markdown_of(result).splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(OF_PAB)
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_compiles_with_inductor(name: str) -> None:
    (model,) = run_bench(dataclasses.replace(QUICK, models=(name,), rounds=1, inner="inductor")).models
    assert len(model.columns) == len(OF_PAB)
    starts = {column.column: column.cold_start for column in model.columns}
    assert all(start is None or start > 0.5 for start in starts.values())


@pytest.mark.slow
def test_a_cold_start_finds_no_cache() -> None:
    """What was compiled before, even a moment ago, is compiled again."""
    folders = set()
    for _ in range(2):
        torch.compiler.reset()
        with cold_compiler():
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
            folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            folders.add(folder)
            assert list(folder.rglob("*.so"))
        assert not folder.exists()
    assert len(folders) == 2


# ------------------------------------------------------------------------------------- what is refused


def test_a_contender_that_reuses_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETUPS, "pab_fx specialize", Contender)
    with pytest.raises(BenchError, match=r"pab_fx specialize reused 0 .* schedule says 24, \[0, 0, 3, 6"):
        run_bench(dataclasses.replace(QUICK, columns=("pab_fx specialize",)))


def test_outputs_that_are_not_the_hooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Broadcasting):
        def at(self, step: int) -> Any:
            return lambda **inputs: (self.call(**inputs)[0] * 1.01,)

    monkeypatch.setitem(SETUPS, "pab_fx specialize", Wrong)
    with pytest.raises(BenchError, match=r"outputs of pab_fx specialize are 1\.0e-02 from the reference's"):
        run_bench(dataclasses.replace(QUICK, columns=("pab_fx specialize",)))


def test_a_config_that_reuses_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="reuses nothing in 1 steps"):
        run_bench(dataclasses.replace(QUICK, steps=1))


def test_what_rounding_is_is_learnt_from_compile_and_eager(monkeypatch: pytest.MonkeyPatch, wan: ModelResult) -> None:
    """Where compiling changes as much as reuse does, the outputs prove nothing, and the result says so."""

    class Rounded(Contender):
        def at(self, step: int) -> Any:
            return lambda **inputs: (self.call(**inputs)[0] * 1.05,)

    assert (wan.tolerance, wan.notes) == (1e-4, ())
    monkeypatch.setitem(SETUPS, "compile", Rounded)
    (model,) = run_bench(dataclasses.replace(QUICK, rounds=1, columns=("eager", *SHORT))).models
    assert model.tolerance == pytest.approx(0.15, rel=0.01)
    assert "is not shown" in model.notes[0]


def test_what_does_not_fit_into_the_time_is_left_out_and_noted() -> None:
    (model,) = run_bench(dataclasses.replace(QUICK, minutes=1e-6)).models
    assert model.columns == ()
    assert len(model.notes) == len(OF_PAB)
    assert all("left out" in note for note in model.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sora"], "the models are 'cogvideox', 'flux', 'latte', 'wan'"),
        (["--columns", "hooks,fast"], "unknown column 'fast'"),
        (["--config", "spatial=two"], "like spatial=2,temporal=3"),
        (["--config", "cross=0"], "must be an integer >= 1"),
        (["--policy", "teacache"], "did you mean 'easycache' or 'magcache'"),
        (["--policy", "blocks", "--config", "latte"], "one of PAB, and the policy is blocks"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--chart", "chart.gif"], ".png, .svg or .pdf"),
        (["--json", "no/such/folder/result.json"], "no folder"),
        (["--inner", "inductr"], "not a registered Dynamo backend"),
        (["--page", "page.md"], "--page shows what --results has"),
        (["--results", "no/such/folder/results.json"], "no folder"),
        (["--results", "pyproject.toml"], "does not hold results of pab-fx bench"),
    ],
)
def test_a_bad_option_is_refused(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["bench", "--quick", *arguments])
    assert shown.exit_code == 2, shown.output
    assert message in " ".join(shown.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    shown = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert shown.exit_code == 2
    assert "no CUDA device" in " ".join(shown.output.split())


# ----------------------------------------------------------------------------------- the command line


def test_the_command_writes_numbers_chart_and_tables(tmp_path: Path) -> None:
    given_ = ["--quick", "--rounds", "1", "--inner", "eager", "--model", "cogvideox", "--columns", "compile,specialize"]
    written = {name: tmp_path / name for name in ("result.json", "chart.svg", "tables.md")}
    files = ["--json", written["result.json"], "--chart", written["chart.svg"], "--markdown", written["tables.md"]]
    shown = CliRunner().invoke(app, ["bench", *given_, *map(str, files)])
    assert shown.exit_code == 0, shown.output
    assert "pab_fx" in shown.output
    assert all(path.stat().st_size > 0 for path in written.values())
    command = json.loads(written["result.json"].read_text())["command"]
    assert command.startswith("python -m pab_fx bench --model cogvideox --rounds 1")
    assert sorted(command.split()[4:]) == sorted(given_)
    assert f"`{command}`" in written["tables.md"].read_text()


def test_a_long_run_may_be_taken_in_parts_and_the_page_shows_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: BenchResult
) -> None:
    def run(settings: Settings, say: Any) -> BenchResult:
        """The results of one model under the names of others."""
        (measured,) = result.models
        names = itertools.product(settings.models, settings.policies)
        models = (dataclasses.replace(measured, model=name, title=name, policy=policy) for name, policy in names)
        return dataclasses.replace(result, command=settings.command, models=tuple(models))

    monkeypatch.setattr("pab_fx.bench.run.run_bench", run)
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("# Speed\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nThe end.\n")
    flux, wan = ["--model", "flux"], ["--model", "wan", "--policy", "pab", "--policy", "blocks"]
    for given_ in (flux, wan, flux):
        shown = CliRunner().invoke(app, ["bench", *given_, "--results", str(results), "--page", str(page)])
        assert shown.exit_code == 0, shown.output
    measured = [[(model.policy, model.model) for model in run.models] for run in kept(results)]
    assert measured == [[("pab", "wan"), ("blocks", "wan")], [("pab", "flux")]]  # flux's first was replaced
    text = page.read_text()
    assert text == f"# Speed\n\n<!-- bench -->\n\n{page_of(kept(results))}\n\n<!-- /bench -->\n\nThe end.\n"
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| pab", "| blocks"))]
    assert rows == 2 * [["| pab", "flux"], ["| pab", "wan"], ["| blocks", "wan"]]
    assert (tmp_path / "page.png").stat().st_size > 0


def test_the_page_of_the_documents_shows_all_of_its_results() -> None:
    """Of `docs/benchmarks.json`; `--page` brings it up to date."""
    page, runs = (ROOT / "docs/benchmarks.md").read_text(), kept(ROOT / "docs/benchmarks.json")
    assert runs
    assert f"<!-- bench -->\n\n{page_of(runs)}\n\n<!-- /bench -->" in page


def test_a_page_without_a_place_for_tables_is_refused_before_anything_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Speed\n")
    given_ = ["bench", "--quick", "--results", str(tmp_path / "results.json"), "--page", str(page)]
    shown = CliRunner().invoke(app, given_)
    assert shown.exit_code == 2
    assert "needs a line <!-- bench -->" in " ".join(shown.output.split())
    assert not (tmp_path / "results.json").exists()


def test_results_are_read_as_they_were_written(result: BenchResult) -> None:
    assert result_of(json.loads(json.dumps(result.as_json()))) == result


def test_what_is_slower_than_another_stands_on_the_page(result: BenchResult) -> None:
    (model,) = result.models
    ours, slow, near = (
        next(c for c in model.columns if c.column == "pab_fx cond"),
        Spread(0.9, 0.8, 1.1),
        Spread(1, 1, 1),
    )
    changed = dataclasses.replace(ours, over_hooks=slow, over_cache_dit=None, of_bound=near)
    page = page_of([dataclasses.replace(result, models=(dataclasses.replace(model, columns=(changed,)),))])
    assert "- `pab`, wan, pab_fx cond: 0.90 (0.80 to 1.10) of the speed of hooks + compile" in page
    fast = dataclasses.replace(changed, over_hooks=near)
    page = page_of([dataclasses.replace(result, models=(dataclasses.replace(model, columns=(fast,)),))])
    assert "- nothing" in page


@given(st.permutations(["eager", "hooks", "both", "bound"]))
def test_columns_run_in_their_order_whatever_the_order_they_are_given_in(names: list[str]) -> None:
    assert columns_of(",".join(names)) == ("eager", "hooks", "lower bound", "hooks + compile")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 499), st.integers(500, 1000))
def test_a_config_is_read_as_it_is_written(spatial: int, cross: int, low: int, high: int) -> None:
    read = config_of(f"spatial={spatial},cross={cross},window={low}:{high}")
    assert (read.skip_range("spatial"), read.skip_range("temporal"), read.skip_range("cross")) == (spatial, None, cross)
    assert read.window("spatial") == read.window("cross") == (low, high)


def test_a_preset_leaves_feed_forwards_alone_as_the_hooks_do() -> None:
    assert config_of("latte") == PABConfig.preset("latte", mlp=None)


# ------------------------------------------------------------------------------------------ contenders


def graphs_of(model: Any, inputs: Any) -> list[torch.fx.GraphModule]:
    """What Dynamo captures of a model."""
    graphs = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(**inputs)
    return graphs


def attentions(graph: torch.fx.Graph) -> int:
    return sum("scaled_dot_product_attention" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_lower_bound_leaves_out_attention_and_nothing_else(name: str) -> None:
    setting, _ = setting_of(model_of(name, "quick"))
    bound = contender("lower bound", setting)
    assert isinstance(bound, LowerBound)
    whole = {role: len(modules) for role, modules in setting.plan.modules.items()}
    for roles in {frozenset(whole), *(frozenset({role}) for role in whole)}:
        (gm,) = graphs_of(bound.without(roles), setting.inputs[0])
        assert attentions(gm.graph) == sum(count for role, count in whole.items() if role not in roles)
    # its constants are what the attentions return in the first step: there it is the model
    with torch.no_grad():
        output = bound.without(frozenset(whole))(**setting.inputs[0])[0]
        torch.testing.assert_close(output, setting.model(**setting.inputs[0])[0])
    assert bound.held_bytes > 0


def test_the_lower_bound_keeps_nothing_that_only_fed_an_attention() -> None:
    """Its compiler is handed norms and modulation that nobody reads; they go with dead code, as in `pab_fx`."""
    setting, _ = setting_of(model_of("cogvideox", "quick"))
    bound = contender("lower bound", setting)
    assert isinstance(bound, LowerBound)
    counts = []
    for roles in ((), ("spatial",)):
        (gm,) = graphs_of(bound.without(roles), setting.inputs[0])
        gm.graph.eliminate_dead_code()
        counts.append(sum("layer_norm" in str(node.target) for node in gm.graph.nodes))
    whole, reusing = counts
    assert reusing < whole


def test_contenders_share_their_weights_and_nothing_else() -> None:
    setting, _ = setting_of(model_of("wan", "quick"))
    one, other = contender("hooks", setting), contender("eager", setting)
    assert all(a is b for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert not {id(module) for module in one.model.modules()} & {id(module) for module in other.model.modules()}
    assert not any(hasattr(module, "_diffusers_hook") for module in other.model.modules())


@pytest.mark.parametrize("column", ["hooks", "pab_fx specialize", "pab_fx cond", "regional"])
def test_a_generation_starts_afresh_and_leaves_nothing(column: str) -> None:
    setting, trajectory = setting_of(model_of("cogvideox", "quick"))
    runs = contender(column, setting)
    first, second = (trajectory.run(runs, watch=True) for _ in range(2))
    assert first.reused == second.reused == setting.plan.reused
    assert all(torch.equal(a, b) for a, b in zip(first.outputs, second.outputs, strict=True))
    if isinstance(runs, Broadcasting):
        assert all(role.cache_bytes == 0 for role in runs.handle.report().roles)


DBCACHE = dataclasses.replace(QUICK, policies=("dbcache-taylorseer",), rounds=1)


def test_cache_dit_makes_the_same_decisions_in_more_graphs() -> None:
    """Its DBCache with its TaylorSeer: the same steps reuse and outputs are the same, which `run_model` checks too."""
    pytest.importorskip("cache_dit")
    columns = ("eager", "cache-dit", *SHORT, "lower bound", "cache-dit + compile")
    (model,) = run_bench(dataclasses.replace(DBCACHE, columns=columns)).models
    found = {column.column: column for column in model.columns}
    assert (tuple(found), model.notes) == (columns, ())
    assert model.kinds == {"computing": 5, "reusing": 3}
    for name in columns:
        far, reuses = found[name].distance, name not in PLAIN
        assert found[name].reused == (3 if reuses else 0)
        assert far is None if name == "lower bound" else far is not None and (far < 1e-5 if reuses else far > 1e-3)
    ours, theirs = found["pab_fx specialize"], found["cache-dit + compile"]
    assert (ours.captures, ours.breaks) == (1, 0)
    assert theirs.captures > 1 < theirs.breaks
    assert ours.of_bound is not None
    assert ours.over_cache_dit == Spread.of([theirs.seconds[0] / ours.seconds[0]])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["firstblock", "dbcache", "dbcache-taylorseer"])
@pytest.mark.parametrize("name", NAMES)
def test_cache_dit_is_raced_on_every_model_that_it_knows(name: str, policy: str) -> None:
    pytest.importorskip("cache_dit")
    settings = dataclasses.replace(
        DBCACHE, models=(name,), policies=(policy,), columns=(*CACHE_DIT, "pab_fx specialize")
    )
    (model,) = run_bench(settings).models
    raced = {column.column for column in model.columns}
    assert raced == ({"pab_fx specialize"} if name == "latte" else set(settings.columns))
    assert model.notes == ()


def test_without_cache_dit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (model,) = run_bench(dataclasses.replace(DBCACHE, columns=("cache-dit", "pab_fx specialize"))).models
    assert [column.column for column in model.columns] == ["pab_fx specialize"]
    assert model.notes == ('cache-dit was left out: pip install "pab-fx[bench]" installs it',)


def test_other_outputs_of_cache_dit_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(CacheDit):
        def at(self, step: int) -> Any:
            return lambda **inputs: (self.call(**inputs)[0] * 1.01,)

    pytest.importorskip("cache_dit")
    monkeypatch.setitem(SETUPS, "cache-dit", Other)
    (model,) = run_bench(dataclasses.replace(DBCACHE, columns=("cache-dit",))).models
    assert "outputs of cache-dit are 1.0e-02 from the reference's" in model.notes[0]


@pytest.mark.parametrize("policy", ["blocks", "taylorseer", "magcache", "firstblock", "dbcache", "easycache"])
def test_other_policies_are_raced_at_the_decisions_of_their_hooks(policy: str) -> None:
    """Which `run_model` checks, as it does that outputs are equal."""
    columns = ("hooks", "compile", "pab_fx specialize", "lower bound", "hooks + compile")
    settings = dataclasses.replace(QUICK, models=("flux",), rounds=1, policies=(policy,), columns=columns)
    (model,) = run_bench(settings).models
    hooked = CACHES[policy](model_of("flux", "quick"), None, 8, Clock()).hooks is not None
    assert [each.column for each in model.columns] == [each for each in columns if hooked or "hooks" not in each]
    assert model.policy == policy
    assert {each.late_captures for each in model.columns if "hooks" not in each.column} == {0}
    broadcast = model.column("pab_fx specialize")
    assert broadcast is not None
    assert (broadcast.captures, broadcast.graphs) == (
        1,
        3 if policy in ("firstblock", "dbcache", "easycache") else 2,
    )  # what measures
    assert (broadcast.over_hooks is not None) == hooked


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("model", SIZES["quick"], ids=lambda model: model.name)
def test_the_plan_is_what_the_hooks_do(model: BenchModel, steps: int) -> None:
    setting, trajectory = setting_of(model, steps)
    hooks = contender("hooks", setting)
    assert trajectory.run(hooks, watch=True).reused == setting.plan.reused
    assert len(setting.plan.kinds) == steps


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("name", "billions"), [("cogvideox", 5.57), ("latte", 1.06), ("flux", 11.9), ("wan", 1.42)])
def test_the_real_configurations_are_those_of_the_checkpoints(name: str, billions: float) -> None:
    """They run on the meta device: shapes fit, and the weights are as many as are released."""
    model, meta = model_of(name, "cuda"), torch.device("meta")
    network = model.build(meta)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert network.proj_out.weight.dtype == torch.bfloat16
    with torch.no_grad():
        output = network(**model.inputs((500.0,), meta)[0])[0]
    expected = (1, 8, *model.latents[2:]) if name == "latte" else model.latents
    assert (output.shape, output.dtype) == (expected, torch.bfloat16)


@pytest.mark.parametrize("name", ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "wan")])
def test_a_model_in_bfloat16_runs_and_keeps_in_float32_what_its_class_does(name: str) -> None:
    """As on a GPU, at the tiny size, where nothing is compiled and so nothing rounded differently."""
    model = dataclasses.replace(model_of(name, "quick"), dtype=torch.bfloat16)
    network = model.build(CPU)
    dtypes = {parameter.dtype for parameter in network.parameters()}
    assert dtypes == ({torch.bfloat16, torch.float32} if name == "wan" else {torch.bfloat16})
    result = run_model(model, "pab", dataclasses.replace(QUICK, rounds=1, columns=SHORT), lambda text: None)
    plain, broadcast = (column.distance for column in result.columns)
    assert plain is not None
    assert broadcast is not None
    assert broadcast < 1e-2 < plain
    assert torch.get_default_dtype() == torch.float32


class FakeCuda:
    """What the benchmark asks of `torch.cuda`, on a CPU: events know when they were recorded, the allocator counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited = 0
        for name in ("Event", "synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr("pab_fx.bench.run.timing_of", CudaEvents)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: FakeCuda.Event) -> float:
            return 1000 * (end.at - self.at)

    def synchronize(self, device: torch.device) -> None:
        self.waited += 1

    def memory_allocated(self, device: torch.device) -> int:
        return 100

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        pass

    def max_memory_allocated(self, device: torch.device) -> int:
        return 1100


@pytest.mark.parametrize("policy", ["pab", *(pytest.param(p, marks=pytest.mark.slow) for p in CACHES if p != "pab")])
@pytest.mark.parametrize(
    "inner", [pytest.param("eager", marks=pytest.mark.slow), pytest.param(replaying, id="CUDA graphs")]
)
def test_the_way_of_a_gpu_is_gone_without_one(monkeypatch: pytest.MonkeyPatch, policy: str, inner: Any) -> None:
    """In bfloat16, by events and the allocator's count, a generation at a time; graphs as CUDA graphs have them."""
    cuda, columns = FakeCuda(monkeypatch), ("compile", *OURS, "lower bound")
    settings = dataclasses.replace(QUICK, minutes=8.0, columns=columns, inner=inner)
    result = run_model(dataclasses.replace(model_of("wan", "quick"), dtype=torch.bfloat16), policy, settings, print)
    assert [column for column in result.failed if is_ours(column)] == []
    assert cuda.waited > 0
    for name in OURS:
        column = result.column(name)
        assert column is not None
        assert (len(column.seconds), column.peak_bytes) == (2, 1000)
        assert column.reused > 0
        assert column.speedup is not None


def test_a_column_that_fails_is_left_out_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory(Contender):
        def at(self, step: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB.")

    monkeypatch.setitem(SETUPS, "hooks", OutOfMemory)
    monkeypatch.setitem(SETUPS, "pab_fx cond", OutOfMemory)
    columns = ("hooks", "compile", "pab_fx specialize", "pab_fx cond")
    (model,) = run_bench(dataclasses.replace(QUICK, columns=columns)).models
    assert [column.column for column in model.columns] == ["compile", "pab_fx specialize"]
    assert model.failed == ("hooks", "pab_fx cond")
    assert model.notes[0] == "hooks failed: OutOfMemoryError: CUDA out of memory."
    given_ = ["--quick", "--inner", "eager", "--rounds", "1", "--model", "wan", "--columns"]
    assert CliRunner().invoke(app, ["bench", *given_, "hooks"]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", *given_, "cond"]).exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("name", NAMES)
def test_the_real_configurations_are_rewritten(name: str, lowering: str) -> None:
    """On the meta device, where no number can be read: a callback tells the timestep."""
    model, meta, clock = model_of(name, "cuda"), torch.device("meta"), Clock()
    network, timesteps = model.build(meta), (500.0, 490.0, 480.0)
    config = CACHES["pab"](model, None, len(timesteps), clock).config
    with torch.no_grad(), enable(network, config, inner="eager", lowering=lowering, timesteps=timesteps) as pab:
        for clock.t, given_ in zip(timesteps, model.inputs(timesteps, meta), strict=True):
            output = network(**given_)[0]
        assert pab.report().reused > 0
    assert output.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ statistics


@given(times)
def test_a_median_lies_between_the_lowest_and_the_highest(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.low == min(values) <= spread.median <= max(values) == spread.high
    assert spread == Spread.of(values[::-1])


@given(times, st.floats(0.1, 10))
def test_a_machine_that_slows_down_changes_no_ratio(values: list[float], factor: float) -> None:
    slower = [factor * value for value in values]
    assert ratios(slower, slower) == (1.0,) * len(values)
    assert ratios(slower, values) == pytest.approx([factor] * len(values))


@given(st.lists(st.sampled_from(["computing", "partly", "reusing"]), min_size=1, max_size=12), st.integers(1, 5))
def test_steps_are_grouped_by_what_they_reuse(kinds: list[str], rounds: int) -> None:
    seconds = {"computing": 3.0, "partly": 2.0, "reusing": 1.0}
    assert by_kind(kinds, [[seconds[kind] for kind in kinds]] * rounds) == {kind: seconds[kind] for kind in set(kinds)}


@given(st.floats(1e-6, 1.0))
def test_a_relative_distance_is_the_relative_change(change: float) -> None:
    reference = [torch.arange(1.0, 5.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    assert distance([(1 + change) * each for each in reference], reference) == pytest.approx(change)
    assert distance(reference, reference) == 0


@pytest.mark.parametrize(("keep", "expected"), [(False, 1), (True, 3)])
def test_peak_memory_is_what_is_held_at_once(keep: bool, expected: int) -> None:
    size = 1 << 20

    def run() -> None:
        held = []
        for _ in range(3):
            tensor = torch.ones(size, dtype=torch.uint8)
            if keep:
                held.append(tensor)
            del tensor

    assert peak_of_live_bytes(run) == pytest.approx(expected * size, rel=0.01)


FAULTS = """
import resource, sys
import torch
from pab_fx.bench import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults(), faults()]
print(keep_freed_memory())
faults()
print(before[1] > 1000 > faults())
"""


@pytest.mark.slow
def test_freed_memory_is_kept_so_that_no_contender_pays_for_another() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    known, fewer = run.stdout.split()
    if known == "False":
        pytest.skip("the allocator is not glibc's: runs where it is")
    assert fewer == "True"
