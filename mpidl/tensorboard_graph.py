"""The graph of a model for TensorBoard: operations of the first loss, in boxes of their layers."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpidl.autograd.graph import survey
from mpidl.autograd.tape import Node
from mpidl.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.autograd.graph import Vertex
    from mpidl.nn import Module
    from mpidl.trainer import Trainer

PRODUCER = 22  # TensorFlow's number for graphs of this form


class Watch:
    """Looks on while a trainer's model makes its first loss, and hands its graph to `found`.

    It costs one backward more. The box of a layer holds its operations and parameters; what no
    layer ran is in "loss". Inputs that need no gradient, such as the samples, are not recorded.
    """

    def __init__(self, trainer: Trainer, found: Callable[[Any], None]) -> None:
        self.trainer, self.found, self.loss = trainer, found, trainer.loss
        self.names = {id(m): name for name, m in trainer.model.named_modules().items()}
        self.owners: dict[int, str] = {}  # of nodes, by id
        self.nodes: list[Node] = []  # kept, so that no id is used again
        self.removers = [m.on_output(self._claim) for m in trainer.model.modules()]
        trainer.loss = self._first

    def _claim(self, module: Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note that the module made what lies between its inputs and its output."""
        seen = {id(getattr(x, "node", None)) for x in inputs}
        ready = [getattr(output, "node", None)]
        while ready:
            node = ready.pop()
            if not isinstance(node, Node) or id(node) in seen:
                continue
            seen.add(id(node))
            if id(node) not in self.owners:  # else a module within made it
                self.owners[id(node)] = self.names.get(id(module), "")
                self.nodes.append(node)
            ready += [parent for parent, _ in node.edges or ()]

    def _first(self, *arguments: Any) -> Any:
        loss = self.loss(*arguments)
        self.trainer.loss = self.loss
        for remove in self.removers:
            remove()
        with suppress(AutogradError):  # of a loss without a graph there is no picture
            self.found(graph_def(survey(loss), self.trainer.model, self.owners))
        self.owners, self.nodes = {}, []
        return loss


def graph_def(vertices: list[Vertex], model: Module, owners: dict[int, str]) -> Any:
    """Return TensorFlow's GraphDef of what `survey` found; `owners` tells the layer of a node."""
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.node_def_pb2 import NodeDef
    from tensorboardX.proto.versions_pb2 import VersionDef

    top = type(model).__name__
    leaves = {id(p): name for name, p in model.named_parameters().items()}
    used = {_path(top, name) for name in ("", *model.named_modules())} | {"loss"}
    names: list[str] = []
    nodes = []
    for vertex in vertices:
        key = id(vertex.source)
        if vertex.name:
            owner = owners.get(key)
            wanted = _path("loss" if owner is None else top, owner or "", vertex.name)
        else:
            wanted = _path(top, leaves[key]) if key in leaves else "leaf"
        name, number = wanted, 0
        while name in used:
            number += 1
            name = f"{wanted}_{number}"
        used.add(name)
        names.append(name)
        node = NodeDef(name=name, op=vertex.name or "Parameter")
        node.input.extend(names[i] for i in vertex.inputs)
        if vertex.shape is not None:
            node.attr["dtype"].s = str(vertex.dtype).encode()
            shape = node.attr["_output_shapes"].list.shape.add()
            for length in vertex.shape:
                shape.dim.add(size=length)
        nodes.append(node)
    return GraphDef(node=nodes, versions=VersionDef(producer=PRODUCER))


def _path(*parts: str) -> str:
    joined = "/".join(part.replace(".", "/") for part in parts if part)
    return re.sub(r"[^-/\w]", "_", joined, flags=re.ASCII)
