"""What the commands tell a person: lines of at most 80 columns."""

from __future__ import annotations

import sys
import textwrap

COLUMNS = 80


def wrapped(text: str, first: str = "", rest: str = "  ") -> str:
    """Return `text` in lines of at most 80 columns, which begin with `first`, then with `rest`.

    Words stay whole, since a path, or a list of hosts, is there to be copied. What has lines of its
    own, such as what a launcher said, stays as it is.
    """
    if "\n" in text:
        return first + text
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def complain(text: object) -> None:
    """Print what went wrong, or is to be noted, on standard error."""
    print(wrapped(str(text), "mpidl: "), file=sys.stderr)
