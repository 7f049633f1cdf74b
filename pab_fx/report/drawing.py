"""The graphs of a report as SVG: before the rewrite on the left, after it on the right.

After it, each attention is a condition: it is computed and kept, or what was kept is read.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from .data import Box, Outline, RegionReport, ReportData
from .layout import HEIGHT, Layout, Place, laid_out
from .palette import PLAIN_COLOUR, ROLE_COLOURS
from .units import counted, in_bytes, in_flops

MARGIN, TITLE, BETWEEN = 28.0, 52.0, 48.0
LINE = "#9aa1ab"
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1d2129; }
text.small { font-size: 11px; fill: #59616c; }
text.head { font-size: 17px; font-weight: 600; }
text.light { fill: #ffffff; }
text.frame { paint-order: stroke; stroke: #f4f6f8; stroke-width: 5px; }
"""
LEGEND = (
    "Arrows are tensors; one that a longer way implies is left out.",
    "Blocks that are alike are drawn once.",
    "Dashed: computed and kept in the cache, or read from there where the step reuses.",
)


def drawing(report: ReportData) -> str:
    """The graphs of a report, one below the other, each before and after the rewrite.

    Args:
        report: from `pab_fx.explain`.

    Returns:
        An SVG document. Each box has a title, for the pointer that rests on it and for those who cannot see it.

    Raises:
        ValueError: if the report holds no graphs.
    """
    if not report.outlines:
        raise ValueError("the report has no graphs to draw: make it with pab_fx.explain, of a model with attention.")
    svg = Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    _add(svg, "title", f"{report.model or 'The graph'} before and after the rewrite")
    _add(svg, "style", STYLE)
    head = {"viewBox": "0 0 8 8", "refX": "7", "refY": "4", "markerWidth": "7", "markerHeight": "7"}
    marker = _add(_add(svg, "defs"), "marker", id="arrow", orient="auto", **head)
    _add(marker, "path", d="M 0 0 L 8 4 L 0 8 z", fill=LINE)
    background = _add(svg, "rect", fill="#ffffff")
    y, width = MARGIN, 0.0
    for outline in report.outlines:
        layout = laid_out(outline)
        right = MARGIN + layout.width + BETWEEN
        for x, when in ((MARGIN, "before"), (right, "after")):
            _text(svg, x, y + 16, f"{outline.title}, {when}", "head")
            shifted = _add(svg, "g", transform=f"translate({x:g} {y + TITLE:g})")
            _draw(shifted, outline, layout, is_after=when == "after")
        y += TITLE + layout.height + BETWEEN
        width = max(width, right + layout.width + MARGIN)
    for i, line in enumerate(LEGEND):
        _text(svg, MARGIN, y + 16 * i, line, "small")
    size = {"width": f"{width:g}", "height": f"{y + 16 * len(LEGEND) + MARGIN:g}"}
    svg.attrib |= {**size, "viewBox": f"0 0 {size['width']} {size['height']}"}
    background.attrib |= size
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _draw(to: Element, outline: Outline, layout: Layout, is_after: bool) -> None:
    for _, around in layout.frames:
        _add(to, "rect", **_rect(around, 10), fill="#f4f6f8", stroke="#dde2e8")
    places = [_drawn(box, place, is_after) for box, place in zip(outline.boxes, layout.places, strict=True)]
    for a, b in layout.straight:
        _arrow(to, f"M {places[a].middle[0]:g} {places[a].low:g} V {places[b].y:g}")
    for (a, b), x in layout.detours:
        _arrow(to, _way_around(places[a], places[b], x))
    for label, around in layout.frames:
        _text(to, around.x + 12, around.y + 20, _short(label, 50), "small frame")
    for box, place in zip(outline.boxes, places, strict=True):
        group, region, size = _add(to, "g"), box.region, counted(box.operations, "operation")
        _add(group, "title", _told(box))
        if region is None:
            _add(group, "rect", **_rect(place, 6 if box.operations else 23), fill="#ffffff", stroke=PLAIN_COLOUR)
            named = textwrap.wrap(_short(box.label, 70), 36)
            _lines(group, place, [_short(box.label, 36), size] if box.operations else named)
        elif is_after and region.left_alone is None:
            _draw_condition(group, box, region, place)
        else:
            colour, second = ROLE_COLOURS[region.role], size
            if region.left_alone:
                colour, second = PLAIN_COLOUR, "computed in every step"
            _add(group, "rect", **_rect(place, 6), fill=colour)
            _lines(group, place, [f"{_end(box.label, 24)}: {region.role}", second], "light")


