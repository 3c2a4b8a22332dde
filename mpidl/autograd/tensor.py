"""`Tensor`: an array that can be differentiated; `apply` runs an operation on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import array
from mpidl.autograd.modes import mode
from mpidl.autograd.ops import OPS
from mpidl.autograd.tape import Leaf, Node, walk
from mpidl.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array
    from mpidl.autograd.tape import Adjoint


ndarray, generic = np.ndarray, np.generic


class Tensor:
    """An array (NumPy or CuPy, any shape) that can be differentiated.

    A leaf with `requires_grad` gathers its gradient in `grad`. The gradient lives in memory of
    the leaf's own, or in a view of a bucket: see `bind`.
    """

    __slots__ = ("__weakref__", "data", "node", "uses")
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to Tensor.__radd__

    def __init__(self, data: Array, *, requires_grad: bool = False) -> None:
        self.data = data
        self.node: Node | Leaf | None = None
        self.uses = 0
        if requires_grad:
            self.requires_grad = True

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach this tensor: settable where no operation made it."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if isinstance(self.node, Node):
            raise AutogradError(
                "requires_grad: this tensor is a result; use detach() to cut it off"
            )
        if value != self.requires_grad:
            self.node = Leaf() if value else None

    @property
    def grad(self) -> Array | None:
        """The gathered gradient, of the shape and dtype of `data`; None before `backward`."""
        leaf = self.node
        return leaf.grad if isinstance(leaf, Leaf) and leaf.filled else None

    def zero_grad(self) -> None:
        """Forget the gradient. Its memory is kept and written over by the next backward."""
        if isinstance(self.node, Leaf):
            self.node.filled = False

    def fill_grad(self) -> None:
        """Make the gradient zero, in its own memory: this leaf has no part in the loss."""
        leaf = self._leaf()
        if leaf.grad is None:
            leaf.grad = array.namespace(self.data).empty_like(self.data)
        leaf.grad.fill(0)
        leaf.filled = True

    def bind(self, data: Array, grad: Array) -> None:
        """Move the values into `data`, and let gradients gather in `grad`, both of this shape.

        This is how a parameter comes to live in a bucket: no gradient is ever copied there.
        """
        leaf = self._leaf()
        data[...] = self.data
        if leaf.filled:
            grad[...] = leaf.grad
        self.data, leaf.grad = data, grad

    def on_gradient(self, hook: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call `hook(self)` once in each backward, when the gradient of this leaf is complete.

        Returns the function that ends this.
        """
        leaf, entry = self._leaf(), [hook]  # its identity tells it from the same hook added again
        leaf.hooks = (*leaf.hooks, entry)

        def remove() -> None:
            leaf.hooks = tuple(e for e in leaf.hooks if e is not entry)

        return remove

    def backward(self, gradient: Array | Tensor | None = None) -> None:
        """Add to the `grad` of every leaf the derivative of this tensor, and free the graph.

        `gradient` (of this tensor's shape) weights the elements; only a single element can do
        without. Raises AutogradError for a wrong gradient, for a graph that is freed already, and
        where an array that is needed was changed in place since the forward pass.
        """
        if self.node is None:
            raise AutogradError("backward: this tensor depends on nothing that requires a gradient")
        if gradient is None:
            if self.data.size != 1:
                raise AutogradError(
                    f"backward of a tensor of shape {self.shape}: pass a gradient of that shape, "
                    "or sum to one number first"
                )
            gradient = array.namespace(self.data).ones_like(self.data)
        given = _data(gradient)
        if getattr(given, "shape", None) != self.shape:
            found = getattr(given, "shape", type(given).__name__)
            raise AutogradError(
                f"backward: gradient of shape {found}: expected an array of shape {self.shape}"
            )
        array.keep_freed_memory()
        if isinstance(self.node, Node):
            walk(self.node, given)
        else:
            self.receive(lambda g, out: g, given)
            self.complete()

    def receive(self, adjoint: Adjoint, gradient: Array) -> None:
        """Add `adjoint(gradient)` to `grad`. The first one is computed right where it belongs."""
        leaf = self.node
        if not isinstance(leaf, Leaf):  # requires_grad was taken back since the forward pass
            return
        if leaf.filled:
            leaf.grad += adjoint(gradient, None)
            return
        if leaf.grad is None or leaf.grad.shape != self.data.shape:
            leaf.grad = array.namespace(self.data).empty_like(self.data)
        result = adjoint(gradient, leaf.grad)
        if result is not leaf.grad:
            leaf.grad[...] = result
        leaf.filled = True

    def complete(self) -> None:
        """Call the hooks: this backward brings nothing more here."""
        if isinstance(self.node, Leaf):
            for (hook,) in self.node.hooks:
                hook(self)

    def _leaf(self) -> Leaf:
        if not isinstance(self.node, Leaf):
            raise AutogradError("only a leaf with requires_grad=True gathers a gradient")
        return self.node

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def T(self) -> Tensor:
        """The tensor with its axes reversed."""
        return apply("transpose", self, axes=None)

    def detach(self) -> Tensor:
        """Return a tensor on the same memory that takes no part in gradients."""
        return Tensor(self.data)

    def numpy(self) -> Array:
        """Return the values as a NumPy array."""
        return array.to_numpy(self.data)

    def item(self) -> float:
        """Return the only element as a Python number."""
        return self.data.item()

    # fmt: off
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
    def __pow__(self, other: Any) -> Tensor: return apply("power", self, other)
    def __rpow__(self, other: Any) -> Tensor: return apply("power", other, self)
    def __matmul__(self, other: Any) -> Tensor: return apply("matmul", self, other)
    def __rmatmul__(self, other: Any) -> Tensor: return apply("matmul", other, self)
    def __lt__(self, other: Any) -> Array: return self.data < _data(other)
    def __le__(self, other: Any) -> Array: return self.data <= _data(other)
    def __gt__(self, other: Any) -> Array: return self.data > _data(other)
    def __ge__(self, other: Any) -> Array: return self.data >= _data(other)
    # fmt: on

    def __getitem__(self, key: Any) -> Tensor:
        """Return the part that NumPy's indexing gives: numbers, slices, arrays, boolean masks."""
        plain = tuple(map(_data, key)) if isinstance(key, tuple) else _data(key)
        return apply("getitem", self, key=plain)

    def astype(self, dtype: Any) -> Tensor:
        """Return the values in another floating dtype; the gradient comes back in this one."""
        return apply("astype", self, dtype=dtype)

    def to(self, device: str) -> Tensor:
        """Return the tensor on "cpu" or "cuda"; the gradient comes back to this device.

        Raises DeviceNotFound where there is no GPU.
        """
        return apply("to", self, device=device)

    def reshape(self, *shape: int) -> Tensor:
        """Return the tensor in another shape, also given as one tuple; one length may be -1."""
        return apply("reshape", self, shape=_axes(shape))

    def transpose(self, *axes: int) -> Tensor:
        """Return the tensor with its axes in the order `axes`; reversed by default."""
        return apply("transpose", self, axes=_axes(axes) or None)

    def sum(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the sum along `axis` (all axes by default)."""
        return apply("sum", self, axis=axis, keepdims=keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the mean along `axis` (all axes by default); 0 of no elements."""
        return apply("mean", self, axis=axis, keepdims=keepdims)

    def var(
        self,
        axis: int | tuple[int, ...] | None = None,
        *,
        correction: float = 0,
        keepdims: bool = False,
    ) -> Tensor:
        """Return the variance along `axis`: squared deviations over (count - correction)."""
        return apply("var", self, axis=axis, correction=correction, keepdims=keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the largest along `axis`; equal ones share the gradient."""
        return apply("max", self, axis=axis, keepdims=keepdims)

    def min(self, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
        """Return the smallest along `axis`; equal ones share the gradient."""
        return apply("min", self, axis=axis, keepdims=keepdims)

    def exp(self) -> Tensor:
        """Return e to the power of each element."""
        return apply("exp", self)

    def log(self) -> Tensor:
        """Return the natural logarithm of each element."""
        return apply("log", self)

    def sqrt(self) -> Tensor:
        """Return the square root of each element."""
        return apply("sqrt", self)

    def abs(self) -> Tensor:
        """Return the absolute value of each element; its derivative at 0 is 0."""
        return apply("abs", self)

    def clip(self, low: float | None = None, high: float | None = None) -> Tensor:
        """Return each element limited to low..high; outside, the gradient is 0."""
        return apply("clip", self, low=low, high=high)


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value


def _axes(given: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def tensor(data: Any, *, requires_grad: bool = False, dtype: Any = None) -> Tensor:
    """Make a tensor of its own memory from numbers, nested lists, an array or a tensor.

    Python floats become float32, as does what is to have a gradient and is of whole numbers.
    """
    data = _data(data)
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
    values, sources = [], []
    for x in inputs:
        if isinstance(x, Tensor):
            values.append(x.data)
            node = x.node
            sources.append(node if node is None or node.__class__ is Node else x)
        else:
            # a NumPy scalar would widen float32 arrays to float64; a Python number does not
            values.append(x.item() if isinstance(x, generic) else x)
            sources.append(None)
    try:
        value, adjoints, push = OPS[name](*values, **options)
    except (ValueError, IndexError) as error:
        raise AutogradError(f"{name} of shapes {_shapes(values)}: {error}") from error
    result = Tensor(value if value.__class__ is ndarray else array.as_array(value))
    recording, observer = mode()
    if recording:
        i, edges = 0, []
        for source in sources:
            if source is not None:
                edges.append((source, adjoints[i]))
            i += 1  # noqa: SIM113
        if edges:
            result.node = Node(name, edges)
    return result if observer is None else observer(name, inputs, options, result, push)


def _shapes(values: list[Any]) -> str:
    return ", ".join(str(getattr(v, "shape", v)) for v in values)
