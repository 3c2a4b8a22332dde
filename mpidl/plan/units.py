"""Numbers with units, as people write them: "100gbit", "2us", "20GB", "1.5e9"."""

from __future__ import annotations

import math
import re

from mpidl.errors import InvalidArgument

NUMBER = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
BITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8}
BYTES = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}  # "Gb" may mean bits


def number(text: str, what: str) -> float:
    """Return what "1.5e9" or "1.5G" means."""
    return _read(text, what, NUMBER, "a number, such as 1.5e9 or 1.5G")


def seconds(text: str, what: str) -> float:
    """Return the seconds that "2us" means."""
    return _read(text, what, SECONDS, "a time, such as 2us or 1.5ms", zero=True)


def rate(text: str, what: str) -> float:
    """Return the bytes a second that "100gbit" or "12.5GB" (each also with "/s") means."""
    cut = text.strip().removesuffix("/s")
    expected = "bits or bytes a second, such as 100gbit or 12GB"
    if cut.lower().endswith("b") and not cut.endswith("B"):
        raise InvalidArgument(f"{what} {text!r}: expected {expected}; b may mean either")
    return _read(cut, what, BITS | BYTES, expected)


def count(text: str, what: str) -> int:
    """Return the whole number, 1 or more, that "512" means."""
    found = number(text, what)
    if found < 1 or found != int(found):
        raise InvalidArgument(f"{what} {text!r}: expected a whole number, 1 or more")
    return int(found)


def counts(text: str, what: str) -> list[int]:
    """Return the numbers of "8,64,512"."""
    return [count(word, what) for word in text.split(",")]


def _read(
    text: str, what: str, units: dict[str, float], expected: str, *, zero: bool = False
) -> float:
    """Return the number in its unit. Raises InvalidArgument, which tells what was `expected`."""
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = found and next((u for u in (found[2], found[2].lower()) if u in units), None)
    if found is None or unit is None:
        known = ", ".join(filter(None, units))
        raise InvalidArgument(f"{what} {text!r}: expected {expected} (units: {known})")
    value = float(found[1]) * units[unit]
    if not math.isfinite(value) or (value == 0 and not zero):
        raise InvalidArgument(f"{what} {text!r}: expected {expected}, above 0")
    return value
