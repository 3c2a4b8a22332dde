"""Lets the reference show what is said of attributes in comments: `rank: int  #: from 0 on`."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from pathlib import Path

BESIDE = re.compile(r"#: (.+)$")
ABOVE = re.compile(r"\s*#: ?(.*)$")


class Comments(griffe.Extension):
    """Makes `#:` comments, beside an attribute or in the lines above, its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """See whether there is one."""
        if attr.docstring is not None or attr.lineno is None or attr.endlineno is None:
            return
        lines = _lines(attr.filepath)  # type: ignore[arg-type]
        beside = BESIDE.search(lines[attr.endlineno - 1])
        above = (ABOVE.match(line) for line in reversed(lines[: attr.lineno - 1]))
        found = [line[1] for line in itertools.takewhile(bool, above) if line][::-1]
        text = beside[1] if beside else "\n".join(found)
        if text:
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:], parent=attr)


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n")
