"""A report as a page of HTML that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import content
from .data import ReportData
from .drawing import drawing
from .palette import COMPUTE_COLOUR, PARTLY_COLOUR, REUSE_COLOUR, ROLE_COLOURS
from .strips import COMPUTE, EITHER, PARTLY, REUSE, SKIPPED, SOURCES
from .units import in_bytes, in_percent

WORDS = {COMPUTE: "compute", REUSE: "reuse", PARTLY: "reuse in some of its calls", SKIPPED: "skipped", EITHER: "either"}


def page(report: ReportData) -> str:
    """The report as a page, with the drawing of its graphs where it has some."""
    template = files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    timesteps = report.schedule.timesteps
    every = 2 if len(timesteps) <= 30 else 4
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        report=report,
        content=content,
        cards=_cards(report),
        colours=ROLE_COLOURS,
        compute=COMPUTE_COLOUR,
        reuse=REUSE_COLOUR,
        partly=PARTLY_COLOUR,
        marks=[f"{t:.0f}" if i % every == 0 else "" for i, t in enumerate(timesteps)],  # room for every few of them
        words=WORDS,
        source=SOURCES[report.schedule.source],
        svg=Markup(drawing(report)) if report.outlines else "",
    )


def _cards(report: ReportData) -> list[tuple[str, str]]:
    """The numbers at the top of the page, and what they are."""
    own, (share, spent) = content.broadcast(report), content.time_of(report)
    steps = [strip for strip in report.schedule.strips for _ in range(strip.modules)]
    calls = sum(strip.computed + strip.reused for strip in steps)
    cards = [(f"{len(own.regions)} of {len(report.regions)}", "attentions and feed-forwards are broadcast")]
    if calls:
        cards.append((in_percent(sum(strip.reused for strip in steps) / calls), "of their calls reuse"))
    if content.outermost(report).total("flops_share"):
        cards.append((in_percent(content.outermost(report).total("flops_share")), "of a step's FLOPs are theirs"))
    if share:
        cards.append((share, f"of a step's time ({spent})"))
    return [*cards, (in_bytes(own.total("cache_bytes") or 0), "of caches, in one cache context")]
