"""A report as a page of HTML that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .content import (
    graph_lines,
    graph_table,
    left_alone,
    notes,
    region_table,
    role_table,
    source_of,
    strip_labels,
    title_of,
)
from .data import ReportData
from .drawing import drawing
from .palette import COMPUTE_COLOUR, PARTLY_COLOUR, REUSE_COLOUR, ROLE_COLOURS
from .strips import COMPUTE, PARTLY, REUSE
from .units import in_bytes, in_percent, in_seconds

WORDS = {COMPUTE: "compute", REUSE: "reuse", PARTLY: "reuse in some of its calls"}


def page(report: ReportData) -> str:
    """The report as a page, with the drawing of its graphs where it has some.

    Args:
        report: from `PAB.report()` or `pab_fx.explain`.
    """
    template = files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title_of(report),
        cards=_cards(report),
        colours=ROLE_COLOURS,
        compute=COMPUTE_COLOUR,
        reuse=REUSE_COLOUR,
        partly=PARTLY_COLOUR,
        timesteps=report.schedule.timesteps,
        marks=_marks(report.schedule.timesteps),
        strips=list(zip(strip_labels(report), report.schedule.strips, strict=True)),
        words=WORDS,
        source=source_of(report),
        regions=region_table(report),
        graphs=graph_table(report),
        lines=graph_lines(report),
        roles=role_table(report),
        left_alone=left_alone(report),
        notes=notes(report),
        warnings=report.warnings,
        svg=Markup(drawing(report)) if report.outlines else "",
    )


def _cards(report: ReportData) -> list[tuple[str, str]]:
    """The numbers at the top of the page, and what they are."""
    regions = [region for region in report.regions if region.left_alone is None]
    steps = [strip for strip in report.schedule.strips for _ in range(strip.modules)]
    calls = sum(strip.computed + strip.reused for strip in steps)
    cards = [(f"{len(regions)} of {len(report.regions)}", "attentions and feed-forwards are broadcast")]
    if calls:
        cards.append((in_percent(sum(strip.reused for strip in steps) / calls), "of their calls reuse"))
    if any(region.flops_share for region in regions):
        share = sum(region.flops_share or 0.0 for region in regions)
        cards.append((in_percent(share), "of a step's FLOPs are theirs"))
    if report.seconds is not None:
        share = sum(region.time_share or 0.0 for region in regions)
        spent = f"{in_seconds(share * report.seconds)} of {in_seconds(report.seconds)}"
        cards.append((in_percent(share), f"of a step's time ({spent})"))
    return [*cards, (in_bytes(sum(region.cache_bytes for region in regions)), "of caches, in one cache context")]


def _marks(timesteps: Sequence[float]) -> list[str]:
    """A timestep above every few steps, nothing above the others."""
    every = 2 if len(timesteps) <= 30 else 4
    return [f"{t:.0f}" if i % every == 0 else "" for i, t in enumerate(timesteps)]
