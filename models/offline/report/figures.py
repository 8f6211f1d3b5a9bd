"""Figures drawn by matplotlib, as SVG within a page that has a light and a dark style."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib as mpl
from matplotlib.figure import Figure

GROUND, TEXT, SOFT, LINE = "#ffffff", "#1b1f24", "#5a6270", "#d5d9e0"
SERIES = ("#0072b2", "#c77700", "#00805c", "#b3261e", "#7a3ea3", SOFT)
"""Okabe and Ito's colours, darkened where white would swallow them, and grey."""
_VARIABLES = {
    **{colour: f"var(--s{number})" for number, colour in enumerate(SERIES)},
    **{GROUND: "var(--ground)", TEXT: "var(--text)", SOFT: "var(--soft)", LINE: "var(--line)"},
}
"""The page's own colours (`base.css`): one SVG serves the light and the dark style."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sluice",
    # Names come from profiles and scenarios: a dollar sign in them is no formula.
    "text.parse_math": False,
    "text.color": TEXT,
    "font.size": 9,
    "figure.facecolor": GROUND,
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.facecolor": GROUND,
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
styled = mpl.rc_context(_STYLE)
"""Decorator of functions that draw."""
_SHAPES = ("path", "use")
_DROPPED = ("metadata", "style", "clipPath")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Chart:
    """A figure, and the same in words.

    Attributes:
        title: what it shows.
        description: what can be seen, for those who do not see it.
        figure: drawn by a `styled` function.
        labels: for the `gid` of an artist, a line for each of its shapes, in the order in which
            they were drawn; a browser shows it where the mouse is.
    """

    title: str
    description: str
    figure: Figure
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @styled
    def svg(self, name: str) -> str:
        """The `<svg>` element for a page; the ids in it begin with `name`."""
        out = io.BytesIO()
        with warnings.catch_warnings():
            # The letters are the browser's: it does not matter which ones matplotlib has.
            warnings.filterwarnings("ignore", "Glyph ")
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        # XML has no control characters; a name may.
        root = _inline(ElementTree.fromstring(_CONTROLS.sub(b" ", out.getvalue())), name)
        for gid, lines in self.labels.items():
            group = root.find(f".//*[@id='{name}-{gid}']")
            assert group is not None, gid
            for shape, line in zip(_shapes(group), lines, strict=True):
                ElementTree.SubElement(shape, "title").text = line
        root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-description"}
        for tag, text in (("description", self.description), ("title", self.title)):
            said = Element("desc" if tag == "description" else tag, {"id": f"{name}-{tag}"})
            said.text = text
            root.insert(0, said)
        return ElementTree.tostring(root, encoding="unicode")


def _inline(element: Element, name: str) -> Element:
    """A copy that may stand in HTML.

    It has no namespaces, no styles that would reach the whole page, and nothing that refers to
    anything but its own ids.
    """
    copy = Element(_local(element.tag), dict(_attributes(element, name)))
    copy.text, copy.tail = element.text, element.tail
    copy.extend(_inline(child, name) for child in element if _local(child.tag) not in _DROPPED)
    return copy


def _attributes(element: Element, name: str) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        match _local(key):
            case "style":
                for declaration in value.split(";"):
                    property_, _, setting = declaration.strip().partition(": ")
                    # The page has its own font.
                    if property_ and property_ != "font-family":
                        yield property_, _VARIABLES.get(setting, setting)
            case "id":
                yield "id", f"{name}-{value}"
            case "href":
                yield "href", f"#{name}-{value[1:]}"
            # Nothing is drawn outside of the axes.
            case "clip-path" | "version":
                continue
            case other:
                yield other, value


def _shapes(group: Element) -> list[Element]:
    """What is drawn, in order, without what `<defs>` only names."""
    return [
        shape
        for parent in group.iter()
        if parent.tag != "defs"
        for shape in parent
        if shape.tag in _SHAPES
    ]


def _local(name: str) -> str:
    return name.rpartition("}")[2]
