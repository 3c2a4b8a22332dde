"""Methods with a codec, "hierarchical+bf16": their names, and how exact they are."""

from __future__ import annotations

from mpidl import codecs

#: By how much a decoded number may be off, as a part of the largest of those encoded with it. The
#: others leave more out, and send it later: nothing can be said of a single mean.
BOUNDS = {"fp16": 2**-11, "bf16": 2**-8, "int8": 1 / 127}
UNBOUND = "it may leave much out; only that all ranks have the same bits was checked"
ONE_NODE = "nothing travels on one node"


def parse(text: str) -> list[str]:
    """Return the names of codecs in "none,bf16", but for none. Raises InvalidArgument."""
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for name in names:
        if name != "none":
            codecs.make(name)
    return [name for name in names if name != "none"]


def method(codec: str) -> str:
    """Return the name of the method that uses this codec."""
    return f"hierarchical+{codec}"


def parts(method: str) -> tuple[str, str | None]:
    """Return the names of a method's strategy, and of its codec, if any."""
    strategy, _, codec = method.partition("+")
    return strategy, codec or None


def codec_of(method: str) -> str | None:
    """Return the name of the codec that a method uses, if any."""
    return parts(method)[1]


def error_bound(method: str, largest: float) -> float | None:
    """Return by how much a codec may put a mean of numbers up to `largest` off; None: who knows.

    The weighted sums of the nodes are encoded, and they add up to `largest` at most; so is their
    sum, error and all.
    """
    codec = codec_of(method)
    if codec is None:
        return 0.0
    if codec not in BOUNDS:
        return None
    return BOUNDS[codec] * (2 + BOUNDS[codec]) * largest


def unchecked(methods: list[str]) -> dict[str, str]:
    """Return why which of these methods were not compared with the mean."""
    return {name: UNBOUND for name in methods if error_bound(name, 1.0) is None}
