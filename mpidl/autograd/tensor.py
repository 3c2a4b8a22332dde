"""The tape: tensors remember how they were made; `backward` walks that graph, not recursing."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import array
from mpidl.autograd import ops
from mpidl.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array

_recording = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside this context operations are not recorded: their results need no gradient."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def recording() -> bool:
    """Tell whether operations are being recorded for `backward`."""
    return _recording.get()


class Node:
    """How a tensor was made: its inputs that need a gradient, each with the adjoint to it."""

    __slots__ = ("edges", "name")

    def __init__(self, name: str, edges: list[tuple[Tensor, ops.Adjoint]]) -> None:
        self.name = name
        self.edges: list[tuple[Tensor, ops.Adjoint]] | None = edges  # None: freed by backward


class Tensor:
    """An array (NumPy or CuPy, any shape) that can be differentiated.

    A leaf with `requires_grad` gathers its gradient in `grad`. The gradient lives in memory of
    the leaf's own, or in a view of a bucket: see `bind`.
    """

    __slots__ = ("__weakref__", "_filled", "_grad", "data", "hooks", "node", "requires_grad")
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to Tensor.__radd__

    def __init__(self, data: Array, *, requires_grad: bool = False) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.hooks: list[Callable[[Tensor], None]] = []
        self._grad: Array | None = None
        self._filled = False

    @property
    def grad(self) -> Array | None:
        """The gathered gradient, of the shape and dtype of `data`; None before `backward`."""
        return self._grad if self._filled else None

    def zero_grad(self) -> None:
        """Forget the gradient. Its memory is kept and written over by the next backward."""
        self._filled = False

    def fill_grad(self) -> None:
        """Make the gradient zero, in its own memory: this leaf has no part in the loss."""
        if self._grad is None:
            self._grad = array.namespace(self.data).empty_like(self.data)
        self._grad.fill(0)
        self._filled = True

    def bind(self, data: Array, grad: Array) -> None:
        """Move the values into `data`, and let gradients gather in `grad`, both of this shape.

        This is how a parameter comes to live in a bucket: no gradient is ever copied there.
        """
        data[...] = self.data
        if self._filled:
            grad[...] = self._grad
        self.data, self._grad = data, grad

    def on_gradient(self, hook: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call `hook(self)` once in each backward, when the gradient of this leaf is complete.

        Returns the function that ends this.
        """
        self.hooks.append(hook)
        return lambda: self.hooks.remove(hook)

    def backward(self, gradient: Array | None = None) -> None:
        """Add to the `grad` of every leaf the derivative of this tensor, and free the graph.

        `gradient` (of this tensor's shape) weights the elements; only a single element can do
        without. Raises AutogradError for a wrong gradient and for a graph that is freed already.
        """
        if not self.requires_grad:
            raise AutogradError("backward: this tensor depends on nothing that requires a gradient")
        if gradient is None:
            if self.data.size != 1:
                raise AutogradError(
                    f"backward of a tensor of shape {self.shape}: pass a gradient of that shape, "
                    "or sum to one number first"
                )
            gradient = array.namespace(self.data).ones_like(self.data)
        elif gradient.shape != self.shape:
            raise AutogradError(f"backward: gradient of shape {gradient.shape} for {self.shape}")
        _backward(self, gradient)

    def _add_gradient(self, adjoint: ops.Adjoint, gradient: Array) -> None:
        """Add `adjoint(gradient)` to `grad`. The first one is computed right where it belongs."""
        if self._filled and self._grad is not None:
            self._grad += adjoint(gradient, None)
            return
        if self._grad is None:
            self._grad = array.namespace(self.data).empty_like(self.data)
        result = adjoint(gradient, self._grad)
        if result is not self._grad:
            self._grad[...] = result
        self._filled = True

    # fmt: off
    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def T(self) -> Tensor:
        """The tensor with its axes reversed."""
        return apply("transpose", self)

    def detach(self) -> Tensor:
        """Return a tensor on the same memory that takes no part in gradients."""
        return Tensor(self.data)

    def numpy(self) -> Array:
        """Return the values as a NumPy array."""
        return array.to_numpy(self.data)

    def item(self) -> float:
        """Return the only element as a Python number."""
        return self.data.item()

    def __float__(self) -> float: return float(self.data.item())
    def __len__(self) -> int: return len(self.data)
    def __iter__(self) -> Iterator[Tensor]: return (self[i] for i in range(len(self)))
    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError("a Tensor becomes a NumPy array only by tensor.numpy()")
    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __neg__(self) -> Tensor: return apply("negative", self)
    def __add__(self, other: Any) -> Tensor: return apply("add", self, other)
    def __radd__(self, other: Any) -> Tensor: return apply("add", other, self)
    def __sub__(self, other: Any) -> Tensor: return apply("subtract", self, other)
    def __rsub__(self, other: Any) -> Tensor: return apply("subtract", other, self)
    def __mul__(self, other: Any) -> Tensor: return apply("multiply", self, other)
    def __rmul__(self, other: Any) -> Tensor: return apply("multiply", other, self)
    def __truediv__(self, other: Any) -> Tensor: return apply("divide", self, other)
    def __rtruediv__(self, other: Any) -> Tensor: return apply("divide", other, self)
    def __pow__(self, exponent: float) -> Tensor: return apply("power", self, exponent=exponent)
    def __matmul__(self, other: Any) -> Tensor: return apply("matmul", self, other)
    def __rmatmul__(self, other: Any) -> Tensor: return apply("matmul", other, self)
    def __getitem__(self, key: Any) -> Tensor: return apply("getitem", self, key=key)

    def reshape(self, *shape: int) -> Tensor:
        """Return the tensor in another shape; one length may be -1."""
        return apply("reshape", self, shape=shape)

    def sum(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the sum along `axis` (all axes by default)."""
        return apply("sum", self, axis=axis, keepdims=keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the mean along `axis` (all axes by default)."""
        total = self.sum(axis, keepdims=keepdims)
        return total * (max(1, total.data.size) / max(1, self.data.size))

    def exp(self) -> Tensor:
        """Return e to the power of each element."""
        return apply("exp", self)

    def log(self) -> Tensor:
        """Return the natural logarithm of each element."""
        return apply("log", self)
    # fmt: on


def tensor(data: Any, *, requires_grad: bool = False, dtype: Any = None) -> Tensor:
    """Make a tensor of its own memory from numbers, nested lists or an array.

    Python floats become float32, as does what is to have a gradient and is of whole numbers.
    """
    given = array.is_array(data)
    data = data if given else np.asarray(data)
    if dtype is None and (
        (requires_grad and data.dtype.kind != "f") or (not given and data.dtype == np.float64)
    ):
        dtype = np.float32
    return Tensor(data.astype(dtype or data.dtype), requires_grad=requires_grad)


def apply(name: str, *inputs: Any, **options: Any) -> Tensor:
    """Run operation `name` of `ops.OPS` on tensors, arrays or numbers, and record it.

    Raises AutogradError, with the operation and the shapes, where these do not fit.
    """
    values = [x.data if isinstance(x, Tensor) else x for x in inputs]
    try:
        value, adjoints = ops.OPS[name](*values, **options)
    except (ValueError, IndexError) as error:
        shapes = ", ".join(str(getattr(v, "shape", v)) for v in values)
        raise AutogradError(f"{name} of shapes {shapes}: {error}") from error
    result = Tensor(value if array.is_array(value) else np.asarray(value))
    if _recording.get():
        edges = [
            (x, adjoint)
            for x, adjoint in zip(inputs, adjoints, strict=True)
            if isinstance(x, Tensor) and x.requires_grad
        ]
        if edges:
            result.requires_grad = True
            result.node = Node(name, edges)
    return result


def _backward(root: Tensor, gradient: Array) -> None:
    """Walk the graph in reverse topological order (Kahn's algorithm on the count of uses)."""
    uses: Counter[int] = Counter()  # by id; the graph itself keeps every tensor alive
    seen, stack = {id(root)}, [root]
    while stack:
        for parent, _ in _edges(stack.pop()):
            uses[id(parent)] += 1
            if id(parent) not in seen:
                seen.add(id(parent))
                stack.append(parent)

    gradients = {id(root): gradient}
    if root.node is None:
        root._add_gradient(lambda g, out: g, gradient)
        _complete(root)
        return
    ready = [root]
    while ready:
        result = ready.pop()
        gradient = gradients.pop(id(result))
        for parent, adjoint in _edges(result):
            key = id(parent)
            if parent.node is None:
                parent._add_gradient(adjoint, gradient)
            else:
                # not in place: an adjoint may return its input, which another tensor uses too
                part = adjoint(gradient, None)
                gradients[key] = gradients[key] + part if key in gradients else part
            uses[key] -= 1
            if uses[key] == 0:
                if parent.node is None:
                    _complete(parent)
                else:
                    ready.append(parent)
        if result.node is not None:
            result.node.edges = None


def _edges(result: Tensor) -> list[tuple[Tensor, ops.Adjoint]]:
    if result.node is None:
        return []
    if result.node.edges is None:
        raise AutogradError(
            f"backward through {result.node.name}: an earlier backward freed this graph; "
            "run the forward pass again"
        )
    return result.node.edges


def _complete(leaf: Tensor) -> None:
    for hook in leaf.hooks:
        hook(leaf)
