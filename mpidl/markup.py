"""Tables for notebooks. They bring no colours: those of the page are right, light or dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> str:
    """Return an HTML table. All texts are escaped; the first `left` columns stand to the left."""
    lines = [_row("th", head, left), *(_row("td", row, left) for row in rows)]
    return f"<table>\n{lines[0]}\n" + "\n".join(lines[1:]) + "\n</table>"


def _row(kind: str, cells: Sequence[str], left: int) -> str:
    from html import escape  # its import is slow, and few need it

    return "<tr>{}</tr>".format(
        "".join(
            f'<{kind} style="text-align: {"left" if i < left else "right"}; white-space: pre">'
            f"{escape(cell)}</{kind}>"
            for i, cell in enumerate(cells)
        )
    )
