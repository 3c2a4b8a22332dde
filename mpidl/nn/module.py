"""The base of all layers and models: it finds its parameters by looking at its attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mpidl.array import to_device
from mpidl.autograd import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array

M = TypeVar("M", bound="Module")


class Parameter(Tensor):
    """A tensor that training changes. `data` (any shape) is used as it is, not copied."""

    __slots__ = ()

    def __init__(self, data: Array) -> None:
        super().__init__(data, requires_grad=True)


class Module:
    """A function with parameters. Subclasses write `forward`; attributes hold the rest.

    Parameters and modules may stand in attributes directly, or in lists, tuples and dicts.
    """

    training = True  # class attributes, so that a subclass needs no super().__init__()
    _hooks: tuple[list[Callable[[Module, tuple[Any, ...]], None]], ...] = ()

    def forward(self, *inputs: Any) -> Tensor:
        """Compute the output. Subclasses say with which shapes."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def __call__(self, *inputs: Any) -> Tensor:
        """Call the hooks, then `forward`."""
        for (hook,) in self._hooks:
            hook(self, inputs)
        return self.forward(*inputs)

    def on_forward(self, hook: Callable[[Module, tuple[Any, ...]], None]) -> Callable[[], None]:
        """Call `hook(module, inputs)` before each forward. Returns the function that ends this."""
        entry = [hook]  # its identity tells it from the same hook added again
        self._hooks = (*self._hooks, entry)

        def remove() -> None:
            self._hooks = tuple(e for e in self._hooks if e is not entry)

        return remove

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hooks: a copy, or what is loaded again, is in nobody's hands."""
        return {name: value for name, value in vars(self).items() if name != "_hooks"}

    def children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """Yield the modules and parameters held directly, by name, in the order they were set."""
        for name, value in vars(self).items():
            yield from _members(name, value)

    def named_parameters(self) -> dict[str, Parameter]:
        """Return all parameters by dotted name; one that is shared stands there once."""
        found: dict[str, Parameter] = {}
        seen: set[int] = {id(self)}

        def visit(module: Module, prefix: str) -> None:
            for name, child in module.children():
                if id(child) in seen:
                    continue
                seen.add(id(child))
                if isinstance(child, Parameter):
                    found[prefix + name] = child
                else:
                    visit(child, f"{prefix}{name}.")

        visit(self, "")
        return found

    def parameters(self) -> list[Parameter]:
        """Return all parameters, each once."""
        return list(self.named_parameters().values())

    def modules(self) -> Iterator[Module]:
        """Yield this module and all below it, each once."""
        seen: set[int] = set()
        waiting: list[Module] = [self]
        while waiting:
            module = waiting.pop()
            if id(module) not in seen:
                seen.add(id(module))
                yield module
                waiting += [c for _, c in module.children() if isinstance(c, Module)]

    def train(self: M, mode: bool = True) -> M:
        """Set training mode here and below, and return the module."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self: M) -> M:
        """Set evaluation mode here and below, and return the module."""
        return self.train(False)

    def to(self: M, device: str) -> M:
        """Move the parameters to "cpu" or "cuda", and return the module.

        Before a `DataParallel` or `Trainer` takes the model: that gives the parameters their place.
        """
        for parameter in self.parameters():
            parameter.data = to_device(parameter.data, device)
        return self


def _members(name: str, value: Any) -> Iterator[tuple[str, Module | Parameter]]:
    """Yield the modules and parameters in `value`, however its lists and dicts are nested."""
    if isinstance(value, (Module, Parameter)):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _members(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _members(f"{name}.{key}", item)
