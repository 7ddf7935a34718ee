"""Charts as inline SVG, drawn by pygal.

pygal puts its configuration into a script and its style into a `<style>`; both are taken out. The colours, fonts and lines are
those of the page, so that charts follow its light, dark and printed form.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from nestpatch.evaluation.dose import DosePoint
from nestpatch.measured import DECISIVE, Row
from nestpatch.plain import lines

if TYPE_CHECKING:
    from pygal.graph.graph import Graph

_NOISE = ("defs", "title", "desc")
"""Elements of pygal that a page without its script does not need; their words would be read aloud."""
_DECIMALS = re.compile(r"(\d+\.\d\d)\d+")


def _library() -> Any:
    """pygal, without the finder of modules that it installs for its maps: the finder warns at every later import."""
    import pygal

    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("pygal")]
    return pygal


class Charts:
    """Draws the charts of one page; each gets ids of its own."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def bars(self, row: Row) -> Markup:
        """Two bars from 0 to 100 %, before and after, each with its 95 % interval.

        Args:
            row: The number.

        Returns:
            An SVG element; empty where nothing was measured.
        """
        pygal = _library()
        sides = [(name, share) for name, share in (("before", row.before), ("after", row.after)) if share is not None]
        if not sides:
            return Markup("")
        chart = pygal.HorizontalBar(**_PLAIN, width=480, height=15 * len(sides), range=(0, 1), show_y_labels=False,
                                    show_x_labels=False, classes=("bars", *(name for name, _ in sides)))  # fmt: skip
        for name, share in sides:
            chart.add(name, [{"value": share.value, "ci": {"low": share.low, "high": share.high}}])
        texts = [f"{name} {share.value:.1%}, {share.low:.1%} to {share.high:.1%}" for name, share in sides]
        return self._inline(chart, f"{row.name}: {row.title}", "; ".join(texts))

    def curve(self, points: Sequence[DosePoint]) -> Markup:
        """Attack success and refusals by strength.

        Args:
            points: At least two.

        Returns:
            An SVG element.
        """
        measured = {
            title: [(point.strength, share) for point in points if (share := getattr(point, name)) is not None]
            for name, title in DECISIVE.items()
        }
        series = {title: [(x, share.value) for x, share in found] for title, found in measured.items()}
        # pygal has no intervals in the plane: each is a line of its own from its low to its high end.
        whiskers = [
            [point for x, one in found for point in ((x, one.interval[0]), (x, one.interval[1]), None)]
            for found in measured.values()
        ]
        labels = {"range": (0, 1), "y_labels": (0, 0.25, 0.5, 0.75, 1)}
        return self._xy(series, "Shares by strength", "share", lambda y: f"{y:.0%}", labels, whiskers)

    def drift(self, points: Sequence[DosePoint]) -> Markup:
        """The divergence from the base by strength.

        Args:
            points: At least two.

        Returns:
            An SVG element; empty where fewer than two points have it.
        """
        values = [(point.strength, point.kl_to_base) for point in points if point.kl_to_base is not None]
        if len(values) < 2:
            return Markup("")
        return self._xy(
            {"KL to the base": values}, "KL to the base by strength", "nats per token", lambda y: f"{y:.2g}", {"max_scale": 6}
        )

    def _xy(
        self,
        series: dict[str, Any],
        title: str,
        unit: str,
        form: Callable[[float], str],
        more: dict[str, Any],
        whiskers: Sequence[Any] = (),
    ) -> Markup:
        chart = _library().XY(**_PLAIN | {"margin": 8}, **more, width=440, height=260, dots_size=4, value_formatter=form,
                              x_value_formatter=lambda x: f"{x:g}", classes=("curve",), allow_interruptions=True)  # fmt: skip
        chart.x_labels = sorted({x for values in series.values() for x, _ in values})
        for name, values in series.items():
            chart.add(name, values)
        for ends in whiskers:
            chart.add("", ends, show_dots=False)
        points = (f"{name}: " + ", ".join(f"{x:g} {form(y)}" for x, y in values) for name, values in series.items() if values)
        return self._inline(chart, title, f"{unit}; strength and value. " + "; ".join(points))

    def _inline(self, chart: Graph, title: str, text: str) -> Markup:
        """A chart as an element of the page, which names and describes itself."""
        from pygal.etree import etree

        root, number = chart.render_tree(), next(self._numbers)
        for parent in list(root.iter()):
            for child in list(parent):
                noise = not isinstance(child.tag, str) or child.tag in _NOISE or "tooltip" in child.get("class", "").split()
                if noise:
                    parent.remove(child)
            for name, value in parent.attrib.items():
                parent.set(name, _DECIMALS.sub(r"\1", value))
        root.attrib.pop("id", None)
        root.set("role", "img")
        root.set("aria-labelledby", f"chart-{number}-title chart-{number}-text")
        for place, (tag, content) in enumerate((("title", title), ("desc", text))):
            node = etree.Element(tag, {"id": f"chart-{number}-{'title' if tag == 'title' else 'text'}"})
            node.text = lines(content)
            root.insert(place, node)
        # Serialized by an XML library, which escapes every text.
        return Markup(etree.tostring(root, encoding="unicode"))  # noqa: S704


_PLAIN: dict[str, Any] = {
    "js": (),
    "css": (),
    "no_prefix": True,
    "explicit_size": False,
    "show_legend": False,
    "margin": 0,
    "spacing": 2,
}
"""Nothing from elsewhere, no size of its own, no legend: the page has one."""
