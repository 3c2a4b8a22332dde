"""Running a model on batches of several sizes: what differs between the runs is not constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from mpidl.array import is_array, namespace
from mpidl.autograd import Record, Tensor
from mpidl.autograd.modes import observed
from mpidl.autograd.tensor import array_of
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.nn.predict import evaluating, like

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.nn import Module

    #: the same thing in each run: a tensor, an array, a number, a tuple, ...
    Seen: TypeAlias = tuple[Any, ...]
    #: the same length in each run
    Length: TypeAlias = tuple[int, ...]

NO_VALUES = (np.zeros_like, np.ones_like, np.empty_like, np.full_like)
SHRINK = 15 / 16  # of floating inputs from run to run: keeps their sign, and a range of 0..1


class FromInput(np.ndarray):
    """An array that holds the input, or was computed from it, by whatever function of NumPy."""

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(function, types, args, kwargs)
        if function in NO_VALUES:
            return np.asarray(result)
        return mark(result)


def mark(value: Any) -> Any:
    """Return a NumPy array as one `FromInput`; all else as it is."""
    return value.view(FromInput) if type(value) is np.ndarray else value


class Step(NamedTuple):
    """One operation, as seen in all runs."""

    name: str
    inputs: tuple[Seen, ...]
    options: dict[str, Seen]
    result: Seen

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the result."""
        return self.result[0].dtype

    @property
    def lengths(self) -> list[Length]:
        """The shape of the result."""
        return lengths(self.result)


class Runs(NamedTuple):
    """What all runs have in common."""

    sizes: Length  #: of the batch
    inputs: list[Seen]
    outputs: list[Seen]
    steps: list[Step]


def lengths(seen: Seen) -> list[Length]:
    """Return the length of each axis, in each run, of an array or number."""
    shapes = [x.shape if hasattr(x, "shape") else () for x in seen]
    if len({len(shape) for shape in shapes}) > 1:
        raise InvalidArgument(f"export_onnx: shapes {shapes}: the number of axes changes")
    return list(zip(*shapes, strict=True))


def run(model: Module, example: tuple[Any, ...], dynamic_batch: bool) -> Runs:
    """Run `model` on the example, and on others like it. Raises as `export_onnx` does."""
    first = [_example(model, x) for x in example]
    n = len(first[0]) if first and first[0].ndim else 0
    if n < 1:
        raise InvalidArgument("export_onnx: expected an example of one sample or more, (n, ...)")
    # three points tell a straight line from another function of the batch size
    sizes = (n, n + 1, n + 3) if dynamic_batch else (n, n, n)
    runs = []
    for number, size in enumerate(sizes):
        inputs = [_another(x, n, size, number) for x in first]
        try:
            runs.append((inputs, *_run(model, inputs)))
        except MpidlError as error:
            if size == n:
                raise
            raise InvalidArgument(
                f"export_onnx: the model ran on a batch of {n}, but not of {size}: {error}; "
                f"dynamic_batch=False exports it for {n} only"
            ) from error
    inputs_of, outputs_of, records_of = zip(*runs, strict=True)
    if len({len(o) for o in outputs_of}) != 1:
        raise InvalidArgument("export_onnx: the number of outputs changes from run to run")
    return Runs(
        sizes,
        list(zip(*inputs_of, strict=True)),
        list(zip(*outputs_of, strict=True)),
        _align(records_of, sizes),
    )


def _example(model: Module, x: Any) -> Array:
    x = array_of(x)
    if not is_array(x):
        raise InvalidArgument(
            f"export_onnx: an example of type {type(x).__name__}: expected an array or a tensor, "
            "or a tuple of them"
        )
    return like(model, x)


def _another(x: Array, n: int, size: int, number: int) -> Array:
    """Return other values of the same kind, `size` for each n along the first axis."""
    if x.ndim and len(x) == n:
        x = x[(namespace(x).arange(size) + number) % n]
    if x.dtype.kind == "f":
        return mark(namespace(x).asarray(x * x.dtype.type(SHRINK**number)))
    return mark(x.copy())


def _run(model: Module, inputs: list[Array]) -> tuple[tuple[Any, ...], list[Record]]:
    records: list[Record] = []

    def note(name: str, inputs: Any, options: Any, result: Tensor, _: Any) -> Tensor:
        result.data = mark(result.data)
        records.append(Record(name, inputs, options, result))
        return result

    with evaluating(model), observed(note):
        output: Any = model(*(x if x.dtype.kind == "b" else Tensor(x) for x in inputs))
    outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    for found in outputs:
        if not isinstance(found, Tensor) and not is_array(found):
            raise InvalidArgument(
                f"export_onnx: the model returned a {type(found).__name__}: expected a tensor, or "
                "a tuple of tensors"
            )
    return outputs, records


def _align(records_of: tuple[list[Record], ...], sizes: Length) -> list[Step]:
    steps = []
    names = [[record.name for record in records] for records in records_of]
    for other, size in zip(names[1:], sizes[1:], strict=True):
        for i, name in enumerate(names[0]):
            found = other[i] if i < len(other) else "nothing"
            if found != name:
                raise InvalidArgument(
                    f"export_onnx: operation {i} is {name} for a batch of {sizes[0]}, and {found} "
                    f"for other values and a batch of {size}: a file holds one path only"
                )
        if len(other) > len(names[0]):
            raise InvalidArgument(
                f"export_onnx: {len(names[0])} operations for a batch of {sizes[0]}, {len(other)} "
                f"for other values and a batch of {size}: a file holds one path only"
            )
    for records in zip(*records_of, strict=True):
        inputs = zip(*(r.inputs for r in records), strict=True)
        options = {key: tuple(r.options[key] for r in records) for key in records[0].options}
        results = tuple(r.result for r in records)
        steps.append(Step(records[0].name, tuple(inputs), options, results))
    return steps
