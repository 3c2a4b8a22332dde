"""A graph in the making: its nodes, its constants, and lengths that follow the batch.

Only `export_onnx` imports this: it needs the package onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mpidl.array import is_array, is_device, to_numpy
from mpidl.autograd.tensor import array_of
from mpidl.errors import InvalidArgument
from mpidl.onnx.runs import FromInput, lengths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpidl.array import Array
    from mpidl.autograd import Tensor
    from mpidl.onnx.runs import Length, Seen

INT64 = np.dtype(np.int64)
SMALL = 64  # elements, up to which equal constants are written once


class Graph:
    """The file's content. Values are known by name; arrays of the runs by their identity.

    Args:
        state: the model's parameters and buffers, by name.
        sizes: of the batch, in each run.
        reserved: names of the file's inputs and outputs.
        batch: the input whose first axis is the batch.
    """

    def __init__(
        self, state: Mapping[str, Tensor], sizes: Length, reserved: Iterable[str], batch: str
    ) -> None:
        self.sizes, self.batch = sizes, batch
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.doing = "the output"  #: for errors: which operation is being written
        self._used = {"", *reserved}
        self._names: list[dict[int, str]] = [{} for _ in sizes]  # by identity, in each run
        self._places: list[dict[Any, tuple[str, Seen]]] = [{} for _ in sizes]  # by memory
        self._cache: dict[Any, str] = {}
        self._unused: dict[str, Array] = {}
        for name, tensor in state.items():
            unique = self.fresh(name)
            self._unused[unique] = tensor.data
            self.know((tensor.data,) * len(sizes), unique)

    def fresh(self, name: str) -> str:
        """Return `name`, or one made of it that nothing has."""
        number, unique = 0, name
        while unique in self._used:
            number += 1
            unique = f"{name}_{number}"
        self._used.add(unique)
        return unique

    def know(self, seen: Seen, name: str) -> None:
        """Remember that the arrays or tensors `seen` are the value `name`."""
        arrays = tuple(map(array_of, seen))
        for names, places, array in zip(self._names, self._places, arrays, strict=True):
            names[id(array)] = name
            place = _place(array)
            if place is not None:
                places[place] = name, arrays

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, and return its name."""
        output = self.fresh(kind.lower())
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: Any, dtype: Any) -> str:
        """Return the name of an array, or number, that is the same in each run."""
        array = np.asarray(value, dtype)
        if array.size > SMALL:
            return self._store(array, self.fresh("constant"))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._cache:
            self._cache[key] = self._store(array, self.fresh("constant"))
        return self._cache[key]

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a vector of int64 that is the same in each run."""
        return self.constant(values, INT64)

    def value(self, seen: Seen, dtype: Any = None) -> str:
        """Return the name of what was `seen`, converted to `dtype`, if one is given.

        Raises InvalidArgument where it is neither known, nor constant, nor follows the batch.
        """
        arrays = tuple(map(array_of, seen))
        if not is_array(arrays[0]):
            return self._number(seen, np.asarray(seen[0]).dtype if dtype is None else dtype)
        name = self._known(arrays)
        if name is None:
            return self._constant(arrays, arrays[0].dtype if dtype is None else dtype)
        if name in self._unused:
            self._store(to_numpy(self._unused.pop(name)), name)
        return name if dtype is None else self.cast(name, arrays[0].dtype, dtype)

    def cast(self, name: str, before: Any, dtype: Any) -> str:
        """Return a value of dtype `before` in another dtype."""
        wanted = np.dtype(dtype)
        if wanted == before:
            return name
        return self.node("Cast", name, to=helper.np_dtype_to_tensor_dtype(wanted))

    def same(self, seen: Seen, what: str) -> Any:
        """Return what must be the same in each run, such as an option. Raises InvalidArgument."""
        if any(x != seen[0] for x in seen):
            raise self.refusal(
                f"{what} is {seen[0]} for a batch of {self.sizes[0]}, {seen[-1]} for others"
            )
        return seen[0]

    def shape(self, axes: Sequence[Length]) -> str:
        """Return the name of the int64 vector of these lengths, each a straight line in n."""
        if all(len(set(axis)) == 1 for axis in axes):
            return self.integers([axis[0] for axis in axes])
        parts = [self._length(axis) for axis in axes]
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)

    def reshape(self, name: str, axes: Sequence[Length]) -> str:
        """Give a value these lengths."""
        if any(0 in axis for axis in axes):  # to ONNX, 0 is the length that was there before
            raise self.refusal(f"the shape {tuple(a[0] for a in axes)} has no elements")
        varying = [i for i, axis in enumerate(axes) if len(set(axis)) > 1]
        if len(varying) == 1:
            target = self.integers([-1 if i in varying else a[0] for i, a in enumerate(axes)])
        else:
            target = self.shape(axes)
        return self.node("Reshape", name, target)

    def refusal(self, reason: str) -> InvalidArgument:
        """Return the error that the operation being written cannot be."""
        return InvalidArgument(f"export_onnx: {self.doing}: {reason}")

    def _store(self, array: Array, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def _known(self, arrays: Seen) -> str | None:
        names = {known.get(id(a)) for known, a in zip(self._names, arrays, strict=True)}
        if names == {None}:
            found = [at.get(_place(a)) for at, a in zip(self._places, arrays, strict=True)]
            names = {place and place[0] for place in found}
            if names != {None} and len(names) == 1 and found[0] is not None:
                # the same memory in another shape, as `mask[:, None]` is of mask
                return self.reshape(self.value(found[0][1]), lengths(arrays))
        if len(names) > 1:
            raise self.refusal(
                "it reads another value for another batch: a file holds one path only"
            )
        return names.pop()

    def _length(self, axis: Length) -> str:
        """Return the name of a vector of one length, slope n + offset."""
        key = ("length", axis)
        if key not in self._cache:
            slope, offset = self._line(axis)
            name = self.integers([offset])
            if slope:
                shape = self.node("Shape", self.batch)
                name = self.node("Gather", shape, self.integers([0]), axis=0)
                name = name if slope == 1 else self.node("Mul", name, self.integers([slope]))
                name = name if not offset else self.node("Add", name, self.integers([offset]))
            self._cache[key] = name
        return self._cache[key]

    def _line(self, values: Length) -> tuple[int, int]:
        """Return slope and offset of a straight line through a number of each run."""
        n, first = self.sizes[0], values[0]
        if len(set(values)) == 1:
            return 0, first
        slope, rest = divmod(values[1] - first, max(1, self.sizes[1] - n))
        line = tuple(first + slope * (size - n) for size in self.sizes)
        if rest or line != tuple(values):
            raise self.refusal(
                f"a length is {', '.join(map(str, values))} for batches of "
                f"{', '.join(map(str, self.sizes))}: expected a linear function of the batch; "
                f"dynamic_batch=False exports for {n} only"
            )
        return slope, first - slope * n

    def _number(self, seen: Seen, dtype: Any) -> str:
        values = [x.item() if isinstance(x, np.generic) else x for x in seen]
        if all(v == values[0] or v != v for v in values):  # NaN
            return self.constant(values[0], dtype)
        if all(isinstance(v, int) for v in values):
            line = self._length(tuple(values))
            return self.cast(self.node("Squeeze", line, self.integers([0])), INT64, dtype)
        raise self.refusal(
            f"a number is {', '.join(f'{v:g}' for v in values)} for batches of "
            f"{', '.join(map(str, self.sizes))}, with other values: compute it by operations of "
            "tensors, from whole numbers"
        )

    def _constant(self, arrays: Seen, dtype: Any) -> str:
        if any(isinstance(a, FromInput) for a in arrays):
            raise self.refusal(
                f"an array of shape {arrays[0].shape} was computed from the input with NumPy, "
                "which is not recorded: use operations of tensors, or make it an input"
            )
        host = [to_numpy(a) for a in arrays]
        first, axes = host[0], lengths(tuple(host)) if len({a.ndim for a in host}) == 1 else []
        varying = [i for i, axis in enumerate(axes) if len(set(axis)) > 1]
        one = first[tuple(slice(0, 1) if i in varying else slice(None) for i in range(first.ndim))]
        if axes or not any(a.ndim for a in host):
            if all(_equal(a, np.broadcast_to(one, a.shape)) for a in host if one.size):
                small = self.constant(one, dtype)
                return self.node("Expand", small, self.shape(axes)) if varying else small
            if len(axes) == 1 and all(_equal(a, np.arange(len(a))) for a in host):
                end = self.node("Squeeze", self.shape(axes), self.integers([0]))
                numbers = self.node("Range", self.constant(0, INT64), end, self.constant(1, INT64))
                return self.cast(numbers, INT64, dtype)
        raise self.refusal(
            f"an array of shape {first.shape} is another one for other values and batches of "
            f"{self.sizes[-1]}: it is random, or depends on the batch"
        )


def _place(array: Any) -> Any:
    """Return which memory an array without gaps takes; None for others."""
    if not is_array(array) or not array.size or not array.flags.c_contiguous:
        return None
    interface = array.__cuda_array_interface__ if is_device(array) else array.__array_interface__
    return interface["data"][0], array.dtype.str, array.size


def _equal(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
