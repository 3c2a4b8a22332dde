"""What is public: every function, class and method that takes an argument, found by itself."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

#: Packages whose names users call, without those of frameworks.
PACKAGES = {
    "engine": ("mpidl.autograd", "mpidl.functional"),
    "layers": ("mpidl.nn", "mpidl.nn.init", "mpidl.nn.random"),
    "rates": ("mpidl.optim", "mpidl.optim.schedules", "mpidl.codecs", "mpidl.plan"),
    "data": ("mpidl.data",),
    "training": (
        "mpidl", "mpidl.checkpoint", "mpidl.signals", "mpidl.strategies", "mpidl.testing",
        "mpidl.onnx", "mpidl.trace",
    ),
}  # fmt: skip

#: Adapters, by the groups that tests/fuzz/test_adapters.py fuzzes.
ADAPTERS = {
    "jax": ("mpidl.jax",),
    "keras": ("mpidl.keras",),
    "tensorflow": ("mpidl.tensorflow",),
    "torch": ("mpidl.torch",),
    "torch_training": ("mpidl.torch", "mpidl.torch.elastic"),
}
#: Classes that users get without a public name: "module:qualified.name".
RETURNED = {
    "torch_training": ("torch.adasum:AdasumSteps", "torch.optimizer:_Averaged"),
}

#: What users do not call, or make themselves: who calls it hands over what it has checked.
#: Patterns of names, and why.
INTERNAL = {
    "autograd.picture:Picture": "made by draw",
    "autograd.transforms:Record": "made by trace",
    "autograd.variable:Variable.bind": "called by buckets",
    "autograd.variable:Variable.receive": "called by the walk back",
    "checkpoint:Loaded": "made by load",
    "codecs.*:*.decode": "called by strategies, with arrays they made",
    "codecs.*:*.encode": "as decode",
    "codecs.*:*.nbytes": "as decode",
    "codecs.int8:Int8.set_stream": "called by checkpoints, which have checked it",
    "data.batches:Batches*": "made by batches",
    "data.files:FileDataset": "made by npy and the like",
    "data.scale:ScaledDataset": "made by Scaler.apply",
    "data.scale:Scaler.fit": "abstract",
    "data.text:TextDataset": "made by text",
    "history:Epoch": "made by fit",
    "history:History": "made by fit",
    "nn.module:Module.forward": "for subclasses to write",
    "nn.random:check_state": "tells what is wrong by Python's own errors, as it says",
    "nn.random:generator": "takes a module of arrays",
    "optim.*:*.init": "called by Update, with parts of buckets",
    "optim.*:*.update": "as init",
    "optim.base:Layers*": "made by Update",
    "plan.model:Times": "made by times",
    "strategies.*:*.*": "called by DataParallel, with buckets",
    "strategies:Choice*": "made by make",
    "strategies:takes_half": "called by DataParallel, where errors are told on all ranks",
    "strategies.base:in_turn": "for strategies",
    "strategies.base:publish_in_turn": "for strategies",
    "strategies.*:*": "takes a world; options are fuzzed where there are any",
    "testing.*:*.act": "called by inject",
    "testing.*:*.after": "as act",
    "world:World*": "for strategies, which pass what they have checked",
}

#: As INTERNAL, of the adapters.
INTERNAL_THERE = {
    "keras.callbacks:LearningRateWarmupCallback.on_*": "called by fit",
    "torch.checkpointed:Checkpointed.restore": "called by load, with what it has read",
    "torch.elastic:State*": "its callbacks are the user's own",
    "torch.parallel:DataParallel.enter": "takes a world",
    "torch.parallel:DataParallel.state_dict": "the module's own",
    "torch.process_sets:ProcessSet.place": "called by operations",
    "torch.reduce_op:ReduceOp": "users take those there are",
    "torch.sampler:Loader": "made by loader",
}


def of_group(group: str) -> dict[str, Any]:
    """Return the public functions, classes and methods of a group, by "module:qualified.name".

    The name is that of the definition, so that one that is exported twice is one.
    """
    found: dict[str, Any] = {}
    for name in RETURNED.get(group, ()):
        found |= {key(method): method for method in methods(resolve(name))}
    for package in (PACKAGES | ADAPTERS)[group]:
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
