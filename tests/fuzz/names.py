"""What is public: every function, class and method that takes an argument, found by itself."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

#: Packages whose names users call; those of frameworks are looked at where these are installed.
PACKAGES = {
    "engine": ("mpidl.autograd", "mpidl.functional"),
    "layers": ("mpidl.nn", "mpidl.nn.init", "mpidl.nn.random"),
    "rates": ("mpidl.optim", "mpidl.optim.schedules", "mpidl.codecs", "mpidl.plan"),
    "data": ("mpidl.data",),
    "training": (
        "mpidl", "mpidl.checkpoint", "mpidl.signals", "mpidl.strategies", "mpidl.testing",
        "mpidl.onnx",
    ),
    "torch": ("mpidl.torch",),
    "jax": ("mpidl.jax",),
    "keras": ("mpidl.keras",),
}  # fmt: skip


def of_group(group: str) -> dict[str, Any]:
    """Return the public functions, classes and methods of a group, by "module:qualified.name".

    The name is that of the definition, so that one that is exported twice is one.
    """
    found: dict[str, Any] = {}
    for package in PACKAGES[group]:
        module = importlib.import_module(package)
        for name in exported(module):
            value = getattr(module, name)
            if isinstance(value, type):
                found |= of_class(value)
            elif callable(value) and ours(value) and takes_arguments(value):
                found[key(value)] = value
    return found


def exported(module: ModuleType) -> list[str]:
    """Return the names of a module's `__all__`, or of what it defines itself."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return list(getattr(module, "__all__", own))


def of_class(kind: type) -> dict[str, Any]:
    if not ours(kind) or issubclass(kind, BaseException) or getattr(kind, "_is_protocol", False):
        return {}
    made = {} if inspect.isabstract(kind) or not takes_arguments(kind) else {key(kind): kind}
    return made | {key(method): method for method in methods(kind)}


def methods(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if not ours(base) or getattr(base, "_is_protocol", False):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)  # of a class method
            if (not name.startswith("_") or name == "__call__") and inspect.isfunction(function):
                function = inspect.unwrap(function)
                if ours(function) and takes_arguments(function, skip=1):
                    yield function


def ours(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").split(".")[0] == "mpidl"


def takes_arguments(value: Any, skip: int = 0) -> bool:
    try:
        return len(inspect.signature(value).parameters) > skip
    except ValueError:  # written in C
        return True


def key(value: Any) -> str:
    value = inspect.unwrap(value)
    return f"{value.__module__.removeprefix('mpidl.')}:{value.__qualname__}"


def resolve(name: str) -> Any:
    """Return what `key` named. A class method comes bound to its class."""
    module, _, path = name.partition(":")
    full = module if module == "mpidl" else f"mpidl.{module}"
    value: Any = sys.modules.get(full) or importlib.import_module(full)
    for part in path.split("."):
        value = getattr(value, part)
    return value


if __name__ == "__main__":
    for group in PACKAGES:
        print("##", group)
        for name in of_group(group):
            print(name, inspect.signature(resolve(name)))
