"""A stand-in for CuPy, for machines without a GPU: its arrays lie in host memory.

A mock, and no proof that anything runs on a GPU: docs/gpu.md says what has. It does catch what
would fail there, since like CuPy's its arrays refuse to become NumPy arrays unasked: NumPy
functions on a device path, copies forgotten, MPI given memory it cannot read, or should wait for.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import numpy as np

pending = False  # whether the stream may hold work that nobody waited for


class ndarray:  # noqa: N801
    """A device array: everything but conversion to NumPy."""

    __array_ufunc__ = None

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("implicit conversion of a device array to NumPy")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Lets a CUDA-aware MPI read the memory; this one's pointer is the host's."""
        if os.environ.get("MPIDL_CUDA_AWARE") != "yes":
            raise AttributeError("MPI is not CUDA-aware")
        assert not pending, "MPI was given memory on which a kernel may still be at work"
        return {**self.host.__array_interface__, "version": 3, "stream": None}

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        synchronize()
        if out is None:
            return self.host.copy()
        out[...] = self.host
        return out

    def set(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        self.host[...] = host

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no way out to the host: __dlpack__, __array_interface__
            raise AttributeError(name)
        return wrap(getattr(self.host, name))

    def __getitem__(self, key: Any) -> Any:
        return wrap(self.host[unwrap(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        assert not isinstance(value, np.ndarray) or value.ndim == 0, "NumPy array into the device"
        submit()
        self.host[unwrap(key)] = unwrap(value)

    def __len__(self) -> int:
        return len(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)


def operate(name: str) -> Any:
    def method(self: ndarray, other: Any = None) -> Any:
        assert not isinstance(other, np.ndarray), "a NumPy array met a device array"
        submit()
        arguments = () if other is None else (unwrap(other),)
        result = getattr(self.host, name)(*arguments)
        return self if result is self.host else wrap(result)

    return method


for plain in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for prefix in ("", "r", "i"):
        setattr(ndarray, f"__{prefix}{plain}__", operate(f"__{prefix}{plain}__"))
for name in ("neg", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{name}__", operate(f"__{name}__"))


def unwrap(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, (tuple, list)):
        return type(value)(map(unwrap, value))
    return value


def wrap(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    if callable(value) and not isinstance(value, type):

        def function(*args: Any, **kwargs: Any) -> Any:
            submit()
            result = value(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
            out = kwargs.get("out")
            return out if out is not None else wrap(result)

        return function
    return value


class Namespace(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "asarray":
            return lambda a, dtype=None: (
                a if isinstance(a, ndarray) else ndarray(np.array(a, dtype))
            )
        if name == "empty":  # starts no kernel
            return lambda *args, **kwargs: ndarray(np.empty(*args, **kwargs))
        return wrap(getattr(np, name))


def submit() -> None:
    global pending
    pending = True


def synchronize() -> None:
    global pending
    pending = False


def install() -> None:
    """Make `import cupy` find the stand-in."""
    cupy = Namespace("cupy")
    stream = types.SimpleNamespace(synchronize=synchronize)
    vars(cupy).update(
        ndarray=ndarray,
        cuda=types.SimpleNamespace(
            get_current_stream=lambda: stream,
            Device=lambda _: types.SimpleNamespace(use=lambda: None),
            runtime=types.SimpleNamespace(getDeviceCount=lambda: 1),
        ),
    )
    sys.modules["cupy"] = cupy
    pinned = types.ModuleType("cupyx")
    vars(pinned).update(empty_pinned=lambda size, dtype: np.full(size, 77, dtype))
    sys.modules["cupyx"] = pinned
