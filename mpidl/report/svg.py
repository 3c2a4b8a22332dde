"""A figure of matplotlib as a piece of an HTML page."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from mpidl.report.style import VARIABLES

COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)
REFERENCE = re.compile(r"#([\w-]+)")


def inline(figure: Any, prefix: str, says: str) -> str:
    """Return a figure as an <svg> element that fits its place, and close it to the outside.

    Its colours are the page's variables, its ids begin with `prefix`, `says` is for those who do
    not see it, and nothing in it is an address.
    """
    for panel in figure.axes:
        panel.patch.set_visible(False)
    figure.patch.set_visible(False)
    file = io.BytesIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    root = ElementTree.fromstring(file.getvalue())
    used: set[str] = set()
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {_local(k): v for k, v in element.attrib.items()}  # no xlink:
        for key in ("href", "clip-path"):
            used |= set(REFERENCE.findall(element.get(key, ""))) if _inside(element, key) else set()
    for element in root.iter():
        _rename(element, used, prefix)
        if "style" in element.attrib:
            element.set("style", COLOUR.sub(_variable, element.attrib["style"]))
    size = root.get("viewBox", "")
    root.attrib = {"class": "plot", "viewBox": size, "role": "img", "aria-label": says}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _inside(element: ElementTree.Element, key: str) -> bool:
    return not element.get(key, "").startswith("data:")


def _rename(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    name = element.attrib.pop("id", None)
    if name in used:
        element.set("id", f"{prefix}-{name}")
    for key in ("href", "clip-path"):
        if key in element.attrib and _inside(element, key):
            element.set(key, REFERENCE.sub(rf"#{prefix}-\1", element.attrib[key]))


def _variable(found: re.Match[str]) -> str:
    return f"var(--{VARIABLES[found[0].lower()]})"
