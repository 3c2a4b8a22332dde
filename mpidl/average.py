"""`mpidl.average`: the mean over ranks of arrays of one's own."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from mpidl.array import is_array, is_device, namespace
from mpidl.bucket import check_dtype
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.strategies import AllReduce
from mpidl.world import current

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.world import World

Arrays = Any  # an array, or a list, tuple or dict of such


def average(arrays: Arrays, *, weight: float = 1.0, world: World | None = None) -> Arrays:
    """Replace each array by its weighted mean over ranks, in place. Collective.

    `arrays` is an array of any shape (float32 or float64, NumPy or CuPy), or a list, tuple or
    dict of such, nested as one likes, and the same on every rank. `weight` is what this rank's
    part counts, its number of samples, say; 0 for a rank that has none. Returns `arrays`.

    Raises on every rank, before anything is changed: UnsupportedDtype; InvalidArgument for what
    is no array or read-only, or a negative weight; RankMismatch where names, shapes or dtypes
    differ between ranks.
    """
    world = world or current()
    leaves: dict[str, Array] = {}
    problem: MpidlError | None = None
    try:
        _collect(arrays, "arrays", leaves)
        if not 0 <= weight < float("inf"):
            raise InvalidArgument(f"weight={weight}: expected a finite number, 0 or more")
    except MpidlError as error:
        problem, weight = error, 0.0
    layout = ", ".join(
        f"{k} {v.shape} {v.dtype}{' on the GPU' * is_device(v)}" for k, v in leaves.items()
    )
    # One short message settles it where all is well: of P numbers with the sum s and the sum of
    # squares q, s^2 = P q only if they are all equal (Cauchy and Schwarz). With 20 bits a number,
    # both sums are exact in float64 up to 8,192 ranks; beyond, a longer look finds them equal.
    code = zlib.crc32(layout.encode()) >> 12
    sums = world.sum([weight, problem is not None, code, code * code])
    total, problems = map(float, sums[:2])
    s, q = map(int, sums[2:])
    if problems:
        world.agree(problem)
    if s * s != world.size * q:
        world.same(layout, "arrays")
    if total == 0:
        world.agree(InvalidArgument("the weights of all ranks are 0: there is no mean"))
    strategy = AllReduce(world)
    for leaf in leaves.values():
        flat = namespace(leaf).ascontiguousarray(leaf).reshape(-1)
        if weight == 0:
            flat.fill(0)  # whatever it holds, 0 x NaN is not 0
        for _ in strategy.reduce(flat, weight / total):
            pass  # it works in place
        if not leaf.flags.c_contiguous:  # then `flat` is a copy
            leaf[...] = flat.reshape(leaf.shape)
    strategy.close()
    return arrays


def _collect(value: Arrays, name: str, leaves: dict[str, Array]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}[{key!r}]", leaves)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _collect(item, f"{name}[{i}]", leaves)
    elif not is_array(value):
        raise InvalidArgument(f"{name} is a {type(value).__name__}; expected an array to change")
    elif not getattr(value.flags, "writeable", True):
        raise InvalidArgument(f"{name} is read-only; expected an array to change")
    else:
        check_dtype(value, name)
        leaves[name] = value
