"""What stands in files that others wrote, or wrote half of: numbers, texts, lines of JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 2**53  # above, steps are no numbers of a run
LONGEST = 1e10  # seconds: 300 years
HUGE = 1e100  # as infinity: axes have to be longer than what is drawn on them


def number(value: Any) -> float:
    """Return a value of a file as a float: NaN for what is none; beyond `HUGE` infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    huge = abs(found) > HUGE  # False of NaN
    return math.copysign(math.inf, found) if huge else found


def time(value: Any) -> float:
    """Return seconds of a file: NaN for what no run can have taken."""
    found = number(value)
    return found if 0 <= found <= LONGEST else math.nan


def whole(value: Any) -> int | None:
    """Return a count of a file: None for what is none."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    return value if good else None


def numbers(value: Any) -> list[float]:
    """Return a list of a file as floats; empty for what is none."""
    return [number(one) for one in value] if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """Return an object of a file; empty for what is none."""
    return value if isinstance(value, dict) else {}


def printable(text: str) -> str:
    """Return `text` with "?" for what moves a cursor, or is no character: it may be anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)


def read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is none that can be read."""
    try:
        return mapping(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


class Lines:
    """The objects of a file with one in each line, also while it is being written."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.damaged = path, 0, 0
        self.file = self._id()

    def _id(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def replaced(self) -> bool:
        """Whether another file has this name by now, or it was emptied."""
        try:
            return self._id() != self.file or self.path.stat().st_size < self.place
        except OSError:
            return True

    def new(self) -> list[dict[str, Any]]:
        """Return what was added since the last call; a last line without an end is left for later.

        Lines that are no objects are counted in `damaged`.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.place)
                data = file.read()
        except OSError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self.place += len(data)
        found = []
        for line in data.splitlines():
            try:
                one = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                one = ""
            if isinstance(one, dict):
                found.append(one)
            elif one is not None:
                self.damaged += 1
        return found
