"""`pab_fx.explain`, `PAB.report()` and `pab-fx explain`: what they say is so, in every form."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import pab_fx
from pab_fx import LayerBroadcast, PABConfig
from pab_fx.bench.models import NAMES, model_of
from pab_fx.cli import app
from pab_fx.demo import load_pipeline
from pab_fx.explain.subject import subject_of
from pab_fx.policy.when import SkipRange, reused_calls
from pab_fx.report.groups import joined_names
from pab_fx.report.report import Report
from pab_fx.report.strips import Scheduled, ruler, schedule_of
from pab_fx.report.units import in_bytes, unit_of

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMESTEPS = (900.0, 700.0, 600.0, 500.0, 400.0, 300.0, 50.0)
CONFIG = PABConfig(
    spatial_attention_block_skip_range=2,
    temporal_attention_block_skip_range=3,
    cross_attention_block_skip_range=4,
    layers=LayerBroadcast((r"^transformer_blocks\.1\.attn1",), skip_range=3),
    mlp={"timesteps": (700.0,), "blocks": (0,), "skip_count": 2},
)


LATTE, COGVIDEOX = zoo.BY_NAME["LatteTransformer3DModel"], zoo.BY_NAME["CogVideoXTransformer3DModel"]


@dataclasses.dataclass
class Explained:
    """A model, what it yielded before it was explained, and what was said."""

    model: nn.Module
    before: tuple[torch.Tensor, ...]
    report: Report


@pytest.fixture(scope="module")
def explained() -> Explained:
    model = LATTE.build()
    before = zoo.call(LATTE, model, 500.0, 0)
    options = {"timesteps": TIMESTEPS, "step_invariants": False}
    return Explained(model, before, pab_fx.explain(model, LATTE.step(900.0, 0), CONFIG, rounds=2, **options))


@pytest.fixture(scope="module")
def latte(explained: Explained) -> Report:
    """All roles, two rules for one of them, and feed-forwards; of a generation with known timesteps."""
    return explained.report


@pytest.fixture(scope="module")
def cogvideox() -> Report:
    """Two blocks that are alike; nothing is known of timesteps."""
    return pab_fx.explain(COGVIDEOX.build(), COGVIDEOX.step(900.0, 0), rounds=0)


def _enabled(model: nn.Module) -> pab_fx.PAB:
    return pab_fx.enable(model, CONFIG, inner="eager", timesteps=TIMESTEPS, step_invariants=False)


@pytest.fixture(scope="module")
def ran() -> Iterator[Report]:
    """What a model that was enabled reports after a whole generation."""
    model = LATTE.build()
    with torch.no_grad(), _enabled(model) as pab:
        zoo.trajectory(LATTE, model, TIMESTEPS)
        yield pab.report()


# ---------------------------------------------------------------------------------------------- what is said


def test_it_says_what_is_broadcast_and_why(latte: Report) -> None:
    broadcast = {region.name: region.role for region in latte.regions if region.left_alone is None}
    assert broadcast == {
        **{f"transformer_blocks.{i}.attn1": "spatial" for i in range(2)},
        **{f"transformer_blocks.{i}.attn2": "cross" for i in range(2)},
        **{f"temporal_transformer_blocks.{i}.attn1": "temporal" for i in range(2)},
        **{f"{kind}transformer_blocks.0.ff": "mlp" for kind in ("", "temporal_")},
    }
    left = {region.name: region.left_alone for region in latte.regions if region.left_alone}
    assert left == {f"{kind}transformer_blocks.1.ff": "the config leaves it alone" for kind in ("", "temporal_")}
    assert all(region.why and (region.rule or region.left_alone) for region in latte.regions)


def test_the_schedule_is_what_a_generation_does(latte: Report, ran: Report) -> None:
    assert [(role.role, role.computed, role.reused) for role in latte.roles] == [
        (role.role, role.computed, role.reused) for role in ran.roles
    ]
    assert ran.reused > 0
    assert latte.schedule == ran.schedule
    assert {(strip.role, strip.steps) for strip in latte.schedule.strips} == {
        ("spatial", "CRCRCRC"),
        ("spatial", "CRRCRRC"),
        ("temporal", "CRRCRRC"),
        ("cross", "CRRRCRC"),
        ("mlp", "CCRRCCC"),
    }


def test_a_report_says_the_same_as_an_explanation_but_for_times(latte: Report, ran: Report) -> None:
    assert [dataclasses.replace(region, seconds=None, time_share=None) for region in latte.regions] == list(ran.regions)
    assert ran.seconds is None
    assert all(region.flops > 0 and region.cache_bytes > 0 for region in ran.regions if not region.left_alone)


def test_caches_of_regions_are_what_is_kept(latte: Report, ran: Report) -> None:
    kept = {role.role: role.full_bytes for role in ran.roles}
    for role, size in kept.items():
        assert size == sum(region.cache_bytes for region in latte.regions if region.role == role and region.rule)


def test_flops_are_those_that_torch_counts(latte: Report) -> None:
    model, inputs = LATTE.build(), LATTE.step(900.0, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    shares = [region.flops_share or 0.0 for region in latte.regions]
    counted = sum(region.flops for region in latte.regions)
    assert counted / sum(shares) == pytest.approx(counter.get_total_flops())
    assert 0.5 < sum(shares) < 1


def test_times_are_shares_of_a_step(latte: Report) -> None:
    shares = [region.time_share or 0.0 for region in latte.regions]
    assert all(share > 0 for share in shares)
    assert sum(shares) < 1
    assert latte.seconds is not None
    assert latte.seconds > max(region.seconds or 0.0 for region in latte.regions) > 0


def test_a_reusing_step_runs_without_what_only_fed_an_attention(latte: Report) -> None:
    (graph,) = latte.captured
    spared = sum(region.spared for region in latte.regions if region.left_alone is None)
    assert all(region.spared >= region.operations for region in latte.regions)
    assert graph.conditions == 8
    assert graph.reusing is not None
    assert graph.reusing <= graph.operations - spared
    assert graph.reusing <= graph.outside < graph.operations


def test_the_model_is_left_as_it_was(explained: Explained) -> None:
    assert explained.model._compiled_call_impl is None
    assert all(map(torch.equal, explained.before, zoo.call(LATTE, explained.model, 500.0, 0)))


# ------------------------------------------------------------------------------------------ whatever the model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        x = x + self.attn(x)
        torch._dynamo.graph_break()
        return x + self.ff(x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_in_pieces_is_explained_as_a_whole() -> None:
    """The graph breaks in the blocks, and both run what was captured of the first one."""
    model, inputs = Blocks().eval().requires_grad_(False), (torch.randn(1, 4, 8), torch.tensor([900.0]))
    report = pab_fx.explain(model, args=inputs, config=PABConfig(2), timesteps=TIMESTEPS, rounds=1)
    shares = {region.name: region.flops_share for region in report.regions if region.left_alone is None}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    feed_forwards = 2 * 2 * 4 * 8 * 8
    expected = (1 - feed_forwards / counter.get_total_flops()) / 2
    assert shares == {f"blocks.{i}.attn": pytest.approx(expected) for i in range(2)}
    assert len(report.captured) > 1
    assert 0 < sum(region.time_share or 0.0 for region in report.regions) < 1
    assert [strip.modules for strip in report.schedule.strips] == [2]
    ElementTree.fromstring(report.svg())


@pytest.mark.parametrize("options", [{"lowering": "cond"}, {"dynamic": True}, {"regional": True}], ids=str)
def test_options_of_enable_change_nothing_of_what_is_said(cogvideox: Report, options: dict[str, Any]) -> None:
    found = pab_fx.explain(COGVIDEOX.build(), COGVIDEOX.step(900.0, 0), rounds=1, **options)
    assert [(each.name, each.role, each.flops, each.cache_bytes) for each in found.regions] == [
        (each.name, each.role, each.flops, each.cache_bytes) for each in cogvideox.regions
    ]
    assert sum(each.time_share or 0.0 for each in found.regions) > 0  # how much depends on what else the machine does
    assert found.schedule == cogvideox.schedule


def test_a_pipeline_is_left_after_its_first_step() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    report = pab_fx.explain(pipe, {"prompt": "a red circle moving left"}, PABConfig(2, 3, 4), steps=12, rounds=0)
    assert (len(report.schedule.timesteps), report.schedule.source) == (12, "known")
    assert {strip.role for strip in report.schedule.strips} == {"spatial", "temporal", "cross"}
    assert [graph.runs for graph in report.captured] == [1]
    assert "step" not in vars(pipe.scheduler)


def test_timesteps_that_are_not_known_are_said_to_be_assumed_or_seen(cogvideox: Report) -> None:
    assert cogvideox.schedule.timesteps[:3] == (1000.0, 950.0, 900.0)
    assert len(cogvideox.schedule.timesteps) == 20
    assert "evenly spaced ones are assumed" in str(cogvideox)
    model = COGVIDEOX.build()
    with pab_fx.enable(model, inner="eager") as pab:
        zoo.trajectory(COGVIDEOX, model, (900.0, 700.0, 600.0))
        zoo.trajectory(COGVIDEOX, model, (800.0, 500.0))
        assert (pab.report().schedule.timesteps, pab.report().schedule.source) == ((800.0, 500.0), "seen")
        assert "seen so far" in str(pab.report())


def test_two_branches_are_one_schedule_and_a_cache_each() -> None:
    model = COGVIDEOX.build()
    with pab_fx.enable(model, inner="eager") as pab:
        for seed, t in enumerate((900.0, 700.0, 600.0)):
            for branch in ("cond", "uncond"):
                with pab_fx.cache_context(branch):
                    zoo.call(COGVIDEOX, model, t, seed)
        report = pab.report()
    assert report.schedule.timesteps == (900.0, 700.0, 600.0)
    assert [strip.steps for strip in report.schedule.strips] == ["CRC"]
    (role,) = report.roles
    assert (role.computed, role.reused) == (8, 4)
    assert role.full_bytes == 2 * sum(region.cache_bytes for region in report.regions if region.rule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"rounds": -1}, "rounds"),
        ({"inner": "eager"}, "leave inner='eager'"),
    ],
)
def test_what_cannot_be_explained_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pab_fx.explain(nn.Linear(2, 2), **fields)


# ------------------------------------------------------------------------------------------------ in each form


def test_text_has_a_letter_per_step_under_its_timestep(latte: Report) -> None:
    lines = str(latte).splitlines()
    header = next(line for line in lines if line.startswith("timestep"))
    strip = next(line for line in lines if line.startswith("temporal ") and "C R R C" in line)
    for t, letter in zip(TIMESTEPS, "CRRCRRC", strict=True):
        found = re.search(rf"\b{t:.0f}\b", header)
        assert found is None or strip[found.start()] == letter
    assert "transformer_blocks.{0-1}.attn2" in str(latte)
    assert "left alone: transformer_blocks.1.ff (mlp): the config leaves it alone" in str(latte)


def test_sizes_in_a_column_have_one_unit(ran: Report) -> None:
    rows = str(ran).splitlines()[1:5]
    assert len({unit for row in rows for unit in re.findall(r"\b[KMG]iB", row)}) == 1


def test_a_terminal_shows_it_in_colour(latte: Report) -> None:
    shown = io.StringIO()
    Console(force_terminal=True, width=200, file=shown).print(latte)
    assert "\x1b[" in shown.getvalue()
    assert "every 4th step in (100, 800)" in shown.getvalue()


def test_markdown_has_rows_as_wide_as_their_header(latte: Report) -> None:
    for table in re.findall(r"(?:^\|.*\|$\n?)+", latte.markdown(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert "## Left alone" in latte.markdown()


def test_a_page_needs_nothing_else(latte: Report) -> None:
    links: list[str] = []
    text: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            assert tag not in ("script", "link", "img", "iframe")
            links.extend(value for name, value in attrs if name in ("src", "href"))

        def handle_data(self, data: str) -> None:
            text.append(data)

    Reader().feed(latte.html())
    assert not links
    assert "url(http" not in latte.html()
    assert "@import" not in latte.html()
    assert {"C", "R", "spatial", "mlp"} <= {each.strip() for each in text}


def test_names_are_escaped(latte: Report) -> None:
    region = dataclasses.replace(latte.regions[0], name="<em>&", why='"<i>"')
    strange = dataclasses.replace(latte, regions=(region,), outlines=(), warnings=("<script>",))
    assert "<em>" not in strange.html()
    assert "<script>" not in strange.html()


def test_json_is_read_back_as_it_was(latte: Report, ran: Report) -> None:
    for report in (latte, ran):
        assert Report.of_json(json.loads(json.dumps(report.as_json()))) == report


@pytest.mark.parametrize("found", [{}, {"schema": "pab_fx.report/0"}, [], {"schema": "pab_fx.report/1", "rolls": []}])
def test_json_of_something_else_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="no report"):
        Report.of_json(found)


def test_the_drawing_has_a_condition_for_each_kind_of_attention(latte: Report) -> None:
    (outline,) = latte.outlines
    drawn = [box.region.name for box in outline.boxes if box.region is not None]
    assert "transformer_blocks.0.attn1" in drawn
    assert len(drawn) <= len(latte.regions)
    svg = ElementTree.fromstring(latte.svg())
    texts = [each.text for each in svg.iter("{http://www.w3.org/2000/svg}text")]
    kept = [box for box in outline.boxes if box.region is not None and box.region.left_alone is None]
    assert texts.count("cache") == len(kept) > 0
    titles = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 1 + 2 * len(outline.boxes)


def test_what_is_left_of_an_attention_is_drawn_as_what_it_does(latte: Report) -> None:
    """Not as another attention: the last operations of one that drops nothing and rescales."""
    (outline,) = latte.outlines
    left = [box.label for box in outline.boxes if box.block and box.region is None]
    assert any("truediv" in label for label in left)
    assert not [label for label in left if re.search(r"attn|dropout", label)]


def test_blocks_that_are_alike_are_drawn_once(cogvideox: Report) -> None:
    (outline,) = cogvideox.outlines
    (attention,) = [box for box in outline.boxes if box.region is not None]
    assert (attention.block, attention.copies) == ("transformer_blocks.{0-1}", 2)
    assert all(of < to for of, to in outline.edges)
    assert {to for _, to in outline.edges} == set(range(1, len(outline.boxes)))


def test_a_report_without_graphs_is_not_drawn(ran: Report) -> None:
    with pytest.raises(ValueError, match=r"pab_fx\.explain"):
        ran.svg()


# ------------------------------------------------------------------------------------------------ small parts


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True))
def test_joined_names_say_every_number(numbers: list[int]) -> None:
    name = joined_names([f"blocks.{i}.attn" for i in numbers])
    said = re.fullmatch(r"blocks\.\{?([\d,-]+)\}?\.attn", name)
    assert said is not None
    runs = [tuple(map(int, run.split("-"))) for run in said[1].split(",")]
    assert {i for run in runs for i in range(run[0], run[-1] + 1)} == set(numbers)


timesteps = st.lists(st.floats(0, 1000), min_size=1, max_size=60, unique=True).map(
    lambda found: tuple(sorted(found, reverse=True))
)


@given(timesteps, st.integers(1, 6), st.integers(1, 3))
def test_a_strip_has_a_letter_for_each_step(timesteps: tuple[float, ...], skip_range: int, calls: int) -> None:
    rule = SkipRange(skip_range, 100, 800)
    (strip,) = schedule_of([Scheduled("attn", "spatial", rule, calls)], timesteps, "known").strips
    assert len(strip.steps) == len(timesteps)
    assert strip.computed + strip.reused == calls * len(timesteps)
    if calls == 1:
        assert [letter == "R" for letter in strip.steps] == list(reused_calls(rule, timesteps))
        assert strip.reused == strip.steps.count("R")


@given(timesteps, st.integers(1, 3))
def test_a_timestep_stands_above_its_step(timesteps: tuple[float, ...], width: int) -> None:
    line = ruler(timesteps, width)
    starts = [found.start() for found in re.finditer(r"\S+", line)]
    assert starts[0] == 0
    assert all(start % width == 0 for start in starts)
    digits = 2 if max(map(abs, timesteps)) <= 1 else 0  # noise levels
    assert line.split() == [f"{timesteps[start // width]:.{digits}f}" for start in starts]


@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=5))
def test_a_size_is_nothing_only_where_it_is_nothing(sizes: list[int]) -> None:
    unit = unit_of(sizes)
    for size in sizes:
        assert in_bytes(size, unit).endswith(unit)
        assert (in_bytes(size, unit) == f"0 {unit}") == (size == 0)


# --------------------------------------------------------------------------------------------- the command line


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments])


def test_the_command_writes_every_form(tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("svg", "html", "md")}
    options = ["--graph", str(files["svg"]), "--html", str(files["html"]), "--markdown", str(files["md"])]
    shown = invoke("wan", "--config", "spatial=2,cross=3", "--rounds", "0", *options, "--json", "-")
    assert shown.exit_code == 0, shown.output
    report = Report.of_json(json.loads(shown.stdout))
    assert {strip.role for strip in report.schedule.strips} == {"spatial", "cross"}
    assert not report.warnings
    assert "every 3rd step" in shown.stderr
    assert files["svg"].read_text() == report.svg()
    assert files["html"].read_text() == report.html()
    assert files["md"].read_text() == report.markdown()


def test_the_command_reads_a_config_from_a_file(tmp_path: Path, tiny_pipeline: Callable[[Path], None]) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    PABConfig(spatial_attention_block_skip_range=5).save(tmp_path / "config.json")
    shown = invoke(str(tmp_path / "pipeline"), "--config", str(tmp_path / "config.json"), "--rounds", "0")
    assert shown.exit_code == 0, shown.output
    assert "every 5th step" in shown.stdout


def test_the_command_takes_the_folder_of_a_pipeline(tmp_path: Path, tiny_pipeline: Callable[[Path], None]) -> None:
    tiny_pipeline(tmp_path)
    shown = invoke(str(tmp_path), "--rounds", "0", "--steps", "6")
    assert shown.exit_code == 0, shown.output
    assert "the timesteps of the generation" in shown.stdout
    assert "transformer_blocks.0.attn1" in shown.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_command_takes_the_models_of_the_benchmark(name: str) -> None:
    """Each with what the benchmark broadcasts of it, and inputs that it can be called with."""
    subject = subject_of(name)
    told = subject.config.current_timestep_callback
    assert told is not None
    assert told() == 900
    assert subject.config == dataclasses.replace(model_of(name, "cpu").pab, current_timestep_callback=told)
    assert subject.model(**subject.kwargs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WanTransformer3DModel"], "it is one of demo, cogvideox, latte, flux, wan, or a folder"),
        (["demo", "--config", "wan"], "it is a preset"),
        (["demo", "--config", "no.json"], "no.json"),
        (["demo", "--graph", "no/such/folder/graph.svg"], "there is no folder"),
        (["demo", "--markdown", "-", "--json", "-"], "would both go to standard output"),
        (["tests"], "holds no pipeline"),
    ],
)
def test_a_bad_argument_is_refused_with_what_to_do(arguments: list[str], message: str) -> None:
    shown = invoke(*arguments)
    assert shown.exit_code in (1, 2)
    assert message in " ".join(shown.output.split())


def test_positional_arguments_in_place_of_named_ones_are_refused() -> None:
    entry = zoo.BY_NAME["WanTransformer3DModel"]
    given: Any = tuple(entry.step(900.0, seed=0).values())
    with pytest.raises(ValueError, match=r"positional ones are given as args="):
        pab_fx.explain(entry.build(), given)


def test_the_version_is_told() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"pab-fx {pab_fx.__version__}\n")


def test_help_says_what_it_shows() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for option in ("--config", "--graph", "--html", "--markdown", "--json", "--rounds"):
        assert option in shown.output
