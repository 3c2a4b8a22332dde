"""What a worker needs of the script: the definitions it uses, and never the training.

A fresh process cannot find what `__main__` defines. To run the script again, as the module
multiprocessing does, would start the training again wherever the script has no
`if __name__ == "__main__"`. So only the functions and classes that are used are run again, from
the script's source; modules are imported, and other variables come with the value they have.
"""

from __future__ import annotations

import ast
import dis
import importlib
import marshal
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    #: Turns a value into what can be sent; returns that, and the names of `__main__` it refers to.
    Dump = Callable[[Any], tuple[Any, set[str]]]

Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ADVICE = "put it into a module of its own and import it, or use workers=0"


@dataclass
class Excerpt:
    """The part of `__main__` that workers get."""

    path: str = ""
    code: bytes = b""  #: of the definitions, in the script's order
    imports: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)  #: the script's name -> the module's
    before: dict[str, Any] = field(default_factory=dict)  #: values that need no definition
    after: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  #: what cannot be sent, and why

    def restore(self, load: Callable[[Any], Any]) -> None:
        """Fill this process's `__main__`; `load` undoes `Dump`."""
        space = vars(sys.modules["__main__"])
        space["__file__"] = self.path
        for module in self.imports:
            importlib.import_module(module)
        space.update({name: sys.modules[module] for name, module in self.modules.items()})
        space.update({name: load(value) for name, value in self.before.items()})
        exec(marshal.loads(self.code), space)
        space.update({name: load(value) for name, value in self.after.items()})


def excerpt(names: Iterable[str], dump: Dump) -> Excerpt | None:
    """Return what `names` of `__main__` need, and what that needs in turn; None for no names.

    Raises InvalidArgument for a name that the source does not define in one place.
    """
    todo = sorted(names)
    if not todo:
        return None
    space = vars(sys.modules["__main__"])
    path = space.get("__file__")
    if path is None or not Path(path).is_file():
        raise InvalidArgument(
            f"Loader: {todo[0]} is defined in __main__, which has no source file that workers "
            f"could read it from: {ADVICE}"
        )
    tree = ast.parse(Path(path).read_bytes(), path)
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    made = Excerpt(path=path)
    taken: dict[str, ast.stmt] = {}
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or name not in space:  # a builtin, or a name that is wrong in the rank too
            continue
        seen.add(name)
        value = space[name]
        if isinstance(value, types.ModuleType):
            made.modules[name] = value.__name__
            made.imports += [value.__name__, *_submodules(tree, name)]
        elif _is_definition(value, name):
            taken[name] = _definition(tree, name, path)
            todo += _globals(_compile([*future, taken[name]], path))
        else:
            try:
                sent, needed = dump(value)
            except Exception as error:  # perhaps nobody asks for it: a rank's World, a lock
                made.missing[name] = f"{type(error).__name__}: {error}"
                continue
            (made.after if needed else made.before)[name] = sent
            todo += needed
    body = sorted(taken.values(), key=lambda node: node.lineno)
    made.code = marshal.dumps(_compile([*future, *body], path))
    return made


def _is_definition(value: Any, name: str) -> bool:
    """Whether `value` is what pickle would look up in `__main__` under `name`."""
    there = getattr(value, "__module__", None) == "__main__"
    return there and getattr(value, "__qualname__", None) == name


def _definition(tree: ast.Module, name: str, path: str) -> ast.stmt:
    found = [node for bound, node in _bindings(tree) if bound == name]
    if len(found) == 1 and found[0] is not None:
        return found[0]
    how = "more than once" if len(found) > 1 else "not by def or class"
    raise InvalidArgument(
        f"Loader: {name} is defined {how} in {path}, so workers cannot tell what to run: {ADVICE}"
    )


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.stmt | None]]:
    """Yield the names that a module binds, outside functions and classes, and what defines them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child.name, child
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, None
        else:
            yield from _bindings(child)


def _submodules(tree: ast.Module, name: str) -> list[str]:
    """Return the modules a.b of which `import a.b` binds the `name` a."""
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names]  # fmt: skip
    return [a.name for a in imports if a.asname is None and a.name.startswith(f"{name}.")]


def _compile(body: list[ast.stmt], path: str) -> types.CodeType:
    return compile(ast.Module(body, []), path, "exec", dont_inherit=True)


def _globals(code: types.CodeType) -> set[str]:
    """Return the global names that `code` reads, and that the functions in it read."""
    reads = (i for i in dis.get_instructions(code) if i.opname.startswith("LOAD_"))
    found = {i.argval for i in reads if i.opname.endswith(("GLOBAL", "GLOBALS", "NAME"))}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= _globals(inner)
    return found