def _drawn(box: Box, place: Place, is_after: bool) -> Place:
    """What of its place a box takes: all of it as a condition, else as much as others do."""
    if box.region is None or (is_after and box.region.left_alone is None):
        return place
    return Place(place.x, place.middle[1] - HEIGHT / 2, place.width, HEIGHT)


def _draw_condition(to: Element, box: Box, region: RegionReport, place: Place) -> None:
    """A condition: what computes on the left, the cache that keeps it on the right."""
    colour = ROLE_COLOURS[region.role]
    _add(to, "rect", **_rect(place, 10), fill="#ffffff", stroke=colour, stroke_width="1.5", stroke_dasharray="5 4")
    _text(to, place.middle[0], place.y + 17, _short(region.rule, 40), "small", "middle")
    computes = Place(place.x + 10, place.y + 26, 136.0, place.height - 36)
    cache = Place(place.right - 88, computes.y, 78.0, computes.height)
    _add(to, "rect", **_rect(computes, 6), fill=colour)
    _lines(to, computes, [_end(box.label, 18), counted(box.operations, "operation")], "light")
    _arrow(to, f"M {computes.right:g} {computes.middle[1]:g} H {cache.x - 1:g}")
    _cylinder(to, cache, colour)
    _lines(to, Place(cache.x, cache.y + 8, cache.width, cache.height - 8), ["cache", in_bytes(region.cache_bytes)])


def _told(box: Box) -> str:
    """What is said of a box when the pointer rests on it."""
    region, size = box.region, counted(box.operations, "operation")
    if region is None:
        name = f"{box.block}: {box.label}" if box.block else box.label
        return f"{name}\n{size}" if box.operations else name
    lines = [
        region.name if box.copies == 1 else f"{region.name}, and {box.copies - 1} like it",
        f"{region.role}: {region.why}",
        f"{size}, {in_flops(region.flops)} floating-point operations",
        region.left_alone or f"{region.rule}; cache: {in_bytes(region.cache_bytes)}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- elements


def _add(to: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    """An element in another; underscores in the names of attributes stand for hyphens."""
    element = ElementTree.SubElement(to, tag, {name.replace("_", "-"): value for name, value in attributes.items()})
    element.text = text
    return element


def _text(to: Element, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
    element = _add(to, "text", text, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor)
    if kind:
        element.set("class", kind)


def _lines(to: Element, place: Place, lines: Sequence[str], kind: str = "") -> None:
    """One line, or two of which the second is smaller, in the middle of a place."""
    x, y = place.middle
    for i, line in enumerate(lines):
        _text(to, x, y + 5 - 8 * (len(lines) - 1) + 16 * i, line, f"{kind} small".strip() if i else kind, "middle")


def _rect(place: Place, radius: float) -> dict[str, str]:
    numbers = {"x": place.x, "y": place.y, "width": place.width, "height": place.height, "rx": radius}
    return {name: f"{number:g}" for name, number in numbers.items()}


def _cylinder(to: Element, place: Place, colour: str) -> None:
    x, y, width, height, radius = place.x, place.y + 6, place.width, place.height - 12, place.width / 2
    lid = f"a {radius:g} 6 0 0 0 {width:g} 0 a {radius:g} 6 0 0 0 {-width:g} 0"
    body = f"M {x:g} {y:g} v {height:g} a {radius:g} 6 0 0 0 {width:g} 0 v {-height:g} M {x:g} {y:g} {lid}"
    _add(to, "path", d=body, fill="#ffffff", stroke=colour, stroke_width="1.5")


def _way_around(source: Place, target: Place, out: float) -> str:
    """Out of the side of a box, down, and into the side of another one."""
    is_right = out > source.x
    x = source.right if is_right else source.x
    bend = 6 if is_right else -6
    begin, end = source.low - 10, target.y + 10
    return (
        f"M {x:g} {begin:g} H {out - bend:g} q {bend} 0 {bend} 6 V {end - 6:g} "
        f"q 0 6 {-bend} 6 H {x + (1 if is_right else -1):g}"
    )


def _arrow(to: Element, path: str) -> None:
    _add(to, "path", d=path, fill="none", stroke=LINE, stroke_width="1.2", marker_end="url(#arrow)")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3].rstrip(', ')}..."


def _end(name: str, length: int) -> str:
    """A qualified name, of a long one the end."""
    return name if len(name) <= length else f"...{name[3 - length :].lstrip('.')}"
